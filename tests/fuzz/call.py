"""A call as text: a script that makes the arguments and has the call judged. What runs is what is printed."""

import os
from dataclasses import dataclass, field, replace
from unittest import mock

import torch


@dataclass(frozen=True)
class Wrong:
    """What makes a valid call an invalid one."""

    names: tuple[str, ...]  # an error must tell one of these arguments
    line: str  # the code that changes an argument


@dataclass(frozen=True)
class Call:
    """A call of a public function. Code of tensors and expressions of numbers, by argument."""

    function: str
    device: str
    seed: int  # of torch's random numbers
    tensors: dict[str, str]
    numbers: dict[str, str] = field(default_factory=dict)
    gradients: dict[str, str] = field(default_factory=dict)  # dout and dlse
    environment: dict[str, str] = field(default_factory=dict)
    wrong: Wrong | None = None

    @property
    def making(self) -> list[str]:
        """The lines that make the tensors."""
        lines = ["import torch", "from math import inf, nan"]
        if self.environment:
            lines += ["import os", f"os.environ |= {self.environment}"]
        lines.append(f"torch.manual_seed({self.seed})")
        if self.device != "cpu":
            lines.append(f"torch.set_default_device({self.device!r})")
        lines += [*self.tensors.values(), *self.gradients.values()]
        return lines if self.device == "cpu" else [*lines, "torch.set_default_device(None)"]

    @property
    def script(self) -> str:
        given = [f"{name}={name}" for name in self.tensors]
        given += [f"{name}={value}" for name, value in self.numbers.items()]
        arguments = f"arguments = dict({', '.join(given)})"
        if self.wrong is None:
            judge, judged = "check", ", ".join(["arguments", *self.gradients])
            lines = [*self.making, arguments]
        else:
            judge, judged = "refuses", f"arguments, {self.wrong.names}"
            lines = [*self.making, arguments, self.wrong.line]
        lines.append(f"from tests.fuzz.check import {judge}  # in a checkout")
        return "\n".join([*lines, f"{judge}({self.function!r}, {judged})"])

    def run(self) -> Exception | None:
        """What is wrong with the call; None: nothing."""
        with mock.patch.dict(os.environ):
            try:
                exec(compile(self.script, "<call>", "exec"), {"__name__": "call"})
            except Exception as failure:
                return failure
            finally:
                torch.set_default_device(None)
        return None

    def without(self, name: str) -> "Call":
        """The same call, an argument left out."""
        tensors, numbers, gradients = (
            {key: code for key, code in codes.items() if key != name}
            for codes in (self.tensors, self.numbers, self.gradients)
        )
        return replace(self, tensors=tensors, numbers=numbers, gradients=gradients)


def shortened(call: Call, failure: Exception) -> Call:
    """The call without the arguments that its failure does not need."""
    if "CUDA" in str(failure):  # after an illegal access every call fails
        return call
    for name in [*call.numbers, *call.gradients, *call.tensors]:
        if call.wrong is None or name not in call.wrong.names:
            shorter = call.without(name)
            if _alike(shorter.run(), failure):
                call = shorter
    return call


def _alike(one: Exception | None, other: Exception) -> bool:
    """Whether two failures are the same one, figures aside."""
    words = [[word for word in str(error).split() if word.isalpha()] for error in (one, other)]
    return type(one) is type(other) and words[0] == words[1]
