"""A call that is being written, piece by piece: random sizes, tensors in random layouts, options."""

from collections.abc import Sequence
from random import Random

HEAD_DIMS = (1, 2, 7, 8, 16, 24, 32, 40, 59, 64, 64, 72, 80, 96, 111, 128, 128, 136, 192, 256)
SCORES = {"cpu": 1 << 17, "cuda": 1 << 20}  # of a call, at most: the formula stores them


class Draft:
    """Code that makes the tensors, by argument, and expressions of the numbers.

    `kind` draws what a kernel is compiled for, `random` all else.
    """

    def __init__(self, kind: Random, random: Random, device: str) -> None:
        self.kind, self.random, self.device = kind, random, device
        self.function = ""
        self.tensors: dict[str, str] = {}
        self.numbers: dict[str, str] = {}
        self.gradients: dict[str, str] = {}
        wide = ("float32", "float32", "float64") if device == "cpu" else ()
        self.dtype = kind.choice(("bfloat16", "float16", *wide))
        self.head_dim = kind.choice(HEAD_DIMS)
        self.heads_k, self.group = kind.choice((1, 2, 3)), kind.choice((1, 1, 2, 3, 4, 8))
        self.heads = self.heads_k * self.group
        self.mask = kind.choice(("full", "causal", "window", "causal window"))
        self.softcap, self.alibi = kind.random() < 0.2, kind.random() < 0.2
        self.backward, self.dropout = kind.random() < 0.6, kind.random() < 0.2
        self.deterministic = kind.random() < 0.2
        self.sinks = kind.random() < 0.2

    # Sizes

    def maybe(self, probability: float) -> bool:
        return self.random.random() < probability

    def length(self, most: int) -> int:
        """0, 1 and what is around a tile's size more often than others."""
        some = (0, 1, 2, 3, 63, 64, 65, 127, 128, 129, 256, 257)
        length = self.random.choice((*some, *(self.random.randint(0, top) for top in (8, 20, 150, 300, 300))))
        return length if length <= most else self.random.randint(0, most)

    def lengths(self, batch: int) -> tuple[list[int], list[int]]:
        """Of the queries and of the keys of each sequence; often the same ones."""
        scores = SCORES[self.device] // (1 if self.maybe(0.3) else 8)
        most = max(1, scores // max(1, batch * self.heads))
        queries, keys = [], []
        for _ in range(batch):
            n = self.length(600)
            keys.append(n if self.maybe(0.4) and n * n <= most else self.length(most // max(n, 1)))
            queries.append(n)
        return queries, keys

    # Tensors

    def floats(
        self,
        name: str,
        shape: Sequence[int],
        filled: Sequence[str] | None = None,
        written: bool = False,
        grad: bool = False,
    ) -> None:
        """Normal numbers in a random layout. `filled`: the places that are read, the others are NaN."""
        if filled is not None:
            code = f"{name} = {self.storage(shape)}\n{self.filled(name, filled)}"
        elif not written and self.maybe(0.05):
            code = f"{name} = {self.expanded(shape)}"
        else:
            code = f"{name} = {self.storage(shape)}.normal_({self.std()})"
        if not written and self.maybe(0.05):
            code += f"\n{name} = torch._neg_view({name})"
        self.tensors[name] = code + (f"\n{name}.requires_grad_()" if grad else "")

    def caches(self, shape: Sequence[int], filled: Sequence[str], written: bool) -> None:
        """k_cache and v_cache, sometimes of one storage."""
        if self.maybe(0.7):
            for name in ("k_cache", "v_cache"):
                self.floats(name, shape, filled, written)
            return
        place = self.random.randrange(len(shape))
        both = self.storage((*shape[:place], 2, *shape[place:]))
        made = f"k_cache, v_cache = {both}.unbind({place})"
        self.tensors["k_cache"] = f"{made}\n{self.filled('k_cache', filled)}"
        self.tensors["v_cache"] = self.filled("v_cache", filled)

    def filled(self, name: str, filled: Sequence[str]) -> str:
        parts = "".join(f"{name}[{part}], " for part in filled)
        return f"for part in ({parts}): part.normal_({self.std()})"

    def std(self) -> str:
        return self.random.choice(("", "", "0, 0.3", "0, 3"))

    def storage(self, shape: Sequence[int]) -> str:
        """NaN, of which `shape` is a part: dimensions in any order, each with room around it and a step."""
        order = list(range(len(shape)))
        if self.maybe(0.3):
            self.random.shuffle(order)
        whole, parts = [], []
        for size in shape:
            before, after = (self.random.choice((0, 1, 8)) if self.maybe(0.2) else 0 for _ in range(2))
            step = 2 if self.maybe(0.1) else 1
            end = before + max(0, (size - 1) * step + 1)
            whole.append(end + after)
            parts.append(":" if (before, after, step) == (0, 0, 1) else f"{before}:{end}:{step}")
        code = f"torch.full({tuple(whole[i] for i in order)}, nan, dtype=torch.{self.dtype})"
        if order != sorted(order):
            code += f".permute{tuple(order.index(i) for i in range(len(shape)))}"
        return code if set(parts) == {":"} else f"{code}[{', '.join(parts)}]"

    def expanded(self, shape: Sequence[int]) -> str:
        place = self.random.randrange(len(shape))
        one = [1 if i == place else size for i, size in enumerate(shape)]
        return f"torch.randn({tuple(one)}, dtype=torch.{self.dtype}).expand({tuple(shape)})"

    def ints(self, name: str, values: Sequence[int]) -> None:
        """int32, sometimes every other one of a tensor."""
        code = f"torch.tensor({list(values)}, dtype=torch.int32)"
        if self.maybe(0.1):
            code = f"torch.tensor({[x for value in values for x in (value, 10**9)]}, dtype=torch.int32)[::2]"
        self.tensors[name] = f"{name} = {code}"

    def gradient(self, shape: Sequence[int], lse_shape: Sequence[int], filled: str = "...") -> None:
        """dout, and dlse where the LSE is returned. `filled`: the rows of a sequence."""
        if self.backward:
            self.floats("dout", shape, None if self.maybe(0.8) else [filled])
            self.gradients["dout"] = self.tensors.pop("dout")
            if "return_attn_probs" in self.numbers and self.maybe(0.5):
                wide = "float64" if self.dtype == "float64" else "float32"
                self.gradients["dlse"] = f"dlse = torch.randn({tuple(lse_shape)}, dtype=torch.{wide})"

    # Options

    def options(self, batch: int, cache: bool = False) -> None:
        """Those that all functions share, and those of a cache or of the others."""
        numbers, random = self.numbers, self.random
        if self.maybe(0.5):
            scales = ("None", "0.0", "-0.3", "0.05", "1", f"{random.uniform(-1, 1):.2f}")
            numbers["softmax_scale"] = random.choice(scales)
        if "causal" in self.mask or self.maybe(0.2):
            numbers["causal"] = random.choice(("True", "1")) if "causal" in self.mask else "False"
        if "window" in self.mask:
            left, right = (random.choice((-1, None, 0, 1, 5, random.randint(0, 200), 1000)) for _ in range(2))
            pair = f"({left}, {right})"
            if None not in (left, right):
                pair = random.choice((pair, f"[{left}, {right}]", f"torch.tensor([{left}, {right}])"))
            numbers["window_size"] = pair
        elif self.maybe(0.2):
            numbers["window_size"] = random.choice(("(-1, -1)", "None", "(None, -1)", "[-5, -1]"))
        if self.softcap or self.maybe(0.1):
            numbers["softcap"] = random.choice(("0.5", "5", "30.0") if self.softcap else ("0.0", "-1"))
        if self.alibi:
            shape = random.choice(((self.heads,), (batch, self.heads)))
            self.tensors["alibi_slopes"] = f"alibi_slopes = torch.randn({shape}) / 10"
        if self.sinks:
            self.learned_sinks(grad=self.backward and not cache and self.maybe(0.5))
        if cache:
            if self.maybe(0.5):
                numbers["num_splits"] = str(random.choice((0, 1, 2, 5, 128)))
            if self.maybe(0.5):
                numbers["return_softmax_lse"] = random.choice(("True", "True", "False"))
            return
        if self.dropout:
            numbers["dropout_p"] = random.choice(("0.1", "0.5", "0.9", f"{0.99 * random.random():.3f}"))
        if self.deterministic:
            numbers["deterministic"] = "True"
        if self.dropout or self.maybe(0.4):
            numbers["return_attn_probs"] = "True"

    def learned_sinks(self, grad: bool) -> None:
        """Around 0, or far from it, or not there; of few heads, whose gradient in 16 bits would be luck."""
        dtype = "float32" if grad else self.random.choice(("float32", "bfloat16", "float16"))
        far = 3 if self.dtype == "float16" else 30  # where they are, out is too small for float16
        code = f"s_aux = {self.random.choice((1, 3, far))} * torch.randn({self.heads}, dtype=torch.{dtype})"
        if self.maybe(0.1):
            code += "\ns_aux[0] = -inf"
        self.tensors["s_aux"] = code + ("\ns_aux.requires_grad_()" if grad else "")

    def shape(self, *sizes: int, heads: int | None = None) -> tuple[int, ...]:
        return *sizes, self.heads if heads is None else heads, self.head_dim

    def grads(self, count: int) -> list[bool]:
        """Which of `count` inputs require a gradient: one at least, in a backward pass."""
        some = [self.maybe(0.8) for _ in range(count)]
        some[self.random.randrange(count)] = True
        return [self.backward and one for one in some]
