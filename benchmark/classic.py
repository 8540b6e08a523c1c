"""The classic case seen by PyTorch's profiler, and how far the implementations lie apart."""

import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from benchmark import cases, timing
from benchmark.peers import Implementations

_CALLS = 10


def show(device: str, implementations: Implementations, traces: Path | None = None) -> None:
    """Prints a table of profiled times and three maximal differences.

    Args:
        device: "cuda" or "cpu".
        implementations: those to run, by name.
        traces: folder for one Chrome trace an implementation.
    """
    case = cases.classic(device)[0]
    q, k, v = case.inputs(device)
    print(f"  {case}, {_CALLS} calls\n")
    print("  | Implementation | CPU Time | CUDA Time |\n  |---|---|---|")
    outs = {}
    for name, impl in implementations.items():
        if impl.call is None:
            continue
        call = partial(impl.call, q, k, v, case.causal)
        try:
            with impl.scope():
                outs[name] = call()
                cpu_ms, cuda_ms = _profile(name, call, traces)
        except Exception as failure:  # whatever a peer raises, the others go on
            print(f"  {name} fails: {type(failure).__name__}: {failure}".splitlines()[0])
            continue
        cuda = "–" if device == "cpu" else f"{cuda_ms:.3f} ms"
        print(f"  | {name} | {cpu_ms:.3f} ms | {cuda} |")
    print()
    _differences(outs)


def _profile(name: str, call: timing.Call, traces: Path | None) -> tuple[float, float]:
    """Milliseconds a call that the host spends in it, and that kernels run on the GPU."""
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    # Else the profiler writes lines of its own to stderr; read at the first profile of a process.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    timing.synchronize()
    with profile(activities=activities) as profiler:
        with record_function(name):
            for _ in range(_CALLS):
                call()
        timing.synchronize()
    if traces is not None:
        traces.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(traces / f"{name}.json"))
    host, device = 0.0, 0.0  # µs of all calls
    for event in profiler.key_averages():
        if event.device_type == DeviceType.CPU and event.key == name:
            host = event.cpu_time_total
        # The named span appears on the GPU's time line too, beside the kernels that fill it.
        if event.device_type == DeviceType.CUDA and event.key != name:
            device += event.self_device_time_total
    return host / _CALLS / 1e3, device / _CALLS / 1e3


def _differences(outs: Mapping[str, torch.Tensor]) -> None:
    """`torch` is SDPA's flash backend, `flash-attn` the oldest official package that ran."""
    official = next((name for name in ("fa2", "fa3", "fa4") if name in outs), None)
    named = {"mini-flash-attn": "mini", "torch": "sdpa-flash", "flash-attn": official}
    for one, other in (
        ("mini-flash-attn", "flash-attn"),
        ("torch", "flash-attn"),
        ("torch", "mini-flash-attn"),
    ):
        if named[one] in outs and named[other] in outs:
            apart = (outs[named[one]].float() - outs[named[other]].float()).abs().max().item()
            print(f"  Max difference between {one} and {other}: {apart:.3e}")
    if official is None:
        print("  No official flash-attn package (FA2, FA3, FA4) is installed here.")
    else:
        print(f"  flash-attn is {official}; torch is scaled_dot_product_attention, flash backend.")
