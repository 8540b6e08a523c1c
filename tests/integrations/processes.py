"""Several processes (gloo, on the CPU) for a test."""

import os
import tempfile
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist


def spawn(world: int, function: Callable[..., None], *arguments: Any) -> None:
    """function(rank, world, *arguments) in each of `world` processes; it fails where one of them does."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_start, (world, folder, function, arguments), nprocs=world)


def _start(
    rank: int, world: int, folder: str, function: Callable[..., None], arguments: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", world)
    dist.init_process_group("gloo", rank=rank, world_size=world, store=store)
    try:
        torch.manual_seed(0)  # all ranks make the same whole
        function(rank, world, *arguments)
        dist.barrier()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)  # gloo's threads abort a process now and then when it ends ("terminate called without ...")
