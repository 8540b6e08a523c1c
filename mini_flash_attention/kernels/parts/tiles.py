"""Tiles of rows in shared memory."""

import cutlass.cute as cute
import cutlass.utils.hopper_helpers as hopper
from cutlass.memory import SmemAllocator
from cutlass.tensor_utils import LayoutEnum


def tile_layout(dtype: type, rows: int, head_dim: int, stages: int = 1) -> cute.ComposedLayout:
    """(rows, d, stages), swizzled as ldmatrix, wgmma and TMA read it without bank conflicts."""
    return hopper.make_smem_layout_a(LayoutEnum.ROW_MAJOR, (rows, 1, head_dim), dtype, stages)


def allocate(smem: SmemAllocator, dtype: type, layout: cute.ComposedLayout) -> cute.Tensor:
    return smem.allocate_tensor(dtype, layout.outer, 1024, swizzle=layout.inner)
