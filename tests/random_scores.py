"""Random score_mods and mask_mods: expressions of all that is allowed, as source, over captured values.

`random_functions` makes each twice: as a user would capture, and for the oracle, which computes with
PyTorch's own operations, with the same values in float64.
"""

import math
import random
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Made(NamedTuple):
    functions: dict[str, Any]  # score_mod, mask_mod or both
    oracle: dict[str, Any]
    source: str


def random_functions(
    seed: int, batch: int, heads: int, seqlen: int, device: torch.device | str = "cpu"
) -> Made:
    """seqlen: at least that of queries and keys. For the oracle, float64 must be the default dtype."""
    rng = random.Random(seed)
    captured = _captured(seed, rng, batch, heads, seqlen, device)
    expressions, lines = Expressions(rng, seqlen), []
    roles = rng.choice((("score_mod",), ("mask_mod",), ("score_mod", "mask_mod")))
    for role in roles:
        score = role == "score_mod"
        result = expressions.score() if score else expressions.condition(3)
        lines += [f"def {role}({'score, ' * score}batch, head, q_idx, kv_idx):", f"    return {result}", ""]
    source = "\n".join(lines)
    whole = f"def make({', '.join(captured)}):\n" + "".join(f"    {line}\n" for line in lines)
    whole += f"    return {', '.join(roles)},\n"
    made = []
    wide = {name: _wide(x) for name, x in captured.items()}
    for text, values in (whole, captured), (whole.replace(".float()", ".double()"), wide):
        scope = {"torch": torch, "math": math}
        exec(text, scope)
        made.append(dict(zip(roles, scope["make"](**values), strict=True)))
    return Made(*made, source)


def _captured(
    seed: int, rng: random.Random, batch: int, heads: int, seqlen: int, device: torch.device | str
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)

    def integers(high: int, *shape: int) -> Tensor:
        dtype = rng.choice((torch.int32, torch.int64))
        return torch.randint(high, shape, generator=generator).to(device, dtype)

    def floats(*shape: int) -> Tensor:
        dtype = rng.choice((torch.float32, torch.float32, torch.float16, torch.bfloat16))
        return torch.randn(shape, generator=generator).to(device, dtype)

    return {
        "a": rng.uniform(-2, 2),
        "n": rng.randint(1, 9),
        "few": (rng.uniform(0.5, 1.5), rng.randint(2, 5)),
        "flag": rng.random() < 0.5,
        "bias": floats(heads, 2 * seqlen),
        "slopes": floats(heads),
        "cube": floats(batch, heads, seqlen).mT.contiguous().mT,
        "point": floats(),
        "ids": integers(4, batch, seqlen),
        "lengths": integers(seqlen, batch),
        "seen": (torch.rand(seqlen, seqlen, generator=generator) < 0.7).to(device),
    }


def _wide(x: Any) -> Any:
    return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x


class Expressions:
    """Each method returns source: of a tensor, unless it says otherwise."""

    def __init__(self, rng: random.Random, seqlen: int) -> None:
        self.rng, self.seqlen = rng, seqlen

    def score(self) -> str:
        x = self.real(4)
        if self.rng.random() < 0.8:
            x = f"score + {x}" if self.rng.random() < 0.5 else f"score * torch.sigmoid({x})"
        if self.rng.random() < 0.3:
            hidden = self.rng.choice(("-math.inf", 'float("-inf")', "-torch.inf"))
            x = f"torch.where({self.condition(2)}, {x}, {hidden})"
        return x

    def real(self, depth: int) -> str:
        if depth == 0 or self.rng.random() < 0.1:
            reads = (
                "bias[head, q_idx - kv_idx + {}]",
                "slopes[head]",
                "cube[batch, head, kv_idx]",
                "point + q_idx",
            )
            return self.rng.choice(("score",) * 5 + reads).format(self.seqlen - 1)
        x, y, z = self.real(depth - 1), self.real_or_number(depth - 1), self.real(depth - 1)
        return self.rng.choice(
            (
                f"({x} + {y})",
                f"({y} - {x})",
                f"({x} * torch.tanh({z}))",
                f"({x} / (1 + abs({z})))",
                f"({y} / (1.5 + {x} * {x}))",
                f"(-{x})",
                f"abs({x})",
                f"torch.abs({x})",
                f"torch.tanh({x})",
                f"torch.sigmoid({x}).square()",
                f"torch.exp(-abs({x}))",
                f"torch.log(1.25 + ({x}).abs())",
                f"torch.sqrt(0.3 + ({x}) ** 2)",
                f"torch.minimum({x}, {z})",
                f"torch.maximum({x}, {z})",
                f"({x}).clamp({self.literal(-3, -1)}, max={self.literal(1, 3)})",
                f"torch.clamp({x}, min={self.literal(-2, 0)})",
                f"torch.where({self.condition(depth - 1)}, {x}, {y})",
                f"torch.where({self.condition(depth - 1)}, {y}, {x})",
                f"({self.integer(depth - 1)} * {self.literal(-0.1, 0.1)})",
                f"({self.integer(depth - 1)}).float()",
                f"({x} if flag else {z})",
                f"({x} * {self.condition(1)} + {z})",
                f"sum({y} * i for i in (1, 2))" if "score" in y else f"({x} - {z})",
            )
        )

    def real_or_number(self, depth: int) -> str:
        """Of a tensor or of one of Python's numbers."""
        some = self.rng.random()
        return self.real(depth) if some < 0.6 else self.literal(-2, 2) if some < 0.8 else self.number()

    def number(self) -> str:
        return self.rng.choice(("a", "n", "few[0]", "few[1]", "(a * n)"))

    def literal(self, low: float, high: float) -> str:
        return repr(round(self.rng.uniform(low, high), 3))

    def integer(self, depth: int) -> str:
        if depth == 0 or self.rng.random() < 0.2:
            reads = "ids[batch, q_idx]", "ids[batch, kv_idx]", "lengths[batch]"
            return self.rng.choice(("q_idx", "kv_idx") * 3 + ("head", "batch", *reads))
        x, y, k = self.integer(depth - 1), self.integer(depth - 1), self.rng.randint(1, 9)
        return self.rng.choice(
            (
                f"({x} + {y})",
                f"({x} - {y})",
                f"({x} - n)",
                f"({k} - {x})",
                f"({x} * {k})",
                f"({x} // {k})",
                f"({x} % {k})",
                f"({x} // (n + 1))",
                f"({x} % (1 + {self.integer(0)}))",
                f"({x} % -{k})",
                f"abs({x})",
                f"torch.minimum({x}, {y})",
                f"torch.where({self.condition(depth - 1)}, {x}, {k})",
                f"({self.condition(0)}).int()",
            )
        )

    def condition(self, depth: int) -> str:
        if depth == 0:
            comparison = (
                f"({self.integer(0)} {self.comparison()} {self.integer(0)} + {self.rng.randint(-9, 9)})"
            )
            return self.rng.choice((comparison, "seen[q_idx, kv_idx]", "(q_idx % 5 != 2)"))
        x, y, k = self.condition(depth - 1), self.condition(depth - 1), self.rng.randint(2, 9)
        return self.rng.choice(
            (
                f"({x} & {y})",
                f"({x} | {y})",
                f"({x} ^ {y})",
                f"(~{x})",
                f"torch.logical_or({x}, {y})",
                f"torch.where({x}, {y}, {self.condition(0)})",
                f"({self.integer(depth)} {self.comparison()} {self.integer(depth - 1)})",
                f"({self.integer(depth)} % {k} == {self.rng.randrange(k)})",
                f"({self.integer(depth)} != {self.number()})",
                f"({self.integer(depth)} < {self.literal(0, 20)})",
            )
        )

    def comparison(self) -> str:
        return self.rng.choice(("<", "<=", ">", ">=", "==", "!="))
