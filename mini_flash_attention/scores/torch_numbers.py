"""The operations of numbers.Number on PyTorch's tensors, of the CPU backend and the oracle."""

import operator
from typing import Any

import torch
from torch import Tensor


class TorchOps:
    """Floating-point numbers are computed in `dtype`, that of the scores."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device = dtype, device

    def kind(self, a: Any) -> str:
        if not isinstance(a, Tensor):
            return type(a).__name__
        return "bool" if a.dtype == torch.bool else "float" if a.is_floating_point() else "int"

    def floating(self, a: Any) -> Tensor:
        return torch.as_tensor(a, dtype=self.dtype, device=self.device)

    def pair(self, a: Any, b: Any) -> tuple[Any, ...]:
        """Both as floats, if one is a float: PyTorch would take its default dtype for some."""
        if "float" in (self.kind(a), self.kind(b)):
            return tuple(self.floating(x) if isinstance(x, Tensor) else x for x in (a, b))
        return tuple(x.long() if isinstance(x, Tensor) and x.dtype == torch.bool else x for x in (a, b))

    def add(self, a: Any, b: Any) -> Any:
        a, b = self.pair(a, b)
        return a + b

    def sub(self, a: Any, b: Any) -> Any:
        a, b = self.pair(a, b)
        return a - b

    def mul(self, a: Any, b: Any) -> Any:
        a, b = self.pair(a, b)
        return a * b

    def floordiv(self, a: Any, b: Any) -> Any:
        a, b = self.pair(a, b)
        return a // b

    def mod(self, a: Any, b: Any) -> Any:
        a, b = self.pair(a, b)
        return a % b

    def rcp(self, a: Any) -> Any:
        return 1.0 / (a if not isinstance(a, Tensor) and a else self.floating(a))

    def abs(self, a: Any) -> Any:
        return abs(a)

    def where(self, c: Any, a: Any, b: Any) -> Any:
        if self.kind(a) == self.kind(b) == "bool":
            return torch.where(torch.as_tensor(c, device=self.device), a, b)
        make = self.floating if "float" in (self.kind(a), self.kind(b)) else torch.as_tensor
        return torch.where(torch.as_tensor(c, device=self.device), *(make(x).to(self.device) for x in (a, b)))

    def compare(self, name: str, a: Any, b: Any) -> Any:
        return getattr(operator, name)(a, b)

    def minimum(self, a: Any, b: Any) -> Any:
        return torch.minimum(*(torch.as_tensor(x, device=self.device) for x in self.pair(a, b)))

    def maximum(self, a: Any, b: Any) -> Any:
        return torch.maximum(*(torch.as_tensor(x, device=self.device) for x in self.pair(a, b)))

    def exp(self, a: Any) -> Tensor:
        return self.floating(a).exp()

    def log(self, a: Any) -> Tensor:
        return self.floating(a).log()

    def sqrt(self, a: Any) -> Tensor:
        return self.floating(a).sqrt()

    def tanh(self, a: Any) -> Tensor:
        return self.floating(a).tanh()

    def sigmoid(self, a: Any) -> Tensor:
        return self.floating(a).sigmoid()

    def load(self, tensor: Tensor, index: list[Any]) -> Tensor:
        index = [torch.as_tensor(i, device=self.device).long() for i in index]
        ends = zip(index, tensor.shape, strict=True)
        x = tensor[tuple(torch.where((i < 0) | (i >= n), n - 1, i) for i, n in ends)]
        return self.floating(x) if x.is_floating_point() else x

    def cast(self, a: Any, kind: str) -> Any:
        if kind == "float":
            return self.floating(a)
        return torch.as_tensor(a, device=self.device).to(torch.bool if kind == "bool" else torch.long)
