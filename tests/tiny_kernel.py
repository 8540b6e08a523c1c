"""The kernel of `tiny.TinyConfig`, with the two names that compile.py asks a kernel module for."""

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Float32
from cutlass.cute.runtime import make_fake_tensor


class Call(NamedTuple):
    mX: cute.Tensor
    scale: Float32


@cute.kernel
def kernel(config: cutlass.Constexpr, mX: cute.Tensor, scale: Float32):
    i = cute.arch.thread_idx()[0]
    rX = cute.make_rmem_tensor(config.live, Float32)
    for j in cutlass.range(config.live, unroll_full=True):
        rX[j] = mX[i + j].to(Float32)
    # All loads come first, because a store may change what a later one would load.
    for j in cutlass.range(config.live, unroll_full=True):
        mX[i - j] = (rX[j] * scale).to(mX.element_type)


@cute.jit
def launch(call: Call, config: cutlass.Constexpr, stream):
    kernel(config, call.mX, call.scale).launch(grid=(1, 1, 1), block=(128, 1, 1), stream=stream)


def fake_call(config) -> Call:
    return Call(make_fake_tensor(getattr(cutlass, config.dtype), (cute.sym_int(),), stride=(1,)), Float32(1))
