"""DDP, FSDP2 and tensor parallelism on 2 processes (gloo)."""

import copy

import pytest
import torch
from torch import Tensor, nn

import mini_flash_attention as mini
from tests.integrations.processes import spawn
from tests.integrations.test_ops import model

WORLD = 2


def check_training(rank: int, world: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor
    from torch.nn.parallel import DistributedDataParallel

    def sharded(net: nn.Module) -> nn.Module:
        for block in net:
            fully_shard(block, mesh=mesh)
        return fully_shard(net, mesh=mesh)

    mesh = init_device_mesh("cpu", (world,))
    net = model().to("cpu", torch.float32)  # also where there is a GPU
    x = torch.randn(4, 19, 32, generator=torch.Generator().manual_seed(2))
    alone = copy.deepcopy(net)
    (sum(alone(part).square().sum() for part in x.chunk(world)) / world).backward()
    for wrap in DistributedDataParallel, sharded:
        for backend in None, "aot_eager":
            torch._dynamo.reset()
            wrapped = wrap(copy.deepcopy(net))
            step = torch.compile(wrapped, backend=backend) if backend else wrapped
            step(x.chunk(world)[rank]).square().sum().backward()
            for p, wanted in zip(wrapped.parameters(), alone.parameters(), strict=True):
                gradient = p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
                torch.testing.assert_close(gradient, wanted.grad, rtol=1e-4, atol=1e-4)


def check_dtensor(rank: int, world: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (world,))
    tensors = [torch.randn(2, 9, heads, 16, requires_grad=True) for heads in (4, 2, 2)]

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return mini.flash_attn_func(q, k, v, causal=True)

    mini.flash_attn_func(*tensors, causal=True).square().sum().backward()
    for backend in None, "aot_eager":
        for placement in Shard(0), Shard(2), Replicate():
            parts = [distribute_tensor(x.detach(), mesh, [placement]).requires_grad_() for x in tensors]
            function = torch.compile(attention, backend=backend, fullgraph=True) if backend else attention
            out = function(*parts)
            assert out.placements == (placement,)
            out.square().sum().backward()
            for x, y in zip(parts, tensors, strict=True):
                torch.testing.assert_close(x.grad.full_tensor(), y.grad, rtol=1e-5, atol=1e-5)
    with pytest.raises(NotImplementedError, match="dropout_p"):
        mini.flash_attn_func(*parts, dropout_p=0.5)
    with pytest.raises(NotImplementedError, match="alibi_slopes"):
        mini.flash_attn_func(*parts, alibi_slopes=torch.rand(4))
    with pytest.raises(NotImplementedError, match="s_aux"):
        mini.flash_attn_func(*parts, s_aux=torch.rand(4))
    # Three key heads cannot be halved: 6 query heads each would meet the keys of others.
    tensors = [torch.randn(2, 9, heads, 16) for heads in (12, 3, 3)]
    parts = [distribute_tensor(x, mesh, [Shard(2)]) for x in tensors]
    out, wanted = (attention(*x) for x in (parts, tensors))
    torch.testing.assert_close(out.full_tensor(), wanted, rtol=1e-5, atol=1e-5)


def check_result_on_its_way(rank: int, world: int) -> None:
    """An AsyncCollectiveTensor, which is waited for."""
    from torch.distributed._functional_collectives import AsyncCollectiveTensor, all_reduce

    q = torch.randn(2, 9, 4, 16)
    coming = all_reduce(q, "sum", torch.distributed.group.WORLD)
    assert isinstance(coming, AsyncCollectiveTensor)
    torch.testing.assert_close(mini.flash_attn_func(coming, q, q), mini.flash_attn_func(world * q, q, q))


@pytest.mark.timeout(300)
@pytest.mark.parametrize("check", [check_training, check_dtensor, check_result_on_its_way])
def test_on_two_processes(check) -> None:
    spawn(WORLD, check)
