"""Memory that outlives a call: who shares it, when it is given back, where it lies."""

import ctypes
import gc
import os
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from mini_flash_attention import flash_attn_func, flash_attn_with_kvcache
from mini_flash_attention.gpu import fast, graphs, memory


class Driver:
    """Stands in for CUDA's: streams that are captured into graphs, and user objects that graphs own."""

    def __init__(self) -> None:
        self.graph = 0  # into which all streams are captured
        self.destructors: list[tuple[int, int]] = []  # of user objects: function, argument
        self.owned: dict[int, list[int]] = {}
        self.error = 0

    def cuStreamGetCaptureInfo_v2(self, stream: int, status: Any, capture: Any, graph: Any, *_: None) -> int:
        status._obj.value, capture._obj.value, graph._obj.value = self.graph > 0, 7 * self.graph, self.graph
        return 0

    def cuUserObjectCreate(self, user_object: Any, argument: int, destroy: Any, *numbers: int) -> int:
        assert numbers == (1, 1)
        self.destructors.append((destroy.value, argument))
        user_object._obj.value = len(self.destructors)
        return self.error

    def cuGraphRetainUserObject(self, graph: int, user_object: Any, *numbers: int) -> int:
        assert numbers == (1, 1)
        self.owned.setdefault(graph, []).append(user_object.value)
        return 0

    def destroy(self, graph: int) -> None:
        for user_object in self.owned.pop(graph):
            function, argument = self.destructors[user_object - 1]
            ctypes.CFUNCTYPE(None, ctypes.c_void_p)(function)(argument)


@pytest.fixture
def driver(pretended_gpu: None, monkeypatch: pytest.MonkeyPatch) -> Driver:
    """Of a GPU on which all is captured, with three blocks in stock."""
    driver = Driver()
    monkeypatch.setattr(graphs, "_driver", lambda: driver)
    monkeypatch.setattr(fast, "is_capturing", lambda: True)
    stock = memory.Stock(torch.zeros(3 * memory.COUNTERS, dtype=torch.int32))
    monkeypatch.setattr(memory, "_stock", {0: stock})
    return driver


def counters(driver: Driver, graph: int, monkeypatch: pytest.MonkeyPatch, stream: int = 1) -> Tensor:
    """Of a decode that is captured into the graph."""
    driver.graph = graph
    monkeypatch.setattr(fast, "current_stream", lambda device: stream)
    return memory.workspace(100, 9, 0)[1]


def test_each_stream_of_a_graph_has_its_counters(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    first = counters(driver, 1, monkeypatch)
    assert memory.tile_counter(0) is counters(driver, 1, monkeypatch) is first
    all = [first, counters(driver, 1, monkeypatch, stream=2), counters(driver, 2, monkeypatch)]
    assert len({x.data_ptr() for x in all}) == 3
    assert all[1].data_ptr() - first.data_ptr() in (4 * memory.COUNTERS, -4 * memory.COUNTERS)
    assert [len(x) for x in all] == [memory.COUNTERS] * 3


def test_counters_of_graphs_that_are_gone_are_lent_again(
    driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As often as there are graphs; those of a graph that lives are not."""
    monkeypatch.setattr(fast, "allocate", lambda *like: torch.empty(like[0]))  # the stock has some for all
    alive = counters(driver, 1, monkeypatch)
    for graph in range(2, 100):
        lent = counters(driver, graph, monkeypatch)
        assert lent.dtype == torch.int32 and lent.data_ptr() != alive.data_ptr()
        if graph % 2:
            driver.destroy(graph - 1)
            driver.destroy(graph)
    assert counters(driver, 1, monkeypatch) is alive
    driver.destroy(1)
    assert len({counters(driver, graph, monkeypatch).data_ptr() for graph in (100, 101, 102)}) == 3


@pytest.mark.parametrize("why", ["all are lent", "no stock", "no user objects", "no driver"])
def test_else_each_replay_zeroes_counters_that_the_graph_holds(
    why: str, driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    if why == "all are lent":
        for graph in range(1, 4):
            counters(driver, graph, monkeypatch)
    elif why == "no stock":
        monkeypatch.setattr(memory, "_stock", {})
    elif why == "no user objects":
        driver.error = 1
    else:
        monkeypatch.setattr(graphs, "_driver", lambda: None)
    zeroed = []
    monkeypatch.setattr(Tensor, "zero_", lambda x: zeroed.append(weakref.ref(x)) or x)
    for _ in range(2):
        assert counters(driver, 4, monkeypatch).shape == (9,)
    gc.collect()
    assert [x() for x in zeroed] == [None, None]
    if why == "no user objects":
        assert len(memory._stock[0].free) == 3
        driver.error = 0
        assert len(counters(driver, 4, monkeypatch)) == memory.COUNTERS


def test_a_driver_is_not_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    for library in (nothing, lambda name: object()):  # an older driver lacks functions
        monkeypatch.setattr(ctypes, "CDLL", library)
        assert graphs._driver.__wrapped__() is None


def test_memory_is_made_outside_of_the_callers_modes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread's, as its memory pool is. An error is the caller's."""
    made, streams = [], []

    def make(size: int, dtype: torch.dtype, device: str) -> Tensor:
        assert device == "cuda:3"
        made.append(threading.get_ident())
        return torch.zeros(size, dtype=dtype)

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: streams.append(stream) or nullcontext())
    with torch.inference_mode():
        kept = memory._kept(make, 3, 5, torch.int32)
    assert not kept.is_inference() and kept.tolist() == [0] * 5
    assert made != [threading.get_ident()] and streams == ["stream of 3"]
    with pytest.raises(RuntimeError, match="out of memory"):
        memory._kept(raise_out_of_memory, 3, 5, torch.int32)


def raise_out_of_memory(*_: Any, **__: Any) -> Tensor:
    raise RuntimeError("CUDA out of memory")


# On a GPU


@pytest.fixture
def calls(gpu: torch.device) -> tuple[Callable[[], list[Tensor]], list[Tensor]]:
    """A decode whose thread blocks count, a forward that may draw its tiles, and their results."""
    q, k, v = torch.randn(3, 2, 2048, 8, 128, device=gpu, dtype=torch.bfloat16)

    def both() -> list[Tensor]:
        return [flash_attn_with_kvcache(q[:, :1], k, v, num_splits=16), flash_attn_func(q, k, v)]

    return both, both()


@pytest.fixture
def stock(gpu: torch.device, monkeypatch: pytest.MonkeyPatch) -> memory.Stock:
    """Two blocks, of which all can be seen."""
    stock = memory.Stock(torch.zeros(2 * memory.COUNTERS, dtype=torch.int32, device=gpu))
    torch.cuda.synchronize()
    monkeypatch.setitem(memory._stock, gpu.index, stock)
    return stock


def capture(call: Callable[[], list[Tensor]]) -> tuple[torch.cuda.CUDAGraph, list[Tensor]]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()
    return graph, results


def wait_until(what: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 20
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_deleted_graphs_give_their_counters_back(calls: Any, stock: memory.Stock) -> None:
    call, expected = calls
    for _ in range(20):
        before = set(stock.lent)
        graph, results = capture(call)
        (new,) = set(stock.lent) - before
        for _ in range(3):
            graph.replay()
        torch.cuda.synchronize()
        assert all(map(torch.equal, results, expected))
        block, _ = stock.lent[new]
        assert not stock.gone[block]
        del graph, results
        wait_until(lambda: stock.gone[block])  # noqa: B023
    assert not stock.counters.any()


def test_a_graph_that_runs_keeps_its_counters(calls: Any, stock: memory.Stock) -> None:
    call, _ = calls

    def slowly() -> list[Tensor]:
        torch.cuda._sleep(2_000_000_000)  # a second
        return call()

    graph, results = capture(slowly)
    ((block, _),) = stock.lent.values()
    end = torch.cuda.Event()
    graph.replay()
    end.record()
    del graph, results
    told = bool(stock.gone[block])
    assert end.query() or not told
    torch.cuda.synchronize()
    wait_until(lambda: stock.gone[block])


@pytest.mark.parametrize("blocks", [2, 0])
def test_recaptured_graphs_hold_no_more_memory(
    blocks: int, calls: Any, stock: memory.Stock, gpu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not blocks:
        monkeypatch.delitem(memory._stock, gpu.index)
    call, expected = calls
    reserved = []
    for _ in range(24):
        graph, results = capture(lambda: [call() for _ in range(4)])
        graph.replay()
        torch.cuda.synchronize()
        assert all(torch.equal(*pair) for four in results for pair in zip(four, expected, strict=True))
        del graph, results
        torch.cuda.empty_cache()
        reserved.append(torch.cuda.memory_reserved())
    assert reserved[1] == reserved[-1]


IN_A_POOL = """
import torch
from mini_flash_attention import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache
from mini_flash_attention.gpu import memory

pool = torch.cuda.MemPool()
with torch.cuda.use_mem_pool(pool), torch.inference_mode():
    q, k, v = torch.randn(3, 2, 2048, 8, 128, device="cuda", dtype=torch.bfloat16)
    lengths = torch.tensor([0, 1000, 2048], dtype=torch.int32, device="cuda")
    flash_attn_func(q, k, v)
    flash_attn_varlen_func(q[0], k[0], v[0], lengths, lengths, 1048, 1048)
    flash_attn_with_kvcache(q[:, :1], k, v, cache_seqlens=lengths[1:], num_splits=16)
torch.cuda.synchronize()
print(len(pool.snapshot()) > 0)
del q, k, v, lengths
blocks = [block for segment in pool.snapshot() for block in segment["blocks"]]
print(sum(block["state"] != "inactive" for block in blocks))
print(any(x.is_inference() for x in (*memory._tile_counters.values(), *memory._unread.values())))
"""


def test_what_is_kept_lies_outside_of_the_callers_pool(gpu: torch.device) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", IN_A_POOL]
    printed = subprocess.run(command, env=environment, check=True, text=True, stdout=subprocess.PIPE).stdout
    assert printed.split() == ["True", "0", "False"]
