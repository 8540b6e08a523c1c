"""The gradients of what a score function captures: biases of positions, slopes that are learned.

By PyTorch operations on any device, tile by tile; kernels compute the rest of the backward pass. They
recompute two of the five products of a backward pass and keep nothing else, but every step goes through
memory, so on a GPU they take several times as long as all kernels together (docs/masks.md).
"""

import math
from typing import Any, TypeGuard

import torch
from torch import Tensor

from mini_flash_attention import cpu
from mini_flash_attention.problem import Inputs, Problem

Rows = tuple[Tensor, Tensor, Tensor, Tensor | None]  # out, lse, dout, dlse
TILE_ELEMENTS = 2**24  # scores of a tile on a GPU, 64 MB: of a few alive at a time


def gradients(problem: Problem, x: Inputs, rows: Rows) -> list[Tensor | None]:
    """Of each value in x.captured; None where it needs none. rows: as `backend.backward` takes them."""
    (out, lse, dout, dlse), given = rows, x.captured
    dtype = cpu.compute_dtype(problem)
    with torch.enable_grad():
        values = [
            value.detach().to(dtype, copy=True).requires_grad_() if learns(value) else value
            for value in given
        ]
    leaves = [value for value in values if learns(value)]
    sums = [torch.zeros_like(leaf) for leaf in leaves]
    q, k, v = (y.detach() for y in x[:3])
    x = x._replace(q=q, k=k, v=v, captured=tuple(values))
    columns = out, cpu.as_column(lse), dout, None if dlse is None else cpu.as_column(dlse)
    if x.layout is None:
        add_dense(problem, x, 0, columns, leaves, sums)
    else:
        for sequence in cpu.attending(problem, x.layout):
            its_rows: Any = (None if y is None else cpu.queries_of(problem, sequence, y) for y in columns)
            add_dense(*cpu.dense_batch(problem, x, sequence), sequence.index, its_rows, leaves, sums)
    found = iter(sums)
    return [next(found).to(value.dtype) if learns(value) else None for value in given]


def learns(value: float | int | Tensor) -> TypeGuard[Tensor]:
    """Whether it needs a gradient."""
    return isinstance(value, Tensor) and value.requires_grad


def add_dense(
    problem: Problem, x: Inputs, first: int, rows: Rows, leaves: list[Tensor], sums: list[Tensor]
) -> None:
    """sums += the gradients of leaves, which x captures; as in cpu.backward_dense."""
    out, lse, dout, dlse = rows
    lse, delta = cpu.row_statistics(problem, dout, dlse, out, lse)
    tile_m, tile_n = cpu.tile_shape(problem, TILE_ELEMENTS if x.q.is_cuda else cpu.TILE_ELEMENTS)
    for n_block in range(math.ceil(problem.seqlen_k / tile_n)):
        keys = cpu.block(n_block, tile_n, problem.seqlen_k)
        gK, gV = cpu.load_keys(problem, x.k, keys), cpu.load_keys(problem, x.v, keys)
        for m_block in range(*cpu.query_blocks(n_block, tile_m, tile_n, *cpu.lengths_and_window(problem))):
            block = cpu.block(m_block, tile_m, problem.seqlen_q)
            gQ = cpu.load_rows(problem, x.q, block) * problem.softmax_scale
            gdO = cpu.load_rows(problem, dout, block) / (1 - problem.dropout_p)
            S = cpu.by_head(problem, gQ @ gK.mT)
            with torch.enable_grad():
                scores = cpu.transformed(problem, x, S, first, block, keys).x
                scores = torch.as_tensor(scores, dtype=S.dtype, device=S.device).expand(S.shape)
            acc_S = scores.detach().flatten(2, 3).flatten(0, 1).clone()
            cpu.mask(problem, acc_S, block, keys)
            acc_P = acc_S.sub_(cpu.load_rows(problem, lse, block)).exp_()
            acc_dP = gdO @ gV.mT
            if problem.dropout_p > 0:
                acc_dP.mul_(cpu.kept(problem, x.seed, first, block, keys))
            acc_dS = acc_dP.sub_(cpu.load_rows(problem, delta, block)).mul_(acc_P)
            if scores.requires_grad:
                grads = torch.autograd.grad(scores, leaves, cpu.by_head(problem, acc_dS), allow_unused=True)
                for total, grad in zip(sums, grads, strict=True):
                    if grad is not None:
                        total.add_(grad)
