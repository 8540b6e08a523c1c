"""How much memory a long sequence takes, forward and backward: no implementation may store S x S scores."""

import functools

import torch

from benchmark import cases, timing
from benchmark.peers import Implementations


def show(implementations: Implementations) -> None:
    """Prints the peak of each: what is allocated beyond q, k and v, the output and gradients included."""
    case = cases.square("prefill", "fwdbwd", "bf16", (1, 65536, 16, 128), causal=True)
    print(f"  {case}")
    with timing.stream("cuda"):
        inputs = case.inputs("cuda")
        dout = torch.randn_like(inputs[0], requires_grad=False)
        for name, impl in implementations.items():
            if impl.call is None:
                continue
            attention = functools.partial(impl.call, *inputs, case.causal)
            try:
                with impl.scope():
                    _peak(attention, inputs, dout)  # the first call compiles, and makes workspaces
                    peak = _peak(attention, inputs, dout)
            except Exception as failure:  # whatever a peer raises, the others go on
                print(f"  {name} fails: {type(failure).__name__}: {failure}".splitlines()[0])
                continue
            print(f"  {name:10s} {peak / 2**20:.1f} MiB", flush=True)


def _peak(attention: timing.Call, inputs: tuple[torch.Tensor, ...], dout: torch.Tensor) -> int:
    """Bytes."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.autograd.grad(attention(), inputs, dout)
    return torch.cuda.max_memory_allocated() - before
