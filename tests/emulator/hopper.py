"""Hopper's asynchronous machinery: mbarriers, TMA, bulk copies, wgmma.

Whatever is asynchronous happens as late as it may. A TMA load arrives when no thread can go on without it.
What a store, a reduction or wgmma reads from shared memory counts as being read until the wait for it.
Accesses of TMA and wgmma go through the "async proxy": between a thread's store to shared memory and such a
read of it there must be a fence.proxy.async, beside the order of barriers.
"""

import functools
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from emulator import ptx
from emulator.alu import Step, half_to_f32
from emulator.memory import DEADLOCK, RACE, SHARED_BASE, WORD, Fault
from emulator.operands import address, elements, reader, writer

if TYPE_CHECKING:
    from emulator.block import Block

NOTHING = {"setmaxnreg", "griddepcontrol", "prefetch"}


def waits(instruction: ptx.Instruction) -> bool:
    return instruction.opcode[0] == "mbarrier" and instruction.opcode[1] in ("try_wait", "test_wait")


def compile(instruction: ptx.Instruction) -> Step | None:
    name, *rest = instruction.opcode
    if instruction.opcode == ("griddepcontrol", "wait"):
        return lambda block: block.wait_for_launches()
    if name in NOTHING:
        return lambda block: None
    if name == "mbarrier":
        return _mbarrier(instruction)
    if name == "fence":
        return _fence
    if name == "wgmma":
        return _wgmma(instruction)
    if name == "cp" and "bulk" in rest:
        return _bulk(instruction)
    return None


def _fence(block: "Block") -> None:
    """fence.proxy.async and fence.mbarrier_init: TMA and wgmma see what these threads have written."""
    block.clocks.fence_proxy(block.threads)


# Barriers in shared memory


class MBarrier:
    """Counts arrivals and bytes; its phase ends when none of either is missing, and the next begins."""

    def __init__(self, block: "Block", count: int, number: int) -> None:
        self.number = number  # of the block's mbarriers
        self._block, self._expected = block, count
        self._missing, self._bytes, self.phase = count, 0, 0
        self._arrived = np.zeros(
            block.clocks.known[:, 0].shape, np.int32
        )  # what those know who arrived in this phase
        self.known = np.zeros_like(self._arrived)  # and in those before
        thread = block.threads[:1]
        self._initialised = int(thread[0]), int(block.clocks.now(thread)[0])
        block.clocks.stir(thread)

    def use(self, threads: NDArray, proxy: int = 0) -> "MBarrier":
        thread, clock = self._initialised
        late = self._block.clocks.known[proxy, threads, thread] < clock
        if late.any():
            missing = "a fence" if proxy else "a barrier"
            raise Fault(RACE, f"thread {threads[late][0]} uses an mbarrier, no {missing} after its init")
        return self

    def arrive(self, thread: NDArray, count: int, size: int) -> None:
        """By a thread (1), which also announces `size` bytes."""
        self._missing -= count
        self._bytes += size
        if self._missing < 0:
            raise Fault(DEADLOCK, f"more arrivals at an mbarrier than its {self._expected}")
        self._arrived = np.maximum(self._arrived, self._block.clocks.release(thread))
        self._turn()

    def complete(self, size: int, known: NDArray) -> None:
        """`size` bytes have arrived."""
        self._bytes -= size
        self._arrived = np.maximum(self._arrived, known)
        self._turn()

    def _turn(self) -> None:
        if not self._missing and not self._bytes:
            self.phase ^= 1
            self._missing = self._expected
            self.known = np.maximum(self.known, self._arrived)
            self._arrived = np.zeros_like(self.known)
            self._block.engine.wake(self)


def _mbarrier(instruction: ptx.Instruction) -> Step:
    operation = instruction.opcode[1]
    if operation == "init":
        at, count = address(instruction.operands[0], "u32"), reader(instruction.operands[1], "u32")

        def initialise(block: "Block") -> None:
            for place in np.unique(at(block)):
                barriers = block.engine.barriers
                barriers[int(place)] = MBarrier(block, int(count(block)[0]), len(barriers))

        return initialise
    if operation == "arrive":
        return _arrive(instruction)
    if waits(instruction):
        return _wait(instruction)
    raise NotImplementedError(instruction.text)


def _arrive(instruction: ptx.Instruction) -> Step:
    """mbarrier.arrive[.expect_tx] state, [barrier][, count or bytes]"""
    _, barrier, *rest = instruction.operands
    at, number = address(barrier, "u32"), reader(rest[0], "u32") if rest else None
    announces = "expect_tx" in instruction.opcode

    def arrive(block: "Block") -> None:
        places = at(block)
        numbers = np.broadcast_to(number(block) if number else np.uint32(1), places.shape)
        for thread, place, n in zip(block.threads, places, numbers, strict=True):
            mbarrier = block.engine.barrier(place).use(np.array([thread]))
            mbarrier.arrive(np.array([thread]), *((1, int(n)) if announces else (int(n), 0)))

    return arrive


def _wait(instruction: ptx.Instruction) -> Step:
    """mbarrier.try_wait.parity p, [barrier], parity: until the phase of this parity is over."""
    destination, barrier, parity, *_ = instruction.operands
    write, at, parity = writer(destination, "pred"), address(barrier, "u32"), reader(parity, "u32")

    def wait(block: "Block") -> None:
        places, parities = at(block), np.broadcast_to(parity(block), (block.count,))
        threads, here = block.threads, int(block.counters[block.threads[0]]) - 1
        for place in np.unique(places):
            mine = places == place
            mbarrier = block.engine.barrier(place).use(threads[mine])
            over = mbarrier.phase != parities[mine]
            if over.any():
                block.clocks.acquire(threads[mine][over], mbarrier.known)
                block.choose(threads[mine][over])
                write(block, np.array([True]))
            if not over.all():
                block.engine.sleep(mbarrier, threads[mine][~over], here)
        block.choose(threads)

    return wait


# Copies


class TensorMap(NamedTuple):
    """What the host tells the hardware of a tensor, in 128 bytes; dimension 0 is contiguous."""

    base: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]  # bytes
    box: tuple[int, ...]
    element: int  # bytes
    swizzle: int  # 0: none; 1, 2, 3: within 32, 64, 128 bytes


@functools.lru_cache(maxsize=64)
def tensor_map(content: bytes) -> TensorMap:
    """Reads the bits, whose places were found by comparing the maps of known tensors."""
    words = np.frombuffer(content, np.uint32)
    kind, rank = int(words[2]), (int(words[2]) >> 4 & 7) + 1
    element = {6: 2, 10: 2, 7: 4}[kind >> 7 & 15]  # f16, bf16, f32
    sizes = tuple(int(size) + 1 for size in words[8 : 8 + rank])
    strides = (element, *(int(stride) * 16 for stride in words[3 : 3 + rank - 1]))
    box = tuple(edge + 1 for edge in content[55 : 55 + rank])
    return TensorMap(int(words[0]) | int(words[1]) << 32, sizes, strides, box, element, kind >> 13 & 3)


def swizzled(addresses: NDArray, mode: int) -> NDArray:
    """Exchanges 16-byte chunks: the last `mode` bits of their number ^= those of the 128-byte row's."""
    return addresses ^ (addresses >> 7 & (1 << mode) - 1) << 4


def _box(block: "Block", box: TensorMap, first: list[int], shared: int) -> tuple[NDArray, NDArray, NDArray]:
    """Of each word of a box: its address in the tensor, whether it is in it, its place in shared memory."""
    axes = [np.arange(edge) for edge in box.box]
    axes[0] = np.arange(0, box.box[0], WORD // box.element)
    grid = np.meshgrid(*axes[::-1], indexing="ij")[::-1]  # dimension 0 runs fastest
    index = [start + offsets.reshape(-1) for start, offsets in zip(first, grid, strict=True)]
    inside = np.logical_and.reduce([(i >= 0) & (i < size) for i, size in zip(index, box.sizes, strict=True)])
    addresses = box.base + sum(i * stride for i, stride in zip(index, box.strides, strict=True))
    linear = shared + np.arange(len(addresses)) * WORD
    places = block.shared.places(swizzled(linear, box.swizzle), WORD)
    return addresses, inside, places[:, 0]


def _bulk(instruction: ptx.Instruction) -> Step:
    """cp.async.bulk and cp.reduce.async.bulk, of a tensor's box or of adjacent bytes, in either direction."""
    opcode = [part.split("::")[0] for part in instruction.opcode]
    if "commit_group" in opcode:
        return lambda block: block.engine.bulk.commit(block.threads)
    if "wait_group" in opcode:
        left, complete = instruction.operands[0].bits, "read" not in opcode
        return lambda block: block.engine.bulk.wait(block.threads, left, complete)
    if "prefetch" in opcode:
        return lambda block: None
    loads = opcode.index("shared") < opcode.index("global")
    if "tensor" in opcode:
        return _load_box(instruction) if loads else _store_box(instruction)
    if loads:
        return _load_bytes(instruction)
    return _store_bytes(instruction, "reduce" in opcode)


def _each_thread(step: Step) -> Step:
    """One thread behind the other: usually a warp has elected one."""

    def one_by_one(block: "Block") -> None:
        threads = block.threads
        for i in range(len(threads)):
            block.choose(threads[i : i + 1])
            step(block)
        block.choose(threads)

    return one_by_one


def _load_box(instruction: ptx.Instruction) -> Step:
    """[shared], [map, {coordinates}], [barrier]"""
    to, source, barrier, *_ = instruction.operands
    coordinates = [reader(c, "s32") for c in source.coordinates]
    to, source, barrier = address(to, "u32"), address(source), address(barrier, "u32")

    def load(block: "Block") -> None:
        box = tensor_map(bytes(block.memory.bytes(int(source(block)[0]), 128)))
        first = [int(c(block)[0]) for c in coordinates]
        addresses, inside, places = _box(block, box, first, int(to(block)[0]))
        data, written = np.zeros(len(places), np.uint32), np.ones(len(places), bool)
        if inside.any():
            copied, known = block.memory.copy(addresses[inside].astype(np.uint64), WORD)
            data[inside], written[inside] = copied[:, 0], known[:, 0]
        block.engine.begin_load(block.threads, places, data, written, barrier(block)[0])

    return _each_thread(load)


def _load_bytes(instruction: ptx.Instruction) -> Step:
    """[shared], [global], bytes, [barrier]"""
    to, source, size, barrier = instruction.operands
    to, source, barrier = address(to, "u32"), address(source), address(barrier, "u32")
    size = reader(size, "u32")

    def load(block: "Block") -> None:
        words = np.arange(0, int(size(block)[0]), WORD)
        places = block.shared.places(to(block)[0] + words, WORD)[:, 0]
        copied, known = block.memory.copy((source(block)[0] + words).astype(np.uint64), WORD)
        block.engine.begin_load(block.threads, places, copied[:, 0], known[:, 0], barrier(block)[0])

    return _each_thread(load)


def _store_box(instruction: ptx.Instruction) -> Step:
    """[map, {coordinates}], [shared]"""
    to, source, *_ = instruction.operands
    coordinates = [reader(c, "s32") for c in to.coordinates]
    to, source = address(to), address(source, "u32")

    def store(block: "Block") -> None:
        box = tensor_map(bytes(block.memory.bytes(int(to(block)[0]), 128)))
        first = [int(c(block)[0]) for c in coordinates]
        addresses, inside, places = _box(block, box, first, int(source(block)[0]))
        addresses = addresses[inside].astype(np.uint64)

        def write(words: NDArray) -> None:
            block.memory.store(addresses, words[inside][:, None])

        block.engine.bulk.begin(block.threads, places, write)

    return _each_thread(store)


def _store_bytes(instruction: ptx.Instruction, reduces: bool) -> Step:
    """[global], [shared], bytes; cp.reduce adds float32"""
    assert not reduces or instruction.opcode[-2:] == ("add", "f32"), instruction.text
    to, source, size = instruction.operands
    to, source, size = address(to), address(source, "u32"), reader(size, "u32")

    def store(block: "Block") -> None:
        words = np.arange(0, int(size(block)[0]), WORD)
        places = block.shared.places(source(block)[0] + words, WORD)[:, 0]
        addresses = (to(block)[0] + words).astype(np.uint64)

        def write(values: NDArray) -> None:
            if reduces:
                old = np.ascontiguousarray(block.memory.load(addresses, WORD)).view(np.float32)[:, 0]
                values = (old + values.view(np.float32)).view(np.uint32)
            block.memory.store(addresses, values[:, None])

        block.engine.bulk.begin(block.threads, places, write)

    return _each_thread(store)


@dataclass
class Load:
    places: NDArray
    data: NDArray
    written: NDArray
    barrier: MBarrier


class Engine:
    """What a block has under way, and its mbarriers."""

    def __init__(self, block: "Block") -> None:
        self._block = block
        self.barriers: dict[int, MBarrier] = {}
        self.bulk = Reads(block)
        self.wgmma = Reads(block)
        self.accumulators = Accumulators(block)
        self._loads: deque[Load] = deque()
        self._asleep: dict[int, list[NDArray]] = {}

    def barrier(self, place: int) -> MBarrier:
        if int(place) not in self.barriers:
            raise Fault(RACE, f"no mbarrier at byte {place - SHARED_BASE} of shared memory")
        return self.barriers[int(place)]

    def sleep(self, barrier: MBarrier, threads: NDArray, place: int) -> None:
        """Until the barrier turns; then they execute the basic block `place` again."""
        self._block.sleep(threads, place)
        self._asleep.setdefault(barrier.number, []).append(threads)

    def wake(self, barrier: MBarrier) -> None:
        for threads in self._asleep.pop(barrier.number, []):
            self._block.wake(threads)

    def begin_load(
        self, thread: NDArray, places: NDArray, data: NDArray, written: NDArray, barrier: int
    ) -> None:
        """barrier: the address of the mbarrier that learns of the load's end."""
        shared, barrier = self._block.shared, self.barrier(barrier).use(thread, proxy=1)
        shared.check_write(thread[:, None], places[None], same=False, proxy=1)
        shared.arriving[places] += 1
        self._loads.append(Load(places, data, written, barrier))

    def land(self) -> bool:
        """The oldest load arrives; False if there is none."""
        if not self._loads:
            return False
        load, shared = self._loads.popleft(), self._block.shared
        shared.arriving[load.places] -= 1
        shared.views[WORD][load.places] = load.data
        known = shared.note_copied(load.places, load.written, load.barrier.number)
        load.barrier.complete(WORD * len(load.places), known)
        return True

    def finish(self) -> None:
        """The block ends."""
        if self._loads:
            raise Fault(RACE, "the block ends before a load has arrived in its shared memory")
        self.wgmma.finish()
        self.bulk.finish()


@dataclass
class Read:
    thread: NDArray  # (1)
    places: NDArray
    group: int | None  # the thread's; None: not committed
    write: Callable | None  # takes the words, once they need not be read any more
    words: NDArray
    is_read: bool = False


class Reads:
    """Asynchronous reads of shared memory, in groups that a thread commits and waits for."""

    def __init__(self, block: "Block") -> None:
        self._block = block
        self._reads: list[Read] = []
        self._committed = np.zeros(block.size, np.int64)

    def begin(self, threads: NDArray, places: NDArray, write: Callable | None = None) -> None:
        """Each of the threads reads all these places."""
        shared = self._block.shared
        shared.note_read(threads[:, None], places[None], proxy=1)
        shared.leaving[places] += len(threads)
        words = shared.views[WORD][places]
        self._reads += [Read(threads[i : i + 1], places, None, write, words) for i in range(len(threads))]

    def commit(self, threads: NDArray) -> None:
        for read in self._reads:
            if read.group is None and read.thread[0] in threads:
                read.group = self._committed[read.thread[0]]
        self._committed[threads] += 1

    def wait(self, threads: NDArray, left: int, complete: bool = True) -> None:
        """Until all but `left` groups of each thread are read; complete: and what they write is written."""
        kept = []
        for read in self._reads:
            thread = read.thread[0]
            done = read.group is not None and read.group < self._committed[thread] - left
            if not (done and thread in threads):
                kept.append(read)
                continue
            self._release(read)
            if read.write and not complete:
                kept.append(read)
            elif read.write:
                read.write(read.words)
        self._reads = kept

    def _release(self, read: Read) -> None:
        """The words may be written again, by whoever knows of this thread's wait."""
        if not read.is_read:
            read.is_read = True
            self._block.shared.leaving[read.places] -= 1
            self._block.shared.date_read(read.thread, read.places)

    def finish(self) -> None:
        for read in self._reads:
            if not read.is_read:
                raise Fault(RACE, "the block ends while its shared memory is still read asynchronously")
            if read.write:
                read.write(read.words)


# Matrix products


class Descriptor(NamedTuple):
    """Where a matrix lies in shared memory: 8 x 16-byte pieces, and the distances between them."""

    start: int
    leading: int  # bytes
    stride: int
    swizzle: int  # as TensorMap's

    @classmethod
    def of(cls, bits: int) -> "Descriptor":
        assert not bits >> 49 & 7, "a base offset"
        mode = {0: 0, 1: 3, 2: 2, 3: 1}[bits >> 62]
        start, leading, stride = (16 * (bits >> at & 0x3FFF) for at in (0, 16, 32))
        return cls(start, leading, stride, mode)

    def addresses(self, rows: int, transposed: bool) -> NDArray:
        """(rows, 16) -> where each 16-bit element is: M or N rows, 16 columns of K.

        Within a swizzle of 2^s 16-byte chunks, a row (transposed: a column) takes 2^s chunks of adjacent
        elements, and 8 rows follow each other; `stride` leads to the next 8. Transposed, `leading` leads to
        the rows beyond those chunks.
        """
        r, k = np.arange(rows)[:, None], np.arange(16)[None]
        width = 16 << self.swizzle  # bytes
        if not transposed and self.swizzle:
            offsets = r // 8 * self.stride + r % 8 * width + 2 * k
        elif not transposed:
            offsets = r // 8 * self.stride + r % 8 * 16 + k // 8 * self.leading + 2 * (k % 8)
        elif self.swizzle:
            chunk = width // 2  # elements
            offsets = r // chunk * self.leading + 2 * (r % chunk) + k // 8 * self.stride + k % 8 * width
        else:
            offsets = r // 8 * self.stride + 2 * (r % 8) + k // 8 * self.leading + k % 8 * 16
        return swizzled(self.start + offsets, self.swizzle)


def _wgmma(instruction: ptx.Instruction) -> Step:
    operation = instruction.opcode[1]
    if operation == "fence":
        return lambda block: None
    if operation == "commit_group":
        return _commit
    if operation == "wait_group":
        left = instruction.operands[0].bits

        def wait(block: "Block") -> None:
            block.engine.wgmma.wait(block.threads, left)
            block.engine.accumulators.wait(block.threads, left)
            block.clocks.warp_sync(block.threads)

        return wait
    return _multiply(instruction)


def _commit(block: "Block") -> None:
    block.engine.wgmma.commit(block.threads)
    block.engine.accumulators.commit(block.threads)


class Accumulators:
    """Registers that wgmma writes: NaN from its issue to the wait, when the result is there."""

    def __init__(self, block: "Block") -> None:
        self._block = block
        self._committed = np.zeros(block.size, np.int64)  # groups of each thread
        # registers -> (their values to be, each thread's group or -1)
        self._pending: dict[tuple[int, ...], tuple[NDArray, NDArray]] = {}

    def read(self, registers: tuple[int, ...]) -> NDArray[np.float32]:
        """(registers, threads that execute), as they will be."""
        block = self._block
        values = block.registers["f32"][np.array(registers)[:, None], block.threads]
        if registers in self._pending:
            to_be, group = self._pending[registers]
            values = np.where(group[block.threads] >= 0, to_be[:, block.threads], values)
        return values

    def write(self, registers: tuple[int, ...], values: NDArray[np.float32]) -> None:
        block = self._block
        if registers not in self._pending:
            for others, (_, group) in self._pending.items():
                assert (group < 0).all() or not set(others) & set(registers), "accumulators that overlap"
            nothing = np.empty((len(registers), block.size), np.float32), np.full(block.size, -1)
            self._pending[registers] = nothing
        to_be, group = self._pending[registers]
        to_be[:, block.threads] = values
        group[block.threads] = self._committed[block.threads]
        block.registers["f32"][np.array(registers)[:, None], block.threads] = np.nan

    def commit(self, threads: NDArray) -> None:
        self._committed[threads] += 1

    def wait(self, threads: NDArray, left: int) -> None:
        for registers, (to_be, group) in self._pending.items():
            done = threads[(group[threads] >= 0) & (group[threads] < self._committed[threads] - left)]
            self._block.registers["f32"][np.array(registers)[:, None], done] = to_be[:, done]
            group[done] = -1


def _multiply(instruction: ptx.Instruction) -> Step:
    """wgmma.mma_async: D (64, n) = A (64, 16)·B (16, n) + D, by four warps; warp i has 16 rows from 16i on.

    d, a, b, whether to add D, signs of A and B, whether A (if in shared memory) and B are transposed: A is
    (M, K) and B (N, K) row by row otherwise. D's registers: as mma.sync's, 8 columns after 8 columns.
    """
    shape, kind = instruction.opcode[4], instruction.opcode[6]
    assert instruction.opcode[5] == "f32" and shape.endswith("k16"), instruction.text
    n = int(shape.split("n")[1].split("k")[0])
    d, a, b, add, *numbers = instruction.operands
    sign_a, sign_b, *transposed = (number.bits for number in numbers)
    assert sign_a == sign_b == 1, instruction.text
    accumulators = tuple(register.index for register in d.elements)
    add, b = reader(add, "pred"), reader(b, "u64")
    in_registers = isinstance(a, ptx.Vector)
    a = [reader(r, "u32") for r in elements(a)] if in_registers else reader(a, "u64")

    def multiply(block: "Block") -> None:
        threads = block.threads.reshape(-1, 32)[:, 0]  # one of each warp
        if in_registers:
            words = np.stack([np.broadcast_to(read(block), (block.count,)) for read in a])
            A = half_to_f32(words.view(np.uint16), kind).reshape(2, 2, -1, 8, 4, 2)
            A = A.transpose(2, 1, 3, 0, 4, 5).reshape(-1, 16, 16)
        else:
            A = _operand(block, threads, a(block), 64, transposed[0], kind)
            quarter = threads // 32 % 4
            A = A.reshape(-1, 4, 16, 16)[np.arange(len(threads)), quarter]
        B = _operand(block, threads, b(block), n, transposed[-1], kind)
        product = A @ B.swapaxes(1, 2)  # (warps, 16, n)
        product = product.reshape(-1, 2, 8, n // 8, 4, 2).transpose(3, 1, 5, 0, 2, 4).reshape(n // 2, -1)
        keep = np.broadcast_to(add(block), (block.count,))
        old = np.where(keep, block.engine.accumulators.read(accumulators), np.float32(0))
        block.engine.accumulators.write(accumulators, product + old)

    return multiply


def _operand(
    block: "Block", threads: NDArray, bits: NDArray, rows: int, transposed: int, kind: str
) -> NDArray[np.float32]:
    """(warps, rows, 16) of the matrix that each warp's descriptor names."""
    bits = np.broadcast_to(bits, (block.count,)).reshape(-1, 32)[:, 0]
    result = np.empty((len(threads), rows, 16), np.float32)
    for each in np.unique(bits):
        mine = bits == each
        addresses = Descriptor.of(int(each)).addresses(rows, bool(transposed))
        places = block.shared.places(np.unique(addresses // WORD) * WORD, WORD)[:, 0]
        block.engine.wgmma.begin(threads[mine], places)
        elements = block.shared.views[2][(addresses - SHARED_BASE) // 2]
        result[mine] = half_to_f32(elements, kind)
    return result
