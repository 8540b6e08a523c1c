"""Changes one thing in a valid call, so that it is invalid: a type, a shape, a dtype, a device, a value."""

import inspect
import re
from collections.abc import Iterator
from dataclasses import replace
from random import Random
from typing import Any

import torch

import mini_flash_attention
from tests.fuzz.call import Call, Wrong

FLAGS = ("2", "-1", "None", "'False'", "0.5", "nan", "[]", "torch.tensor(True)")
LENGTHS = ("-1", "1.5", "'3'", "None", "[3]", "nan")
LIMITS = (*LENGTHS, "torch.tensor([1, 2])", "torch.tensor(1.0)", "torch.tensor(-1)")
WINDOWS = ("3", "'ab'", "()", "(1,)", "(1, 2, 3)", "(1.5, 0)", "(0, nan)", "('1', 0)", "(None, [])", "{1, 2}")
# Values that are wrong in every call.
NUMBERS = {
    "dropout_p": ("-0.1", "1.0", "1.5", "nan", "inf", "None", "'0.1'", "[0.1]", "1j"),
    "softmax_scale": ("nan", "inf", "-inf", "10**400", "'1'", "[1.0]", "1j"),
    "softcap": ("nan", "inf", "-inf", "10**400", "'1'", "[1.0]", "1j", "None"),
    "window_size": (*WINDOWS, "torch.tensor([1, 2, 3])", "torch.tensor([1.0, 2.0])", "torch.tensor(3)"),
    "num_splits": ("-1", "129", "10**9", "1.0", "'2'", "None"),
    "cache_seqlens": ("-1", "10**6", "1.5", "'3'", "[1]", "nan"),
    **dict.fromkeys(("causal", "deterministic", "rotary_interleaved"), FLAGS),
    **dict.fromkeys(("return_attn_probs", "return_softmax_lse"), FLAGS),
    **dict.fromkeys(("batch", "seqlen"), LENGTHS),
    **dict.fromkeys(("max_seqlen", "max_seqlen_q", "max_seqlen_k"), LIMITS),
}
ATTENDED = ("q", "k", "v", "qkv", "kv", "k_cache", "v_cache", "out")
INTS = ("cu_seqlens", "cu_seqlens_q", "cu_seqlens_k", "seqused_k", "cache_seqlens", "cache_batch_idx")
INTS += ("cache_leftpad", "block_table")
OPTIONAL = ("k", "v", "rotary_cos", "rotary_sin", *INTS[2:], "alibi_slopes", "s_aux", "out", "unused_mask")
PAD = "torch.nn.functional.pad"

Given = dict[str, Any]  # the arguments of the valid call


def wrong(call: Call, random: Random) -> Call:
    """The call with one argument changed."""
    names: Given = {}
    exec("\n".join(replace(call, environment={}).making), names)
    given = {name: names[name] for name in call.tensors}
    given |= {name: eval(code, names) for name, code in call.numbers.items()}
    parameters = list(inspect.signature(getattr(mini_flash_attention, call.function)).parameters)
    changes: list[Wrong] = []
    while not changes:
        changes = list(changed(call, random.choice(parameters), given))
    environment = dict(call.environment)
    if call.device != "cpu":  # values are wrong, too; on the CPU they are always checked
        environment["MINI_FLASH_ATTENTION_CHECK"] = "1"
    return replace(call, wrong=random.choice(changes), gradients={}, environment=environment)


def changed(call: Call, name: str, given: Given) -> Iterator[Wrong]:
    """All that may be done to an argument of this call."""

    def to(values: Iterator[str] | tuple[str, ...], *or_told: str) -> Iterator[Wrong]:
        for value in values:
            yield Wrong((name, *or_told), f"arguments |= dict({name}={value})")

    yield from to(NUMBERS.get(name, ()))
    if name not in call.tensors:
        if name in OPTIONAL and name not in call.numbers:
            # A block_table changes what shape k and v must have.
            yield from to(
                ("0.5", "[1]", "torch.zeros(3, 5, 7, 9)"), *(("k",) if name == "block_table" else ())
            )
        return
    yield from to(kinds(call, name))
    if name in ATTENDED:
        yield from to(attended(name, given))
        # Where two do not fit each other the error may tell either.
        yield from to(sizes_of_attended(call.function, name, given), *call.tensors)
    if name in INTS:
        yield from to(ints(name, given))
        if not (name == "cu_seqlens" or (name == "block_table" and "k_cache" in given)):
            yield from to(
                (f"{PAD}({name}, {(0, 0, 0, 1) if name == 'block_table' else (0, 1)})",), *call.tensors
            )
    for together in TOGETHER.get(name, lambda given: ())(given):
        yield Wrong(tuple(re.findall(r"(\w+)=", together)), f"arguments |= dict({together})")


def kinds(call: Call, name: str) -> Iterator[str]:
    """No tensor, or one of another kind."""
    plain = f"{name}.detach().resolve_neg()"
    yield from ("3.5", f"'{name}'", f"{plain}.tolist()", f"{plain}.cpu().double().numpy()")
    yield f"{plain}.to_sparse()"
    # A PyTorch operation like others, and a call of meta tensors: both are served.
    if (call.function, name) not in (("pad_input", "hidden_states"), ("flash_attn_qkvpacked_func", "qkv")):
        yield f"{name}.to('meta')"
    if name not in OPTIONAL:
        yield "None"
    if call.device != "cpu" and name != "indices":
        yield f"{name}.cpu()"


def attended(name: str, given: Given) -> Iterator[str]:
    """A dtype, a number of dimensions, a gradient or memory that it may not have."""
    x, plain = given[name], f"{name}.detach()"
    yield from (
        f"{plain}.{kind}" for kind in ("int()", "bool()", "to(torch.complex64)", "to(torch.float8_e5m2)")
    )
    yield from (f"{plain}[None]", f"{plain}.flatten()", f"{plain}.unsqueeze(-1)")
    if name != "qkv":
        yield f"{plain}.{'float' if x.dtype == torch.float64 else 'double'}()"
    if "k_cache" in given or "out" in given:
        yield f"{plain}.clone().requires_grad_()"
    if name == "out" and x.shape[0] > 1 and x.numel() > 0:
        yield "out[:1].expand_as(out)"
    if name == "out" and x.numel() > 0 and given["k"].shape == x.shape:
        yield "arguments['k']"


def sizes_of_attended(function: str, name: str, given: Given) -> Iterator[str]:
    """Sizes that do not fit those of the others, or are out of range."""
    plain = f"{name}.detach()"
    yield f"{PAD}({plain}, (0, {256 if name == 'qkv' else 1}))"
    yield from (f"{plain}[..., :0]", f"{plain}[..., :0, :]")
    heads_k = next(given[key].shape[-2] for key in ("qkv", "kv", "k_cache", "k") if key in given)
    if name == "q" and heads_k > 1:
        yield f"torch.cat([{plain}, {plain}[..., :1, :]], -2)"
    free = name == "qkv" or ("varlen" in function and name in ("q", "kv"))
    if name == "q" and "k_cache" in given:  # another batch may fit
        free = "k" not in given and "cache_seqlens" not in given
    if not free:
        yield f"{PAD}({plain}, {(0, 0) * (given[name].ndim - 1) + (0, 1)})"


def ints(name: str, given: Given) -> Iterator[str]:
    """A dtype or a number of dimensions that it may not have, or values out of range."""
    x = given[name]
    yield from (f"{name}.long()", f"{name}.float()", f"{name}.short()", f"{name}[None]")
    if name.startswith("cu_seqlens"):
        if name != "cu_seqlens_k":  # keys may start later
            yield f"{name} + 1"
        if x[-1] > 0:
            yield f"{name}.flip(0)"
        # Without sequences or with seqused_k nothing bounds what would be lengths of pages.
        unbounded = (
            name == "cu_seqlens_k" and "block_table" in given and ("seqused_k" in given or len(x) == 1)
        )
        if not unbounded:
            yield f"torch.cat([{name}[:-1], {name}[-1:] + 10**6])" if len(x) > 1 else f"{name} + 10**6"
    elif name == "block_table":
        if tokens(given) > 0:
            yield from ("torch.full_like(block_table, 10**6)", "torch.full_like(block_table, -1)")
    elif len(x) > 0:
        yield from (f"{name} + 10**6", f"{name} - 10**6")


def tokens(given: Given) -> int:
    """The keys of the longest sequence."""
    if "k_cache" not in given:
        used = given["seqused_k"] if "seqused_k" in given else given["cu_seqlens_k"].diff()
        return int(used.max()) if len(used) else 0
    if len(given["q"]) == 0:
        return 0
    ends = torch.as_tensor(given["cache_seqlens"]) + (given["k"].shape[1] if "k" in given else 0)
    return int((ends - given["cache_leftpad"] if "cache_leftpad" in given else ends).max())


# Arguments that go together.


def new_keys(given: Given) -> Iterator[str]:
    if "k_cache" in given and "k" in given:
        yield from ("k=None", "v=None", "cache_seqlens=None")


def rotary(given: Given) -> Iterator[str]:
    both = "rotary_cos=rotary_cos{0}, rotary_sin=rotary_sin{0}"
    yield from (both.format(part) for part in ("[:, :3]", "[:0]", "[None]", ".int()", ".to('meta')"))
    yield from ("rotary_cos=None", "rotary_sin=None", "rotary_cos=rotary_cos, k=None, v=None")
    yield from (f"{name}={name}.clone().requires_grad_()" for name in ("rotary_cos", "rotary_sin"))
    yield f"rotary_cos={PAD}(rotary_cos, (0, 1))"
    yield f"rotary_sin={PAD}(rotary_sin, (0, 0, 0, 1))"
    if isinstance(given["cache_seqlens"], int) and given["cache_seqlens"] > 0:
        yield both.format("[:1]")


def slopes(given: Given) -> Iterator[str]:
    for change in (".double()", ".half()", "[None, None]", ".requires_grad_()"):
        yield f"alibi_slopes=alibi_slopes.clone(){change}"
    yield f"alibi_slopes={PAD}(alibi_slopes, (0, 1))"


def sinks(given: Given) -> Iterator[str]:
    yield from (f"s_aux=s_aux.detach(){change}" for change in (".int()", "[None]", "[:0]", ".sum()"))
    yield f"s_aux={PAD}(s_aux.detach(), (0, 1))"
    if "k_cache" in given or "out" in given:
        yield "s_aux=s_aux.clone().requires_grad_()"


def padded(given: Given) -> Iterator[str]:
    yield f"hidden_states=hidden_states.{'sum' if 'indices' in given else 'flatten'}()"
    if "indices" in given:
        yield f"indices={PAD}(indices, (0, 1))"
        yield from (f"indices=indices{change}" for change in (".float()", ".byte()", "[None]"))
        if given["indices"].dtype != torch.bool and len(given["indices"]) > 0:
            yield from ("indices=indices + 10**6", "indices=indices - 10**6")
    else:
        yield f"attention_mask={PAD}(attention_mask, (0, 1))"
        yield "attention_mask=attention_mask[None]"
        yield f"unused_mask={PAD}(attention_mask, (0, 0, 0, 1))"


TOGETHER = {
    **dict.fromkeys(("k", "v", "cache_seqlens"), new_keys),
    **dict.fromkeys(("rotary_cos", "rotary_sin"), rotary),
    **dict.fromkeys(("hidden_states", "indices", "attention_mask"), padded),
    "alibi_slopes": slopes,
    "s_aux": sinks,
}
