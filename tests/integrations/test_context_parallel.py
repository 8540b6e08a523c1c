"""Ring attention and Ulysses on 2 and 4 processes (gloo), against one process that has all tokens."""

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import mini_flash_attention as mini
from mini_flash_attention.integrations import context_parallel, sdpa
from mini_flash_attention.integrations.context_parallel import ring_attention, shard, ulysses, unshard
from tests.integrations.processes import spawn

Function = Callable[..., Tensor]


def compare(
    function: Function, whole: Function, tensors: list[Tensor], split: Callable[[Tensor], Tensor]
) -> None:
    """out and gradients of what this rank holds."""
    mine = [split(x).detach().contiguous().requires_grad_() for x in tensors]
    out, wanted = function(*mine), whole(*tensors)
    dout = torch.randn(wanted.shape)
    results = out, *torch.autograd.grad(out, mine, split(dout).contiguous())
    for x, y in zip(results, (wanted, *torch.autograd.grad(wanted, tensors, dout)), strict=True):
        torch.testing.assert_close(x, split(y), rtol=1e-4, atol=1e-4)


def make(*lead: int, heads_k: int = 2) -> list[Tensor]:
    return [torch.randn(*lead, heads, 16, requires_grad=True) for heads in (4, heads_k, heads_k)]


def check_ring(rank: int, world: int) -> None:
    windows = (7, 0), (30, 0), (3, 5), (-1, 9), (0, 0), (17, -1)
    for options in (
        dict(causal=True),
        dict(causal=False),
        dict(causal=True, softmax_scale=0.4),
        dict(causal=True, window_size=(20, 3)),
        *(dict(window_size=window) for window in windows),
    ):
        compare(
            lambda *t, o=options: ring_attention(*t, **o),
            lambda *t, o=options: mini.flash_attn_func(*t, **o),
            make(2, 48),
            lambda x: shard(x, rank, world),
        )


def check_ring_of_packed(rank: int, world: int) -> None:
    lengths = [16, 8, 40]
    starts = torch.tensor([0, *lengths]).cumsum(0).int()
    for causal in (True, False):
        compare(
            lambda *t, c=causal: ring_attention(*t, causal=c, cu_seqlens=starts // world),
            lambda *t, c=causal: mini.flash_attn_varlen_func(*t, starts, starts, 40, 40, causal=c),
            make(64),
            lambda x: torch.cat([shard(one, rank, world, dim=0) for one in x.split(lengths)]),
        )


def check_lse(rank: int, world: int) -> None:
    tensors = [x.detach() for x in make(2, 48)]
    _, lse = ring_attention(*(shard(x, rank, world) for x in tensors), causal=True, return_lse=True)
    wanted = mini.flash_attn_func(*tensors, causal=True, return_attn_probs=True)[1]
    torch.testing.assert_close(lse, shard(wanted, rank, world, dim=2))


def check_ulysses(rank: int, world: int) -> None:
    for options in ({}, dict(causal=True, window_size=(9, 0), softcap=5.0)):
        compare(
            lambda *t, o=options: ulysses(*t, **o),
            lambda *t, o=options: mini.flash_attn_func(*t, **o),
            make(2, 48),  # 2 key heads, of which 4 ranks share one each
            lambda x: x.chunk(world, 1)[rank],
        )
    with pytest.raises(ValueError, match="heads of q"):
        ulysses(*(x[:, :, :1] for x in make(2, 48)))
    each = dict(alibi_slopes=torch.tensor([0.5, 0.25, 0.1, 0.01]), s_aux=torch.tensor([3.0, -1.0, 0.0, 1.0]))
    compare(
        lambda *t: ulysses(*t, **each),
        lambda *t: mini.flash_attn_func(*t, **each),
        make(2, 48),
        lambda x: x.chunk(world, 1)[rank],
    )
    with pytest.raises(NotImplementedError, match="dropout_p"):
        ulysses(*make(2, 48), dropout_p=0.1)
    with pytest.raises(ValueError, match="causal"):
        ring_attention(*make(2, 7), causal=True)
    with pytest.raises(ValueError, match="window_size"):
        ring_attention(*make(2, 7), window_size=(3, 0))
    with pytest.raises(NotImplementedError, match="window_size"):
        ring_attention(*make(8), cu_seqlens=torch.tensor([0, 8]).int(), window_size=(3, 0))
    with pytest.raises(RuntimeError, match="second derivative"):
        tensors = make(2, 8)
        torch.autograd.grad(ring_attention(*tensors).sum(), tensors, create_graph=True)


def check_context_parallel_of_pytorch(rank: int, world: int) -> None:
    """PyTorch's own ring on our kernels, by the hook of its attention, here for the CPU's dispatch key."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.experimental._context_parallel import _attention as of_pytorch

    hook, mesh = sdpa.Hook("CPU"), init_device_mesh("cpu", (world,))
    for causal in (True, False):
        of_pytorch._cp_options.enable_load_balance = causal
        tensors = [torch.randn(2, 4, 48, 16, requires_grad=True) for _ in range(3)]

        def split(x: Tensor, causal: bool = causal) -> Tensor:
            return shard(x, rank, world, dim=2) if causal else x.chunk(world, 2)[rank]

        q, k, v = (split(x).detach().contiguous() for x in tensors)
        dout = torch.randn(2, 4, 48, 16)
        results = of_pytorch._scaled_dot_product_ring_flash_attention(mesh, q, k, v, is_causal=causal)
        out, lse, *others, _ = results
        backward = of_pytorch._scaled_dot_product_ring_flash_attention_backward
        options = *others[:4], 0.0, causal, *others[4:]
        gradients = backward(mesh, split(dout).contiguous(), q, k, v, out, lse, *options)
        wanted = torch.nn.functional.scaled_dot_product_attention(*tensors, is_causal=causal)
        wanted = wanted, *torch.autograd.grad(wanted, tensors, dout)
        for x, y in zip((out, *gradients), wanted, strict=True):
            torch.testing.assert_close(x, split(y), rtol=1e-4, atol=1e-4)
    assert hook.calls["_scaled_dot_product_flash_attention"] > 0
    assert hook.calls["_scaled_dot_product_flash_attention_backward"] > 0


def check_all(rank: int, world: int) -> None:
    check_ring(rank, world)
    check_ring_of_packed(rank, world)
    check_lse(rank, world)
    check_ulysses(rank, world)
    check_context_parallel_of_pytorch(rank, world)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.full)])
def test_against_one_process(world: int) -> None:
    spawn(world, check_all)


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_shard_and_unshard(world: int) -> None:
    x = torch.arange(96).view(2, 48)
    assert unshard([shard(x, rank, world) for rank in range(world)]).equal(x)
    with pytest.raises(ValueError, match="multiple of 2 world"):
        shard(x[:, :47], 0, world)


@pytest.mark.parametrize("world", [1, 2, 3, 5])
@pytest.mark.parametrize("packed", [False, True])
def test_every_pair_is_met_once(world: int, packed: bool) -> None:
    """With a causal mask query i meets each key up to i once, and all ranks have the same work."""
    lengths = [2 * world, 6 * world] if packed else [8 * world]
    starts = torch.tensor([0, *lengths]).cumsum(0).int()
    token = torch.cat([torch.arange(n) for n in lengths])  # its place in its sequence
    sequence = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    number = torch.arange(len(token))
    held = [torch.cat([shard(x, r, world, dim=0) for x in number.split(lengths)]) for r in range(world)]
    met, work = torch.zeros(len(token), len(token), dtype=int), []
    for rank in range(world):
        q = torch.empty(len(held[rank]), 1, 1)
        its_steps = context_parallel.steps(q, starts // world if packed else None, (None, 0), rank, world)
        before = met.sum()
        for i, (call,) in enumerate(its_steps):
            rows, columns = held[rank][call.queries.rows], held[(rank - i) % world][call.keys.rows]
            seen = sequence[rows][:, None] == sequence[columns]
            if call.right == 0:
                seen &= token[rows][:, None] >= token[columns]
            met[rows[:, None], columns] += seen
        work.append(met.sum() - before)
    assert met.equal(((sequence[:, None] == sequence) & (token[:, None] >= token)).long())
    assert len(set(map(int, work))) == 1


@pytest.mark.parametrize("world", [1, 2, 3])
def test_every_pair_in_a_window_is_met_once(world: int) -> None:
    """By calls whose diagonal ends at the bottom right, and none of which is for nothing."""
    total, half = 8 * world, 4
    token = torch.arange(total)
    held = [shard(token, rank, world, dim=0) for rank in range(world)]
    limits = (None, 0, 1, 3, 4, 5, 9, 30)
    for window in itertools.product(limits, limits):
        if window in ((None, None), (None, 0)):
            continue
        met = torch.zeros(total, total, dtype=int)
        for rank in range(world):
            its_steps = context_parallel.steps(torch.empty(2 * half, 1, 1), None, window, rank, world)
            for i, calls in enumerate(its_steps):
                for call in calls:
                    rows, columns = held[rank][call.queries.rows], held[(rank - i) % world][call.keys.rows]
                    seen = in_window(len(rows), len(columns), call.left, call.right)
                    assert seen.any()
                    met[rows[:, None], columns] += seen
        assert met.equal(in_window(total, total, *window).long())


def in_window(queries: int, keys: int, left: int | None, right: int | None) -> Tensor:
    away = torch.arange(keys) - (torch.arange(queries)[:, None] + keys - queries)
    seen = torch.ones(queries, keys, dtype=bool)
    if left is not None:
        assert left >= 0
        seen &= away >= -left
    if right is not None:
        assert right >= 0
        seen &= away <= right
    return seen
