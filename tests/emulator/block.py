"""A thread block that executes: registers, program counters, barriers, and who goes next.

All threads that stand at the same basic block execute it together, each instruction as one operation of
numpy over their registers. Those at the lowest place go first, so threads that parted meet again where the
code does. Instructions of a whole warp (shfl.sync, mma.sync, ...) are executed when all of its threads are
there. What order the threads take otherwise is the emulator's choice; memory.Clocks judges by the barriers
alone.
"""

import functools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from emulator import alu, async_copy, hopper, loads, ptx, warp
from emulator.capture import Launch
from emulator.memory import DEADLOCK, SHARED_BASE, Clocks, Fault, Global, Shared
from emulator.operands import FILE_VIEWS, KINDS, reader

RUNS, WAITS, POLLS, ENDED = range(4)  # what a thread does; who polls goes on when another has written
COLLECTIVE = {"shfl", "vote", "elect", "mma", "ldmatrix", "stmatrix", "wgmma", "setmaxnreg", "bar", "barrier"}
PATIENCE = 50  # a block may poll one thing after another
SHARED_SYMBOL = "__dynamic_shmem__0"


class BasicBlock(NamedTuple):
    """Instructions that are executed one behind the other."""

    instructions: list[ptx.Instruction]
    steps: list[alu.Step]
    collective: bool  # whole warps execute it


@functools.lru_cache(maxsize=8)
def _program(kernel: ptx.Kernel) -> list[BasicBlock]:
    starts = _starts(kernel)
    number = {start: i for i, start in enumerate(starts)}
    targets = {label: number[place] for label, place in kernel.labels.items() if place in number}
    blocks = []
    for start, end in zip(starts, [*starts[1:], len(kernel.instructions)], strict=True):
        instructions = kernel.instructions[start:end]
        steps = [_compile(instruction, targets) for instruction in instructions]
        collective = any(i.opcode[0] in COLLECTIVE for i in instructions)
        blocks.append(BasicBlock(instructions, steps, collective))
    return blocks


def _starts(kernel: ptx.Kernel) -> list[int]:
    """Where basic blocks begin: at labels, behind branches and barriers, at what may wait and try again."""
    starts = {0, *kernel.labels.values()}
    for i, instruction in enumerate(kernel.instructions):
        name = instruction.opcode[0]
        if hopper.waits(instruction):
            starts |= {i, i + 1}
        if name in ("bra", "ret", "exit") or (name in ("bar", "barrier") and instruction.opcode[1] != "warp"):
            starts.add(i + 1)
    return sorted(start for start in starts if start < len(kernel.instructions))


def _compile(instruction: ptx.Instruction, targets: dict[str, int]) -> alu.Step:
    step = _control(instruction, targets)
    for module in (alu, loads, warp, async_copy, hopper):
        step = step or module.compile(instruction)
    if step is None:
        raise NotImplementedError(f"line {instruction.line}: {instruction.text}")
    return _predicated(step, instruction) if instruction.predicate else step


def _predicated(step: alu.Step, instruction: ptx.Instruction) -> alu.Step:
    register, negated = instruction.predicate
    predicate = reader(register, "pred")

    def of_some(block: "Block") -> None:
        threads = block.threads
        chosen = threads[predicate(block) != negated]
        if len(chosen):
            block.choose(chosen)
            step(block)
            block.choose(threads)

    return of_some


def _control(instruction: ptx.Instruction, targets: dict[str, int]) -> alu.Step | None:
    name, *rest = instruction.opcode
    if name == "bra":
        target = targets[instruction.operands[0].name]

        def branch(block: "Block") -> None:
            block.counters[block.lanes] = target

        return branch
    if name in ("ret", "exit"):
        return lambda block: block.end()
    if name in ("bar", "barrier") and rest[0] != "warp":
        return _barrier(instruction)
    return None


def _barrier(instruction: ptx.Instruction) -> alu.Step:
    """bar.sync, bar.arrive and bar.red number[, threads]; .red also votes."""
    operation = next(part for part in instruction.opcode if part in ("sync", "arrive", "red"))
    operands, vote, result = list(instruction.operands), None, None
    if operation == "red":
        vote, result = reader(operands.pop(), "pred"), operands.pop(0)
        assert "and" in instruction.opcode, instruction.text
    number = reader(operands[0], "u32")
    count = reader(operands[1], "u32") if len(operands) > 1 else None

    def arrive(block: "Block") -> None:
        threads = block.threads
        numbers = np.broadcast_to(number(block), threads.shape)
        votes = np.broadcast_to(vote(block) if vote else True, threads.shape)
        expected = int(count(block)[0]) if count else block.size
        for n in np.unique(numbers):
            here = numbers == n
            barrier = block.barriers.setdefault(int(n), Barrier())
            barrier.arrive(block, threads[here], expected)
            barrier.agree &= bool(votes[here].all())
            if operation != "arrive":
                barrier.wait(block, threads[here])
            if barrier.arrived == expected:
                barrier.open(block, result)

    return arrive


class Barrier:
    """One of the 16 named barriers of a block."""

    def __init__(self) -> None:
        self.arrived = 0
        self.agree = True  # whether all have voted so
        self._known: list[NDArray] = []
        self._waiting: list[NDArray] = []

    def arrive(self, block: "Block", threads: NDArray, expected: int) -> None:
        self.arrived += len(threads)
        self._known.append(block.clocks.release(threads))
        if self.arrived > expected:
            raise Fault(DEADLOCK, f"{self.arrived} threads at a barrier of {expected}")

    def wait(self, block: "Block", threads: NDArray) -> None:
        self._waiting.append(threads)
        block.states[threads] = WAITS

    def open(self, block: "Block", result: ptx.Register | None) -> None:
        for threads in self._waiting:
            block.wake(threads)
            block.clocks.acquire(threads, np.maximum.reduce(self._known))
            if result:
                block.registers["pred"][result.index, threads] = self.agree
        self.__init__()


class Block:
    """One thread block. `lanes` indexes the registers of the threads that execute now: a slice, if it can."""

    def __init__(
        self, launch: Launch, number: tuple[int, int, int], memory: Global, symbols: dict[str, int]
    ) -> None:
        self.launch, self.number, self.memory = launch, number, memory
        self.size = int(np.prod(launch.block))
        self._program = _program(launch.kernel)
        self.symbols = {**symbols, SHARED_SYMBOL: SHARED_BASE}
        self.registers = self._new_registers()
        self.counters = np.zeros(self.size, np.int32)
        self.states = np.full(self.size, RUNS, np.int8)
        self.barriers: dict[int, Barrier] = {}
        self.clocks = Clocks(self.size)
        self.shared = Shared(launch.shared_memory, self.clocks)
        self.copies = async_copy.Copies(self)
        self.engine = hopper.Engine(self)
        everyone = np.arange(self.size)
        x, y, _ = launch.block
        self._specials = {
            "%tid.x": everyone % x,
            "%tid.y": everyone // x % y,
            "%tid.z": everyone // (x * y),
            "%laneid": everyone % 32,
            "%warpid": everyone // 32,
        }
        for i, axis in enumerate("xyz"):
            self._specials[f"%ctaid.{axis}"] = np.full(self.size, number[i])
            self._specials[f"%nctaid.{axis}"] = np.full(self.size, launch.grid[i])
            self._specials[f"%ntid.{axis}"] = np.full(self.size, launch.block[i])
        self._specials["%cluster_ctarank"] = np.zeros(self.size, int)
        never = np.iinfo(np.int32).max
        self._waited = np.full(self.size, never if launch.overlaps else 0, np.int32)  # clocks
        self.choose(everyone)

    def wait_for_launches(self) -> None:
        """griddepcontrol.wait"""
        self._waited[self.threads] = self.clocks.now(self.threads)
        self.clocks.stir(self.threads)

    def waited(self) -> bool:
        """Whether each thread knows of one that has waited for the launches before."""
        return bool((self.clocks.known[0, self.threads, : self.size] >= self._waited).any(axis=1).all())

    def _new_registers(self) -> dict[str, NDArray]:
        """Each file, under the name of each kind that it can be read as."""
        views = {}
        for file, count in self.launch.kernel.registers.items():
            raw = np.zeros((count, self.size), KINDS[file] if file == "pred" else f"u{int(file[1:]) // 8}")
            views |= {kind: raw.view(KINDS[kind]) for kind in (file, *FILE_VIEWS[file])}
        return views

    def special(self, name: str) -> NDArray:
        return self._specials[name][self.lanes]

    def choose(self, threads: NDArray) -> None:
        """These threads, in ascending order, execute now."""
        self.threads, self.count = threads, len(threads)
        first, last = int(threads[0]), int(threads[-1])
        self.lanes = slice(first, last + 1) if last - first + 1 == len(threads) else threads

    def run(self) -> Iterator[None]:
        """Executes to the end; yields where only what other blocks write lets it go on."""
        while True:
            place = self._next()
            if place is not None:
                self._execute(place)
            elif (self.states == ENDED).all():
                self.engine.finish()
                assert self.clocks.known.max() < 1 << 16, "Shared keeps clocks in 16 bits"
                return
            elif not self.engine.land():
                self._wait_for_others()
                yield

    def _next(self) -> int | None:
        """Chooses the threads that execute next, and returns their basic block."""
        runs = self.states == RUNS
        for place in np.unique(self.counters[runs]):
            ready = runs & (self.counters == place)
            if self._program[place].collective:
                warps, alive = ready.reshape(-1, 32), (self.states != ENDED).reshape(-1, 32)
                ready = (warps & (warps == alive).all(axis=1, keepdims=True)).reshape(-1)
            if ready.any():
                self.choose(np.flatnonzero(ready))
                return int(place)
        return None

    def _execute(self, place: int) -> None:
        self.counters[self.lanes] = place + 1
        block = self._program[place]
        self.memory.waited = self.waited
        for instruction, step in zip(block.instructions, block.steps, strict=True):
            unwritten_reads = self.shared.unwritten_reads
            try:
                step(self)
            except Exception as error:
                error.args = (f"{error}\n{self._describe(instruction)}",)
                raise
            if self.shared.unwritten_reads > unwritten_reads:
                self.memory.unwritten_reads.add(self._describe(instruction))

    def _describe(self, instruction: ptx.Instruction) -> str:
        return (
            f"{self.launch.kernel.name[:30]}, block {self.number}, threads {self.threads[0]} to "
            f"{self.threads[-1]}, line {instruction.line}: {instruction.text[:200]}"
        )

    def _wait_for_others(self) -> None:
        if not (self.states == POLLS).any():
            raise Fault(DEADLOCK, self.where())
        self.states[self.states == POLLS] = RUNS

    def poll(self) -> None:
        self.states[self.lanes] = POLLS

    def sleep(self, threads: NDArray, place: int) -> None:
        """Until they are woken; then they execute the basic block `place`."""
        self.states[threads] = WAITS
        self.counters[threads] = place

    def wake(self, threads: NDArray) -> None:
        self.states[threads] = RUNS

    def end(self) -> None:
        self.states[self.lanes] = ENDED

    def where(self) -> str:
        """Where the threads stand that have not ended."""
        places = []
        for place in np.unique(self.counters[self.states != ENDED]):
            threads = np.flatnonzero((self.counters == place) & (self.states != ENDED))
            at = self._program[max(place - 1, 0)].instructions[-1]
            if hopper.waits(self._program[place].instructions[0]):
                at = self._program[place].instructions[0]
            places.append(f"{len(threads)} threads from {threads[0]} on at line {at.line}, {at.text}")
        return f"block {self.number}: " + "; ".join(places)


def execute(launches: list[Launch], memory: Global) -> None:
    """Executes the launches of one stream, one behind the other."""
    with np.errstate(all="ignore"):
        for launch in launches:
            _execute(launch, memory)


def _execute(launch: Launch, memory: Global) -> None:
    """All blocks of a launch. One begins when those before it have ended, or wait for others."""
    memory.launch += 1
    symbols = {
        parameter.name: memory.allocate(parameter.size, value)
        for parameter, value in zip(launch.kernel.parameters, launch.arguments, strict=True)
    }
    x, y, z = launch.grid
    waiting = [(i, j, k) for k in range(z) for j in range(y) for i in range(x)]
    begun: list[tuple[Block, Iterator[None]]] = []
    idle = 0  # rounds in which nobody wrote, ended or began
    while waiting or begun:
        before = memory.version, len(begun)
        begun = [(block, run) for block, run in begun if next(run, block) is not block]
        if waiting:
            block = Block(launch, waiting.pop(0), memory, symbols)
            begun.append((block, block.run()))
        idle = idle + 1 if before == (memory.version, len(begun)) else 0
        if idle > PATIENCE:
            raise Fault(DEADLOCK, "; ".join(block.where() for block, _ in begun))
