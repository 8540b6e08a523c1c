"""What a kernel's host code asks of CUDA, without CUDA.

The host code of a kernel computes the grid, divisors and tensor maps, packs them, and launches. It runs
here as it is: compiled as the package compiles it, but for two things. The compiler also hands out the
PTX. And where the library would call CUDA, it calls the functions of this file, which write down what is
launched. So nothing of the launch is rebuilt by hand.

Tensors lie in host memory (memory.Global), and say that they are on a CUDA device.
"""

import ctypes
import importlib
import struct
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from emulator import ptx
from mini_flash_attention.gpu import compile

CUDA, SUCCESS = 2, 0  # DLPack's device type; cudaSuccess
PROGRAMMATIC = 6  # cudaLaunchAttributeProgrammaticStreamSerialization


class Launch(NamedTuple):
    """One kernel launch: `arguments` holds the bytes of each kernel parameter."""

    kernel: ptx.Kernel
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared_memory: int  # bytes, dynamic
    arguments: list[bytes]
    overlaps: bool = False  # may begin while the launch before it still runs: programmatic dependent launch


class Library:
    """A compiled kernel module: the host function, and the PTX of what it launches."""

    def __init__(self, config: Any, compile_to: Callable[[Any, Path], str] | None = None) -> None:
        """compile_to: how to compile what is not a config of the package; as `_compile`."""
        import tvm_ffi

        self._folder = tempfile.TemporaryDirectory()
        text = (compile_to or _compile)(config, Path(self._folder.name))
        self.kernels = {kernel.name: kernel for kernel in ptx.parse(text)}
        self._names: list[bytes] = []
        self._launches: list[Launch] = []
        compile._load_runtime()
        path = Path(self._folder.name, "kernel.so")
        self._module = tvm_ffi.load_module(path)
        self._callbacks = {name: kind(function) for name, (kind, function) in self._cuda().items()}
        _redirect(path, self._callbacks)

    def launches(self, call: tuple) -> list[Launch]:
        """Runs the host function on a record of kernels/calls.py, and returns what it launches."""
        self._launches = []
        self._module[compile.SYMBOL](call)
        return self._launches

    def _cuda(self) -> dict[str, tuple[Any, Any]]:
        """The functions of CUDA that the library calls, each with its C type."""
        word, pointer, integer = ctypes.c_uint64, ctypes.c_void_p, ctypes.c_int

        def write(address: int, value: int, kind: type = integer) -> int:
            kind.from_address(address).value = value
            return SUCCESS

        def get_kernel(kernel: int, _: int, name: bytes) -> int:
            self._names.append(name)
            return write(kernel, len(self._names), word)

        def launch(config: int, kernel: int, arguments: int) -> int:
            *sizes, shared_memory = struct.unpack("<6IQ", ctypes.string_at(config, 32))
            entry = self.kernels[self._names[kernel - 1].decode()]
            places = (ctypes.c_void_p * len(entry.parameters)).from_address(arguments)
            values = [
                ctypes.string_at(place, parameter.size)
                for place, parameter in zip(places, entry.parameters, strict=True)
            ]
            attributes, count = struct.unpack("<QI", ctypes.string_at(config + 40, 12))
            # an attribute: its kind, 4 bytes of padding, 64 bytes with its value
            starts = [ctypes.string_at(attributes + 72 * i, 12) for i in range(count)]
            overlaps = (PROGRAMMATIC, 1) in [struct.unpack("<i4xi", start) for start in starts]
            launch = Launch(entry, tuple(sizes[:3]), tuple(sizes[3:]), shared_memory, values, overlaps)
            self._launches.append(launch)
            return SUCCESS

        def function(*kinds: type) -> Any:
            return ctypes.CFUNCTYPE(integer, *kinds)

        def initialise(_: int, load: Any, load_to_device: Any, __: int) -> int:
            library = word()
            return load(ctypes.addressof(library)) or load_to_device(ctypes.addressof(library), 0)

        most = 227 * 1024  # the shared memory of any GPU suffices: what is too large fails to compile
        return {
            # Called at each launch: that it is done is never noted, or the library would unload at exit.
            "cuda_dialect_init_library_once": (
                function(pointer, function(pointer), function(pointer, integer), pointer),
                initialise,
            ),
            "_cudaGetDevice": (function(pointer), lambda device: write(device, 0)),
            "_cudaDeviceGetAttribute": (function(pointer, integer, integer), lambda v, *_: write(v, most)),
            "_cuKernelGetAttribute": (
                function(pointer, integer, pointer, integer),
                lambda v, *_: write(v, 0),
            ),
            "_cudaFuncSetAttribute": (function(pointer, integer, integer), lambda *_: SUCCESS),
            "_cudaKernelSetAttributeForDevice": (
                function(pointer, integer, integer, integer),
                lambda *_: SUCCESS,
            ),
            "_cudaLibraryLoadData": (function(pointer), lambda library: write(library, 1, word)),
            "_cudaLibraryGetKernel": (function(pointer, pointer, ctypes.c_char_p), get_kernel),
            "_cudaLaunchKernelEx": (function(pointer, pointer, pointer), launch),
        }


def _compile(config: compile.KernelConfig, folder: Path) -> str:
    """Leaves kernel.so in the folder, and returns the PTX."""
    import cutlass.cute as cute

    from mini_flash_attention.kernels.parts.arguments import stream

    kernel = importlib.import_module(f"mini_flash_attention.kernels.{config.kernel}")
    options = f"--enable-tvm-ffi --gpu-arch {config.arch} --keep-ptx --dump-dir {folder}"
    compiled = cute.compile(kernel.launch, kernel.fake_call(config), config, stream(), options=options)
    return link(compiled, folder)


def link(compiled: Any, folder: Path) -> str:
    """From what cute.compile returned, with --keep-ptx and --dump-dir: leaves kernel.so, returns the PTX."""
    compiled.export_to_c(str(folder / "kernel.o"), compile.SYMBOL)
    # norelro: the table of imports can be written to
    command = ["ld", "-shared", "-z", "norelro", "-o", folder / "kernel.so", folder / "kernel.o"]
    subprocess.run(command, check=True)
    return next(folder.glob("*.ptx")).read_text()


def _redirect(path: Path, functions: dict[str, Any]) -> None:
    """Has the loaded library call these functions: writes their addresses into its table of imports."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    base = min(int(line.split("-")[0], 16) for line in lines if line.endswith(str(path)))
    for offset, name in _imports(path.read_bytes()):
        if name in functions:
            address = ctypes.cast(functions[name], ctypes.c_void_p).value
            ctypes.c_uint64.from_address(base + offset).value = address


def _imports(elf: bytes) -> Iterator[tuple[int, str]]:
    """(place in the loaded library, symbol) of each address that the dynamic linker fills in."""
    (table,) = struct.unpack_from("<Q", elf, 0x28)
    size, count = struct.unpack_from("<HH", elf, 0x3A)
    # a header: name, type, flags, address, offset, size, link, ...
    headers = [struct.unpack_from("<IIQQQQI", elf, table + i * size) for i in range(count)]
    rela = 4  # SHT_RELA
    for _, kind, _, _, start, length, link in headers:
        if kind == rela:
            symbols, strings = headers[link], headers[headers[link][6]]
            for at in range(start, start + length, 24):
                place, _, symbol = struct.unpack_from("<QII", elf, at)
                (name,) = struct.unpack_from("<I", elf, symbols[4] + 24 * symbol)
                first = strings[4] + name
                yield place, elf[first : elf.index(b"\0", first)].decode()


# Tensors


class _DLTensor(ctypes.Structure):
    """DLPack's DLManagedTensor."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("byte_offset", ctypes.c_uint64),
        ("manager", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
    ]


class CudaTensor:
    """Host memory that says it is on a CUDA device, for a function that takes DLPack tensors."""

    def __init__(self, address: int, shape: tuple, strides: tuple, dtype: str) -> None:
        code = {"int": 0, "uint": 1, "float": 2, "bfloat": 4}[dtype.rstrip("0123456789")]
        bits = int(dtype.lstrip("bfloatuin"))
        self._sizes = [(ctypes.c_int64 * len(shape))(*values) for values in (shape, strides)]
        pointers = [ctypes.addressof(sizes) for sizes in self._sizes]
        self._tensor = _DLTensor(address, CUDA, 0, len(shape), code, bits, 1, *pointers, 0, None, None)

    def __dlpack_device__(self) -> tuple[int, int]:
        return CUDA, 0

    def __dlpack__(self, **_: Any) -> Any:
        new = ctypes.pythonapi.PyCapsule_New
        new.restype, new.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
        return new(ctypes.addressof(self._tensor), b"dltensor", None)
