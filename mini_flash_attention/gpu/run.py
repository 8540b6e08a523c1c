"""A call on the GPU: plans meet tensors. Each function runs with the plan's device as the current one."""

import math

import torch
from torch import Tensor

from mini_flash_attention import kv_append
from mini_flash_attention.gpu import fast, inputs
from mini_flash_attention.gpu.plans import AppendPlan, BackwardPlan, DecodePlan, ForwardPlan
from mini_flash_attention.kernels.calls import Backward, Ragged, record
from mini_flash_attention.problem import CacheUpdate, Inputs, Layout, Maybe, Problem

LOG2_E, LN_2 = math.log2(math.e), math.log(2)

AttentionPlan = ForwardPlan | DecodePlan
DENSE = Layout()  # every sequence has a row of k, and fills it


def forward(
    plan: AttentionPlan, problem: Problem, x: Inputs, out: Tensor | None, with_lse: bool
) -> tuple[Tensor, Tensor | Maybe]:
    """backend.forward. Rows of q that are in no sequence are 0, their LSE -inf."""
    layout = x.layout
    if layout is None and type(plan) is DecodePlan:
        layout = DENSE
    ragged = None if layout is None else inputs.ragged(problem, layout, longest=problem.tiled_for)
    return attend(plan, problem, x, ragged, out, with_lse)


def with_cache(
    plan: AttentionPlan,
    append_plan: AppendPlan | None,
    problem: Problem,
    x: Inputs,
    update: CacheUpdate | None,
    with_lse: bool,
) -> tuple[Tensor, Tensor | Maybe]:
    """backend.with_cache. append_plan: None where the kernel cannot append."""
    ragged = inputs.ragged(problem, x.layout, 0 if update is None else update.added)
    if update is not None:
        x = append(append_plan, problem, x, update, ragged)
    return attend(plan, problem, x, ragged, None, with_lse)


def attend(
    plan: AttentionPlan,
    problem: Problem,
    x: Inputs,
    ragged: Ragged | None,
    out: Tensor | None,
    with_lse: bool,
) -> tuple[Tensor, Tensor | Maybe]:
    """Without a copy where the kernel takes what the caller has, else from what it can read."""
    q, k, v = x[:3]
    # A negative bit is in no memory, where kernels look. To ask takes 0.03 µs each.
    negated = q.is_neg() or k.is_neg() or v.is_neg()
    if plan.results.direct and out is None and not negated:
        try:
            return launch(plan, problem, x, ragged, None, with_lse)
        except ValueError:
            if inputs.in_place(q, k, v):
                raise  # it was refused for another reason
    x, result = as_batches(problem, x), out
    if problem.packed_q and out is not None:
        result = out.unsqueeze(0)
    if plan.launch is None:
        done, lse = nothing(problem, x)
    else:
        q, k, v = inputs.readable(problem, inputs.signed(x.q, plan.results.sign), x.k, x.v)
        usable = result is not None and plan.results.whole and inputs.in_place(result)
        x = record(Inputs, (q, k, v, *x[3:]))
        done, lse = launch(plan, problem, x, ragged, result if usable else None, with_lse)
        if not plan.results.whole:
            done = done[..., : problem.head_dim].contiguous()
    if result is not None and done is result:
        inputs.written(result)
    elif result is not None:
        result.copy_(done)
    if problem.packed_q and with_lse:
        lse = lse.squeeze(0)
    if out is not None:
        return out, lse
    return done.squeeze(0) if problem.packed_q else done, lse


def as_batches(problem: Problem, x: Inputs) -> Inputs:
    """Packed tensors as batches of one, which is how kernels take them."""
    q, k, v = x[:3]
    if problem.packed_q:
        q = q.unsqueeze(0)
    if problem.packed_k:
        k, v = k.unsqueeze(0), v.unsqueeze(0)
    return record(Inputs, (q, k, v, *x[3:]))


def launch(
    plan: AttentionPlan,
    problem: Problem,
    x: Inputs,
    ragged: Ragged | None,
    out: Tensor | None,
    with_lse: bool,
) -> tuple[Tensor, Tensor | Maybe]:
    """The kernel, into `out` if given. ValueError: it cannot read a tensor; it has done nothing then."""
    q, k, v = x[:3]
    results = plan.results
    if out is None:
        out = empty_like(q, results.out)
    lse = results.unread_lse
    if with_lse or lse is None:
        lse = fast.allocate(*results.lse)
    score = inputs.score(plan.score, x, problem.batch)
    sinks = None if x.s_aux is None else inputs.sinks(x.s_aux)
    more = (inputs.blocks(problem, x),) if x.block_mask is not None else ()  # a plan that decodes has none
    plan.launch(*plan.call((q, k, v, out, lse), score, ragged, x.seed, sinks, *more))
    return out, lse if with_lse else None


def empty_like(x: Tensor, contiguous: fast.Like) -> Tensor:
    """torch.empty_like; contiguous: what x is like, if it is contiguous."""
    return fast.allocate(*contiguous) if x.is_contiguous() else torch.empty_like(x)


def nothing(problem: Problem, x: Inputs) -> tuple[Tensor, Tensor]:
    """No keys (or no queries): out 0, LSE -inf, or the sink where a row is in a sequence."""
    batch, seqlen_q, heads, _ = x.q.shape
    lse = x.q.new_full((batch, heads, seqlen_q), -torch.inf, dtype=torch.float32)
    if x.s_aux is not None:
        sinks = (x.s_aux.float() * LOG2_E * LN_2).unsqueeze(-1)  # with the kernels' roundings
        used: int | Tensor = seqlen_q
        if problem.packed_q:
            used = x.layout.cu_seqlens_q[-1]
        rows = torch.arange(seqlen_q, device=lse.device)
        lse = torch.where(rows < used, sinks, lse)
    return torch.zeros_like(x.q), lse


def backward(
    plan: BackwardPlan,
    problem: Problem,
    x: Inputs,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dlse: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """backend.backward."""
    if plan.launch is None:
        return torch.zeros_like(x.q), torch.zeros_like(x.k), torch.zeros_like(x.v)
    x = as_batches(problem, x)
    if problem.packed_q:
        out, lse, dout = out.unsqueeze(0), lse.unsqueeze(0), dout.unsqueeze(0)
        dlse = None if dlse is None else dlse.unsqueeze(0)
    q = inputs.signed(x.q, plan.sign)
    *qkv, out, dout = inputs.readable(problem, q, x.k, x.v, out, dout)
    rows = out, lse, dout, dlse
    dq, dk, dv = launch_backward(plan, problem, record(Inputs, (*qkv, *x[3:])), rows)
    dq = inputs.signed(dq, plan.sign)
    if problem.packed_q:
        dq = dq.squeeze(0)
    if problem.packed_k:
        dk, dv = dk.squeeze(0), dv.squeeze(0)
    size = problem.head_dim
    return dq[..., :size], dk[..., :size], dv[..., :size]


def launch_backward(
    plan: BackwardPlan, problem: Problem, x: Inputs, rows: tuple[Tensor, Tensor, Tensor, Tensor | None]
) -> tuple[Tensor, Tensor, Tensor]:
    """The kernels, on tensors that they can read. rows: out, lse, dout, dlse."""
    out, lse, dout, dlse = rows
    dq, dk, dv = (torch.empty_like(y, memory_format=torch.contiguous_format) for y in x[:3])
    space = plan.workspace
    stats, dq_acc, dkv_acc = (lse.new_empty(shape) for shape in (space.stats, space.dq_acc, space.dkv_acc))
    turns, key_turns = (lse.new_empty(shape, dtype=torch.int32) for shape in (space.turns, space.key_turns))
    left, right = plan.window
    call = Backward(
        *x[:3],
        out,
        dout,
        lse,
        lse if dlse is None else dlse.resolve_neg().contiguous(),
        stats,
        dq_acc,
        dq,
        dk,
        dv,
        inputs.score(plan.score, x, problem.batch),
        int(dlse is not None),
        left,
        right,
        None if x.layout is None else inputs.ragged(problem, x.layout),
        inputs.dropout(x.seed, plan.dropout_p) if plan.dropout_p else None,
        turns,
        plan.heads_per_tile,
        dkv_acc,
        key_turns,
        inputs.blocks(problem, x, of_keys=True) if plan.sparse else None,
        plan.num_sms,
    )
    plan.launch(*call)
    return dq, dk, dv


def append(
    plan: AppendPlan | None, problem: Problem, x: Inputs, update: CacheUpdate, ragged: Ragged
) -> Inputs:
    """kv_append.append, by a kernel if that can copy all in place. Of the result, only q counts."""
    q, k, v = x[:3]
    negated = q.is_neg() or k.is_neg() or v.is_neg() or update.k.is_neg() or update.v.is_neg()
    if plan is not None and not negated:
        out = None if update.rotary_cos is None else empty_like(q, plan.q)
        try:
            plan.launch(*plan.call(q, out, k, v, update, ragged))
        except ValueError:
            rotated = () if out is None else (q, out)
            if inputs.in_place(update.k, update.v, k, v, *rotated):  # refused for another reason
                raise
        else:
            inputs.written(k, v)
            return x if out is None else x._replace(q=out)
    return kv_append.append(problem, x, update)
