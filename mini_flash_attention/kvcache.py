"""flash_attn_with_kvcache behind the API: append to the cache, then attention to it."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from mini_flash_attention import cpu, cpu_cache, decode, dispatch
from mini_flash_attention.gpu import compile, config
from mini_flash_attention.plans import Like, dtype_name, empty_like, gpu_arch, like_q
from mini_flash_attention.problem import CacheUpdate, Layout, Problem

# What a kernel raises, before it does anything, if it cannot read a tensor where it lies. It checks that in
# native code, where dispatch.ready takes 1 µs.
NotInPlace = ValueError


def forward(
    problem: Problem,
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor | int | None,
    layout: Layout,
    update: CacheUpdate | None,
    alibi_slopes: Tensor | None,
    num_splits: int,
    with_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """out (batch, seqlen_q, heads_q, head_dim) and lse (batch, heads_q, seqlen_q).

    cache_seqlens counts the keys before the append, and is layout.seqused_k if a tensor; None: the whole
    cache is used. Without `with_lse` there need be no lse.
    """
    plan = attention_plan(problem, num_splits, dispatch.forced_backend())
    if plan is None:
        with torch.autocast(problem.device.type, enabled=False):
            return forward_cpu(problem, q, k_cache, v_cache, cache_seqlens, layout, update, alibi_slopes)
    keys, added = problem.seqlen_k, 0
    if cache_seqlens is not None and layout.seqused_k is None:
        keys = int(cache_seqlens)
    if update is not None:
        added = update.k.shape[1]
    ragged = dispatch.ragged_arguments(problem, layout, keys, added)
    if update is not None:
        q = append(problem, q, k_cache, v_cache, cache_seqlens, layout, ragged, update)
    if plan.simple and isinstance(plan, decode.DecodePlan):
        try:
            return plan.run(q, k_cache, v_cache, alibi_slopes, ragged, None, with_lse)
        except NotInPlace:
            pass
    return dispatch.forward_ragged(plan, problem, q, k_cache, v_cache, alibi_slopes, ragged, None, with_lse)


def forward_cpu(
    problem: Problem,
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor | int | None,
    layout: Layout,
    update: CacheUpdate | None,
    alibi_slopes: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """One sequence after the other, without splits."""
    if cache_seqlens is not None:
        added = 0
        if update is not None:
            q = cpu_cache.append(problem, q, k_cache, v_cache, cache_seqlens, layout, update)
            added = update.k.shape[1]
        layout = layout._replace(seqused_k=cpu_cache.lengths(problem, cache_seqlens) + added)
    return cpu.forward(problem, q, k_cache, v_cache, alibi_slopes, None, layout)


@functools.lru_cache(maxsize=4096)
def attention_plan(
    problem: Problem, num_splits: int, forced: str | None
) -> decode.DecodePlan | dispatch.ForwardPlan | None:
    """Decoding, or the forward kernels, where the queries are so many; None: on the CPU backend."""
    path = dispatch.choose(problem.device, forced)
    if path == "cpu":
        return None
    dispatch.check_supported(problem)
    num_sms = torch.cuda.get_device_properties(problem.device).multi_processor_count
    if num_splits > 1 or decode.pays(problem, path, num_sms):
        return decode.plan(problem, num_splits)
    return dispatch.forward_plan(problem, forced)


def append(
    problem: Problem,
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor | int,
    layout: Layout,
    ragged: tuple,
    update: CacheUpdate,
) -> Tensor:
    """cpu_cache.append, by a kernel if that can copy all in place, 16 bytes at a time."""
    nothing = 0 in (problem.batch, problem.seqlen_k, update.k.shape[1])
    if not nothing and problem.head_dim % config.ELEMENTS == 0:
        rotary = "none"
        if update.rotary_cos is not None:
            rotary = "interleaved" if update.interleaved else "halves"
        plan = append_plan(problem, rotary)
        try:
            return plan.run(q, k_cache, v_cache, ragged, update)
        except NotInPlace:
            pass
    return cpu_cache.append(problem, q, k_cache, v_cache, cache_seqlens, layout, update)


class AppendPlan(NamedTuple):
    """The kernel that appends, for all calls of one problem."""

    launch: Callable
    device: int
    q: Like
    advance: int  # whether each query is rotated to a position of its own

    def run(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        ragged: tuple,
        update: CacheUpdate,
    ) -> Tensor:
        """q, rotated as the update says."""
        if torch._C._cuda_getDevice() != self.device:
            with torch.cuda.device(self.device):
                return self.run(q, k_cache, v_cache, ragged, update)
        if update.rotary_cos is None:
            self.launch((update.k, update.v, k_cache, v_cache, None, None, None, self.advance, ragged))
            return q
        out, rotary = empty_like(q, self.q), (update.rotary_cos, update.rotary_sin)
        self.launch((update.k, update.v, k_cache, v_cache, q, out, rotary, self.advance, ragged))
        return out


@functools.lru_cache(maxsize=4096)
def append_plan(problem: Problem, rotary: str) -> AppendPlan:
    device = problem.device.index
    row = config.KvAppend(gpu_arch(device), dtype_name(problem), rotary, int(problem.page_size > 0))
    kernel = compile.get(row)
    advance = problem.window_left is not None or problem.window_right is not None
    return AppendPlan(kernel, device, like_q(problem), int(advance))
