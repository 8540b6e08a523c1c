"""What only a GPU can show of the integrations. Prints a line a check, exits 1 if any failed.

python -m tests.integrations.gpu              # one GPU: SDPA's hook, Transformers, a training step; 2 minutes
python -m tests.integrations.gpu --compiled   # the training step compiled, at 4k tokens
python -m tests.integrations.gpu --ring       # all GPUs of this machine: ring and Ulysses
"""

import argparse
import copy
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.nn import attention
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.varlen import varlen_attn

import mini_flash_attention as mini
from mini_flash_attention.integrations import sdpa, transformers
from mini_flash_attention.integrations.context_parallel import ring_attention, shard, ulysses

DEVICE, DTYPE = "cuda", torch.bfloat16


def heads_first(heads=8, heads_k=None, seqlen=257, seqlen_k=None, dim=64, batch=2) -> list[Tensor]:
    """q, k, v as F.scaled_dot_product_attention takes them, each a view of (batch, seqlen, heads, dim)."""
    torch.manual_seed(0)
    sizes = (heads, seqlen), *[(heads_k or heads, seqlen_k or seqlen)] * 2
    tensors = (torch.randn(batch, s, h, dim, device=DEVICE, dtype=DTYPE) for h, s in sizes)
    return [x.transpose(1, 2).requires_grad_() for x in tensors]


def with_gradients(
    function: Callable[..., Tensor], tensors: list[Tensor], dout: Tensor | None = None
) -> list[Tensor]:
    out = function(*tensors)
    if dout is None:
        dout = torch.sin(torch.arange(out.numel(), device=DEVICE)).view(out.shape).to(out.dtype)
    return [out, *torch.autograd.grad(out, tensors, dout)]


def close(results: list[Tensor], wanted: list[Tensor], rounding: float = 0.02) -> None:
    for i, (x, y) in enumerate(zip(results, wanted, strict=True)):
        error, size = (x.float() - y.float()).abs().max().item(), y.float().abs().max().item()
        assert error <= rounding * size + 0.01, f"result {i} is off by {error:.4f} of {size:.3f}"


# SDPA's hook

CASES = {
    "plain": ({}, {}),
    "causal": ({}, dict(is_causal=True)),
    "GQA, D 128": (dict(heads_k=2, dim=128), dict(is_causal=True, enable_gqa=True)),
    "D 40": (dict(dim=40), {}),
    "other keys, scale": (dict(seqlen=65, seqlen_k=300), dict(scale=0.3)),
    "one token": (dict(seqlen=1, seqlen_k=77), {}),
}


@contextmanager
def served(hook: sdpa.Hook, *names: str) -> Iterator[None]:
    before = hook.calls.copy()
    yield
    missing = [name for name in names if hook.calls[name] == before[name]]
    assert not missing, f"not served by our kernels: {missing}"


def check_sdpa(hook: sdpa.Hook) -> None:
    """Without sdpa_kernel: our kernels must be PyTorch's own choice."""
    names = "_scaled_dot_product_flash_attention", "_scaled_dot_product_flash_attention_backward"
    for name, (sizes, options) in CASES.items():
        tensors = heads_first(**sizes)
        try:
            with served(hook, *names):
                results = with_gradients(
                    lambda *t, o=options: F.scaled_dot_product_attention(*t, **o), tensors
                )
            with sdpa_kernel(SDPBackend.MATH):
                wanted = with_gradients(
                    lambda *t, o=options: F.scaled_dot_product_attention(*t, **o), tensors
                )
            close(results, wanted)
        except Exception as error:
            raise AssertionError(f"{name}: {error}") from error


def check_sdpa_with_dropout(hook: sdpa.Hook) -> None:
    q, k, v = heads_first()
    v = v.detach().double().to(DTYPE).requires_grad_()
    with served(hook, "_scaled_dot_product_flash_attention_backward"):
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=0.5)
        (dv,) = torch.autograd.grad(out.float().square().sum() / 2, v)
    torch.testing.assert_close((dv * v).float().sum(), out.float().square().sum(), rtol=2e-2, atol=1.0)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=0.5)
    graph.replay()
    first = out.clone()
    graph.replay()
    assert not first.equal(out), "a captured graph repeats its mask"


def check_sdpa_compiled(hook: sdpa.Hook) -> None:
    def function(*tensors: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(*tensors, is_causal=True) * 2

    tensors = heads_first()
    with served(hook, "_scaled_dot_product_flash_attention", "_scaled_dot_product_flash_attention_backward"):
        results = with_gradients(torch.compile(function, fullgraph=True), tensors)
    close(results, with_gradients(function, tensors))


def check_varlen_attn(hook: sdpa.Hook) -> None:
    starts = torch.tensor([0, 5, 5, 175, 239], device=DEVICE).int()
    tensors = [torch.randn(239, 8, 64, device=DEVICE, dtype=DTYPE, requires_grad=True) for _ in range(3)]
    for window in (-1, 0), (16, 0):
        with served(hook, "_flash_attention_forward", "_flash_attention_backward"):
            ask = lambda *t, w=window: varlen_attn(*t, starts, starts, 170, 170, window_size=w)  # noqa: E731
            results = with_gradients(ask, tensors)
        ours = lambda *t, w=window: mini.flash_attn_varlen_func(*t, starts, starts, 170, 170, window_size=w)  # noqa: E731
        close(results, with_gradients(ours, tensors))


def check_restore(hook: sdpa.Hook) -> None:
    sdpa.restore()
    before = hook.calls.copy()
    F.scaled_dot_product_attention(*heads_first())
    assert hook.calls == before and torch.backends.cuda.cudnn_sdp_enabled()
    sdpa.activate()


# Transformers


def llama(implementation: str, hidden=256, heads=4, heads_k=2, dim=64, vocab=512, longest=1024) -> Any:
    import transformers as tf

    torch.manual_seed(0)
    config = tf.LlamaConfig(
        vocab_size=vocab, hidden_size=hidden, intermediate_size=hidden * 11 // 4, num_hidden_layers=4,
        num_attention_heads=heads, num_key_value_heads=heads_k, head_dim=dim, max_position_embeddings=longest,
        pad_token_id=0, bos_token_id=1, eos_token_id=None,
    )  # fmt: skip
    build = tf.AutoModelForCausalLM.from_config
    return build(copy.deepcopy(config), attn_implementation=implementation, dtype=DTYPE).to(DEVICE)


def tokens(batch=4, seqlen=256, vocab=512) -> Tensor:
    return torch.randint(2, vocab, (batch, seqlen), generator=torch.Generator().manual_seed(1)).to(DEVICE)


def check_losses() -> None:
    """100 steps learn the same with ours, ours compiled, and Transformers' sdpa."""
    losses = []
    for implementation, compiled in (
        ("sdpa", False),
        ("mini_flash_attention", False),
        ("mini_flash_attention", True),
    ):
        model = llama(implementation).train()
        step = torch.compile(model, fullgraph=True) if compiled else model
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        losses.append([])
        for _ in range(100):
            loss = step(tokens(), labels=tokens()).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(loss.item())
    assert losses[0][-1] < 0.7 * losses[0][0], "it does not learn"
    for one in losses[1:]:
        assert all(abs(x - y) <= 0.05 * y + 0.02 for x, y in zip(one, losses[0], strict=True)), (
            one,
            losses[0],
        )


def check_generation() -> None:
    """Left-padded prompts; what is generated is the same as long as the history is."""
    mask = (
        (torch.arange(64, device=DEVICE) < torch.tensor([[64], [20], [41], [63]], device=DEVICE))
        .flip(1)
        .long()
    )
    for cache in None, "static":
        options = dict(attention_mask=mask, max_new_tokens=24, do_sample=False, cache_implementation=cache)
        options |= dict(return_dict_in_generate=True, output_logits=True)
        ours, theirs = (
            llama(name).generate(tokens(4, 64), **options) for name in ("mini_flash_attention", "sdpa")
        )
        for step, (x, y) in enumerate(zip(ours.logits, theirs.logits, strict=True)):
            alike = (ours.sequences[:, : 64 + step] == theirs.sequences[:, : 64 + step]).all(1)
            close([x[alike]], [y[alike]], 0.04) if alike.any() else None
        assert step == 23


# Speed of a training step


def steps_in_turns(compiled: bool, lengths: list[int], hidden: int = 2048, rounds: int = 5) -> None:
    transformers.register()
    ways = {  # attn_implementation, what is around the step
        "ours": ("mini_flash_attention", nullcontext),
        "hook": ("sdpa", hooked),
        "sdpa-flash": ("sdpa", lambda: sdpa_kernel(SDPBackend.FLASH_ATTENTION)),
        "sdpa-cudnn": ("sdpa", lambda: sdpa_kernel(SDPBackend.CUDNN_ATTENTION)),
    }
    for heads, heads_k, dim in (32, 8, 64), (16, 4, 128):
        for seqlen in lengths:
            x, steps = tokens(4, seqlen, 1024), {}
            for name, (implementation, _) in ways.items():
                model = llama(implementation, hidden, heads, heads_k, dim, 1024, seqlen).train()
                steps[name] = torch.compile(model) if compiled else model
            times: dict[str, list[float]] = {name: [] for name in ways}
            for _ in range(rounds + 2):
                for name, (_, around) in ways.items():
                    with around():
                        times[name].append(seconds(train, steps[name], x))
            speed = {name: 4 * seqlen / statistics.median(of[2:]) / 1e3 for name, of in times.items()}
            best = max(speed["sdpa-flash"], speed["sdpa-cudnn"])
            line = "  ".join(f"{name} {value:.1f}" for name, value in speed.items())
            ratios = f"ours / best {speed['ours'] / best:.3f}  hook / best {speed['hook'] / best:.3f}"
            case = f"step{' compiled' * compiled} {heads}/{heads_k} of {dim}, 4 x {seqlen}"
            print(f"{case}, k tokens/s: {line}  {ratios}", flush=True)
            torch._dynamo.reset()


def train(model: Any, x: Tensor) -> None:
    model(x, labels=x, use_cache=False).loss.backward()
    model.zero_grad(set_to_none=True)


@contextmanager
def hooked() -> Iterator[None]:
    sdpa.activate()
    try:
        yield
    finally:
        sdpa.restore()


def seconds(function: Callable[..., Any], *arguments: Any) -> float:
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    function(*arguments)
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


# Several GPUs


def on_rank(rank: int, world: int, folder: str, seqlen: int) -> None:
    if DEVICE == "cuda":
        torch.cuda.set_device(rank)
    store = dist.FileStore(f"{folder}/store", world)
    dist.init_process_group("nccl" if DEVICE == "cuda" else "gloo", rank=rank, world_size=world, store=store)
    generator = torch.Generator().manual_seed(0)
    shape = (1, seqlen, 16, 128)
    whole = [torch.randn(shape, generator=generator).to(DEVICE, DTYPE).requires_grad_() for _ in range(3)]
    dout = torch.randn(shape, generator=generator).to(DEVICE, DTYPE)
    attend = lambda *t: mini.flash_attn_func(*t, causal=True)  # noqa: E731
    ways = {
        "ring": (lambda *t: ring_attention(*t, causal=True), lambda x: shard(x, rank, world)),
        "ulysses": (lambda *t: ulysses(*t, causal=True), lambda x: x.chunk(world, 1)[rank]),
    }
    wanted, alone = with_gradients(attend, whole, dout), clock(lambda: with_gradients(attend, whole, dout))
    for name, (function, split) in ways.items():
        mine, its_dout = (
            [split(x).detach().contiguous().requires_grad_() for x in whole],
            split(dout).contiguous(),
        )
        error = ""
        try:
            close(with_gradients(function, mine, its_dout), [split(x) for x in wanted])
        except AssertionError as failure:
            error = str(failure)
        errors: list[str] = [""] * world
        dist.all_gather_object(errors, error)
        ms = clock(lambda f=function, m=mine, d=its_dout: with_gradients(f, m, d))
        if rank == 0:
            status = "FAIL" if any(errors) else "PASS"
            times = f"{alone:.2f} ms on one, {ms:.2f} on {world}: {alone / ms:.2f} x"
            print(status, name, f"{seqlen} tokens causal, forward + backward: {times}", *filter(None, errors))
            sys.stdout.flush()
    dist.barrier()
    os._exit(0)


def clock(function: Callable[[], Any], rounds: int = 7) -> float:
    """Milliseconds of the slowest rank, a median."""
    times = []
    for _ in range(rounds):
        dist.barrier()
        spent = torch.tensor([seconds(function)], device=DEVICE)
        dist.all_reduce(spent, dist.ReduceOp.MAX)
        times.append(spent.item() * 1e3)
    return statistics.median(times[2:])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--compiled", action="store_true", help="only the compiled training step")
    parser.add_argument("--ring", action="store_true", help="only ring and Ulysses, on all GPUs")
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=[1024, 4096, 16384], help="tokens of a sequence"
    )
    options = parser.parse_args()
    if options.ring:
        world = torch.cuda.device_count() if DEVICE == "cuda" else 2
        print(torch.__version__, f"{world} GPUs")
        with tempfile.TemporaryDirectory() as folder:
            torch.multiprocessing.spawn(
                on_rank, (world, folder, 32768 if DEVICE == "cuda" else 64), nprocs=world
            )
        return
    print(torch.__version__, torch.cuda.get_device_name() if DEVICE == "cuda" else DEVICE)
    failed = 0
    if not options.compiled:
        transformers.register()
        hook = sdpa.activate()
        checks = [check_sdpa, check_sdpa_with_dropout, check_sdpa_compiled, check_varlen_attn, check_restore]
        for check in (*checks, check_losses, check_generation):
            start = time.time()
            if check is check_losses:
                sdpa.restore()
            try:
                check(attention._registry._FLASH_ATTENTION_ACTIVE[1]) if check in checks else check()
                print(f"PASS {check.__name__} ({time.time() - start:.0f} s)", flush=True)
            except Exception as error:
                failed += 1
                print(f"FAIL {check.__name__}: {type(error).__name__} {str(error)[:300]}", flush=True)
        print("served:", dict(hook.calls))
    steps_in_turns(options.compiled, [4096] if options.compiled else options.lengths)
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
