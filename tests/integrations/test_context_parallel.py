"""Ring and Ulysses on 2 and 4 processes (gloo), against one that has all tokens; DDP, FSDP2, DTensor on 2."""

import os
import tempfile
import traceback

import pytest
import torch
import torch.distributed as dist

import mini_flash_attention as mini
from mini_flash_attention.integrations import context_parallel as ring
from mini_flash_attention.integrations import sdpa


def spawn(world, function, *args):
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(start, (world, folder, function, args), nprocs=world)


def start(rank, world, folder, function, args):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", rank=rank, world_size=world, store=dist.FileStore(f"{folder}/store", world)
    )
    try:
        torch.manual_seed(0)  # all ranks make the same whole
        function(rank, world, *args)
        dist.barrier()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)  # gloo's threads abort a process now and then when it ends ("terminate called without ...")


def check(part, whole, split, dout_whole):
    """part, whole: (function, tensors); out and gradients of what this rank holds."""
    results = []
    for (function, tensors), dout in (part, split(dout_whole)), (whole, dout_whole):
        out = function(*tensors)
        results.append([out, *torch.autograd.grad(out, tensors, dout)])
    for x, y in zip(*results, strict=True):
        torch.testing.assert_close(x, split(y), rtol=1e-4, atol=1e-4)


def make(*shapes):
    return [torch.randn(shape, requires_grad=True) for shape in shapes]


def mine(tensors, split):
    return [split(x).detach().requires_grad_() for x in tensors]


def dense(rank, world, causal, scale):
    tensors = make((2, 48, 4, 16), (2, 48, 2, 16), (2, 48, 2, 16))
    split = lambda x: ring.shard(x, rank, world)  # noqa: E731
    options = dict(causal=causal, softmax_scale=scale)
    whole = (lambda *t: mini.flash_attn_func(*t, **options), tensors)
    check(
        (lambda *t: ring.ring_attention(*t, **options), mine(tensors, split)),
        whole,
        split,
        torch.randn(2, 48, 4, 16),
    )


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("causal, scale", [(False, None), (True, None), (True, 0.4)])
def test_ring(world, causal, scale):
    spawn(world, dense, causal, scale)


def packed(rank, world, causal):
    lengths = [16, 8, 40]
    tensors = make((64, 4, 16), (64, 2, 16), (64, 2, 16))
    split = lambda x: torch.cat([ring.shard(s, rank, world, dim=0) for s in x.split(lengths)])  # noqa: E731
    starts = torch.tensor([0, *lengths]).cumsum(0).int()
    whole = (lambda *t: mini.flash_attn_varlen_func(*t, starts, starts, 40, 40, causal=causal), tensors)
    part = (
        lambda *t: ring.ring_attention(*t, causal=causal, cu_seqlens=starts // world),
        mine(tensors, split),
    )
    check(part, whole, split, torch.randn(64, 4, 16))


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("causal", [False, True])
def test_ring_packed(world, causal):
    spawn(world, packed, causal)


def exchanged(rank, world, options):
    tensors = make((2, 48, 4, 16), (2, 48, 2, 16), (2, 48, 2, 16))
    split = lambda x: x.chunk(world, 1)[rank]  # noqa: E731
    whole = (lambda *t: mini.flash_attn_func(*t, **options), tensors)
    check(
        (lambda *t: ring.ulysses(*t, **options), mine(tensors, split)),
        whole,
        split,
        torch.randn(2, 48, 4, 16),
    )


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize(
    "options", [{}, dict(causal=True), dict(causal=True, window_size=(9, 0), softcap=5.0)], ids=str
)
def test_ulysses(world, options):
    spawn(world, exchanged, options)


def of_pytorch(rank, world, causal):
    """PyTorch's own ring, on our kernels by way of the SDPA hook (here for the CPU's dispatch key)."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.experimental._context_parallel import _attention as cp

    hook = sdpa.Hook("CPU")
    cp._cp_options.enable_load_balance = causal
    mesh = init_device_mesh("cpu", (world,))
    tensors = make((2, 4, 48, 16), (2, 4, 48, 16), (2, 4, 48, 16))
    split = lambda x: ring.shard(x, rank, world, dim=2) if causal else x.chunk(world, 2)[rank]  # noqa: E731
    q, k, v = (split(x).detach().contiguous() for x in tensors)
    dout = torch.randn(2, 4, 48, 16)
    out, lse, *others = cp._scaled_dot_product_ring_flash_attention(mesh, q, k, v, is_causal=causal)
    cu_q, cu_k, max_q, max_k, seed, offset, _ = others
    gradients = cp._scaled_dot_product_ring_flash_attention_backward(
        mesh, split(dout).contiguous(), q, k, v, out, lse, cu_q, cu_k, max_q, max_k, 0.0, causal, seed, offset
    )
    wanted = torch.nn.functional.scaled_dot_product_attention(*tensors, is_causal=causal)
    grads = torch.autograd.grad(wanted, tensors, dout)
    assert hook.calls["_scaled_dot_product_flash_attention"] > 0
    assert hook.calls["_scaled_dot_product_flash_attention_backward"] > 0
    for x, y in zip((out, *gradients), (wanted, *grads), strict=True):
        torch.testing.assert_close(x, split(y), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("causal", [False, True])
def test_context_parallel_of_pytorch(world, causal):
    spawn(world, of_pytorch, causal)
