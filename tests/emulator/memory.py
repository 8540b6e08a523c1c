"""Global and shared memory, with what a GPU does not know: who wrote each byte, and who may read it.

A thread may read a word of shared memory if its last write *happened before*: if a chain of barriers leads
from the writer, after its write, to the reader, before its read. It may write a word if all its reads and
writes happened before. Clocks knows these chains: they are vector clocks, one for each thread (Lamport 1978;
FastTrack, Flanagan and Freund 2009). An order that the emulator happened to choose proves nothing, so a race
is found whether it would have done harm here or not.
"""

import numpy as np
from numpy.typing import NDArray

GUARD = 4096  # bytes between allocations, which nobody may touch
OUTSIDE, UNWRITTEN, WRITTEN = 0, 1, 2
COPIERS = 64  # the most mbarriers of a block
WORD = 4  # bytes: what the state of shared memory is kept for
SHARED_BASE = 1024  # where dynamic shared memory begins: the system has the first KB


class Fault(Exception):
    """What the hardware would not forgive. `kind` is one of the words below."""

    def __init__(self, kind: str, what: str) -> None:
        super().__init__(f"{kind}: {what}")
        self.kind = kind


UNWRITTEN_READ = "unwritten read"
OUT_OF_BOUNDS = "out of bounds"
MISALIGNED = "misaligned"
RACE = "race"
DEADLOCK = "deadlock"


class Global:
    """Global memory: allocations in one large array of the host, whose addresses the kernels use."""

    def __init__(self, size: int = 1 << 28) -> None:
        self._memory = np.zeros(size, np.uint8)  # the operating system gives pages as they are touched
        self._state = np.zeros(size, np.uint8)
        self.base = self._memory.ctypes.data
        self._views = {n: self._memory.view(f"u{n}") for n in (1, 2, 4, 8)}
        self._states = {n: self._state.view(f"u{n}") for n in (1, 2, 4)}
        self._end = GUARD - self.base % GUARD
        self.allocations: list[tuple[int, int]] = []
        self._launch = np.zeros(size, np.uint8)  # which launch wrote each byte; 0: the host
        self.launch = 0  # which one executes
        self.waited = lambda: True  # whether who executes knows that the launches before it are done
        self.version = 0  # counts writes: whoever polls may see something new
        self.unwritten_reads: set[str] = (
            set()
        )  # instructions that read shared memory which nobody had written

    def allocate(self, size: int, content: bytes | None = None) -> int:
        """Returns the address of `size` new bytes, unwritten if there is no content."""
        start, self._end = self._end, self._end + -(-size // GUARD) * GUARD + GUARD
        self._memory[start : start + size] = 0xFF if content is None else np.frombuffer(content, np.uint8)
        self._state[start : start + size] = UNWRITTEN if content is None else WRITTEN
        self.allocations.append((self.base + start, size))
        return self.base + start

    def bytes(self, address: int, size: int) -> NDArray[np.uint8]:
        """The memory itself."""
        return self._memory[address - self.base :][:size]

    def is_written(self, address: int, size: int) -> NDArray[np.bool_]:
        return self._state[address - self.base :][:size] == WRITTEN

    def load(self, addresses: NDArray[np.uint64], size: int) -> NDArray:
        """(n) addresses -> (n, words): `size` bytes of each, as words of at most 4 bytes."""
        values, written = self.copy(addresses, size)
        if not written.all():
            address = int(addresses[(~written).any(axis=1)][0])
            raise Fault(UNWRITTEN_READ, f"global read of {size} bytes at {self.name(address)}")
        return values

    def copy(self, addresses: NDArray[np.uint64], size: int) -> tuple[NDArray, NDArray[np.bool_]]:
        """(n) addresses -> (n, words), and which of them are written: to copy what is not is no use of it."""
        places, unit = self._places(addresses, size)
        states = self._states[unit][places]
        self._check_bounds(addresses, states, unit, size, "read")
        self._check_launch(addresses, places * unit, "read")
        return self._views[unit][places], states == self._all(WRITTEN, unit)

    def store(self, addresses: NDArray[np.uint64], values: NDArray) -> None:
        """(n) addresses, (n, words) values."""
        size = values.shape[1] * values.itemsize
        places, unit = self._places(addresses, size)
        self._check_bounds(addresses, self._states[unit][places], unit, size, "write")
        self._check_launch(addresses, places * unit, "write")
        self._launch[places * unit] = self.launch
        self._views[unit][places] = values
        self._states[unit][places] = self._all(WRITTEN, unit)
        self.version += 1

    def name(self, address: int) -> str:
        """Which allocation the address is in, or next to."""
        start, size = min(self.allocations, key=lambda a: max(a[0] - address, address - a[0] - a[1]))
        number = self.allocations.index((start, size))
        return f"byte {address - start} of allocation {number}, of {size} bytes"

    def _all(self, state: int, unit: int) -> int:
        return int.from_bytes(bytes([state] * unit), "little")

    def _check_bounds(self, addresses: NDArray, states: NDArray, unit: int, size: int, what: str) -> None:
        # A word has no byte outside if none of its bytes' states is 0.
        inside = (states.view(np.uint8).reshape(*states.shape, unit) != OUTSIDE).all(axis=(1, 2))
        if not inside.all():
            address = int(addresses[~inside][0])
            raise Fault(OUT_OF_BOUNDS, f"global {what} of {size} bytes at {self.name(address)}")

    def _check_launch(self, addresses: NDArray, places: NDArray, what: str) -> None:
        launch = self._launch[places]
        early = (launch != 0) & (launch != self.launch)
        if early.any() and not self.waited():
            address = int(addresses[early.any(axis=1)][0])
            name = self.name(address)
            raise Fault(RACE, f"global {what} before griddepcontrol.wait of {name}, from a launch before")

    def _places(self, addresses: NDArray[np.uint64], size: int) -> tuple[NDArray, int]:
        if (addresses % size).any():
            raise Fault(MISALIGNED, f"{size} bytes at {addresses[addresses % size != 0][0]:#x}")
        places = addresses.astype(np.int64) - self.base
        if ((places < 0) | (places >= len(self._memory))).any():
            raise Fault(OUT_OF_BOUNDS, f"global address {addresses[0]:#x} is nowhere")
        unit = min(size, WORD)
        return places[:, None] // unit + np.arange(size // unit), unit


class Clocks:
    """What each thread knows of the others' accesses: known[proxy, t, u] counts u's that t may build on.

    Proxy 0 is for ordinary accesses, 1 for those of TMA and wgmma, which need a fence.proxy.async on the way.
    Numbers from `threads` on stand for TMA's copies, one for each mbarrier that tells of them.
    """

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.known = np.zeros((2, threads, threads + COPIERS), np.int32)
        everyone = np.arange(threads)
        self.known[0, everyone, everyone] = 1
        self._quiet = np.zeros(threads, bool)  # nothing happened since the last synchronisation of the warp

    def now(self, threads: NDArray) -> NDArray:
        return self.known[0, threads, threads]

    def stir(self, threads: NDArray) -> None:
        self._quiet[threads] = False

    def release(self, threads: NDArray) -> NDArray[np.int32]:
        """What these threads know, (2, threads + COPIERS); what they do from now on is not in it."""
        known = self.known[:, threads].max(axis=1)
        self.known[0, threads, threads] += 1
        return known

    def acquire(self, threads: NDArray, known: NDArray[np.int32]) -> None:
        self.known[:, threads] = np.maximum(self.known[:, threads], known[:, None])
        self._quiet[threads] = False

    def warp_sync(self, threads: NDArray) -> None:
        """The threads of each warp among these tell each other what they know."""
        if self._quiet[threads].all():
            return
        for warp in np.unique(threads // 32):
            lanes = threads[threads // 32 == warp]
            self.known[:, lanes] = self.known[:, lanes].max(axis=1, keepdims=True)
            self.known[0, lanes, lanes] += 1
        self._quiet[threads] = True

    def fence_proxy(self, threads: NDArray) -> None:
        self.known[1, threads] = self.known[0, threads]


class Shared:
    """The shared memory of one block. Places are those of words, counted from SHARED_BASE."""

    def __init__(self, size: int, clocks: Clocks) -> None:
        words = -(-size // WORD)
        self.size, self.clocks = size, clocks
        self.memory = np.full(words * WORD, 0xFF, np.uint8)  # NaN, should somebody use it
        self.views = {n: self.memory[: len(self.memory) // n * n].view(f"u{n}") for n in (1, 2, 4, 8)}
        self._written_to = np.zeros(words, bool)
        self._writer = np.full(words, -1, np.int16)
        self._written = np.zeros(words, np.int32)  # the writer's clock
        self._read = np.zeros((words, clocks.threads), np.uint16)  # each thread's clock
        self.arriving = np.zeros(words, np.int8)  # asynchronous writes on their way
        self.leaving = np.zeros(words, np.int16)  # asynchronous reads on their way
        self.unwritten_reads = 0
        self._several = np.zeros(words, bool)  # whether several threads wrote what is there; when each did:
        self._agreed = np.zeros((words, clocks.threads), np.uint16)
        self._copies = np.zeros(COPIERS, np.int32)  # TMA's clocks

    def places(self, addresses: NDArray, size: int) -> NDArray:
        """(n) addresses -> (n, words) places; size: bytes of each access."""
        if (addresses % size).any():
            raise Fault(
                MISALIGNED, f"{size} bytes at shared address {addresses[addresses % size != 0][0]:#x}"
            )
        starts = addresses.astype(np.int64) - SHARED_BASE
        outside = (starts < 0) | (starts + size > self.size)
        if outside.any():
            raise Fault(
                OUT_OF_BOUNDS, f"{size} bytes at byte {starts[outside][0]} of {self.size} of shared memory"
            )
        return starts[:, None] // WORD + np.arange(-(-size // WORD))

    def note_read(self, threads: NDArray, places: NDArray, proxy: int = 0) -> None:
        """threads (n, words) or (n, 1), places (n, words): each thread reads its words.

        Words that nobody has written have all bits set: NaN in a result, no place as an index.
        """
        self._refuse(self.arriving[places] > 0, RACE, places, "read of what a copy still writes")
        writer = self._writer[places]
        if not self._written_to[places].all():
            self.unwritten_reads += 1
        ordered = self._ordered(threads, places, 0) | (writer < 0)
        self._refuse(~ordered, RACE, places, "read, not ordered after the write of thread {}")
        if proxy:
            ordered = self._ordered(threads, places, 1) | (writer < 0) | (writer >= self.clocks.threads)
            self._refuse(~ordered, RACE, places, "read by TMA or wgmma, no fence.proxy.async after a write")
        self.date_read(threads, places)

    def date_read(self, threads: NDArray, places: NDArray) -> None:
        """The threads have read these words by now: for asynchronous reads, when they are waited for."""
        self._read[places, threads] = self.clocks.now(threads)
        self.clocks.stir(threads)

    def write(
        self, threads: NDArray, places: NDArray, values: NDArray, written: NDArray | bool = True
    ) -> None:
        """Each thread writes its words.

        Several threads may write the same to one word, in whatever order, and readers may be there then. Who
        reads it must know of one of these writes.

        written: False where a copy brings what nobody had written.
        """
        words, threads = self.views[WORD], np.broadcast_to(threads[:, None], places.shape)
        writer, before = self._writer[places], self._written[places]
        same = (words[places] == values) & (writer >= 0)
        self.check_write(threads, places, same)
        words[places] = values
        self._refuse(words[places] != values, RACE, places, "two threads write at once")
        new, now = places[~same], self.clocks.now(threads)
        self._several[new] = False
        self._writer[new] = threads[~same]
        self._written[new] = now[~same]
        self._written_to[places] = written
        several = same | (self._writer[places] != threads)
        if several.any():
            first = places[several & ~self._several[places]]
            self._agreed[first] = 0
            self._several[first] = True
            mine = (writer >= 0) & (writer < self.clocks.threads) & same
            self._agreed[places[mine], writer[mine]] = before[mine]
            self._agreed[places[several], threads[several]] = now[several]
        self.clocks.stir(threads)

    def check_write(self, threads: NDArray, places: NDArray, same: NDArray | bool, proxy: int = 0) -> None:
        """threads, places: as in note_read; same: where the words do not change."""
        self._refuse(self.arriving[places] > 0, RACE, places, "write to where a copy still writes")
        busy = (self.leaving[places] > 0) & ~np.asarray(same)
        self._refuse(busy, RACE, places, "write to what a copy or wgmma still reads")
        free = (self._writer[places] < 0) | same
        for each in range(1 + proxy):
            ordered = self._ordered(threads, places, each, every=True) | free
            self._refuse(~ordered, RACE, places, "write, not ordered after the write of thread {}")
        known = self.clocks.known[0, threads, : self.clocks.threads]
        late = (self._read[places] > known).any(axis=-1) & ~np.asarray(same)
        self._refuse(late, RACE, places, "write, not ordered after a read")

    def note_copied(self, places: NDArray, written: NDArray, copier: int) -> NDArray[np.int32]:
        """TMA has written these words; written: as in `write`. Returns what its mbarrier knows then."""
        self._copies[copier] += 1
        self._written_to[places] = written
        self._several[places] = False
        self._writer[places] = self.clocks.threads + copier
        self._written[places] = self._copies[copier]
        known = np.zeros((2, self.clocks.threads + COPIERS), np.int32)
        known[:, self.clocks.threads + copier] = self._copies[copier]
        return known

    def _ordered(
        self, threads: NDArray, places: NDArray, proxy: int, every: bool = False
    ) -> NDArray[np.bool_]:
        """Whether each thread knows of each place's write; if several wrote it, of one or every of them."""
        known = self.clocks.known[proxy]
        ordered = self._written[places] <= known[threads, self._writer[places]]
        several = np.broadcast_to(self._several[places], ordered.shape) & (True if every else ~ordered)
        if several.any():
            agreed = self._agreed[np.broadcast_to(places, ordered.shape)[several]]
            late = agreed > known[np.broadcast_to(threads, ordered.shape)[several], : self.clocks.threads]
            others = ~late.any(axis=1) if every else ((agreed > 0) & ~late).any(axis=1)
            ordered[several] = ordered[several] & others if every else others
        return ordered

    def _refuse(self, bad: NDArray, kind: str, places: NDArray, what: str) -> None:
        if bad.any():
            place = np.broadcast_to(places, bad.shape)[bad][0]
            what = what.format(self._writer[place])
            raise Fault(kind, f"{what}, at byte {place * WORD} of shared memory")
