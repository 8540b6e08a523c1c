"""Registers and stack of the kernels in a compiled library, read without CUDA's tools.

A library keeps its GPU code as a whole ELF file, the cubin, among its constants. Its section
.nv.info is a list of records: a byte for the format, a byte for the attribute, 16 bits for the size
of the payload, and the payload: for the attributes below, a kernel's symbol and the value.
"""

import struct
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ELF_MAGIC = b"\x7fELF"
MACHINE_CUDA = 190
FORMAT_SIZED = 4  # records of the other formats have no payload: the value is in place of the size
FRAME_SIZE, MIN_STACK_SIZE, REGISTER_COUNT = 0x11, 0x12, 0x2F


class Resources(NamedTuple):
    """What one thread of a kernel needs. Spilled registers go to the stack: 0 means no spills."""

    registers: int
    stack_bytes: int


def resources(library: Path) -> list[Resources]:
    """Returns the resources of each kernel in the library."""
    content = library.read_bytes()
    found = []
    at = content.find(ELF_MAGIC, 1)  # at 0 the library itself begins
    while at > 0:
        if struct.unpack_from("<H", content, at + 18)[0] == MACHINE_CUDA:
            found += _of_cubin(content[at:])
        at = content.find(ELF_MAGIC, at + 1)
    return found


def _of_cubin(cubin: bytes) -> list[Resources]:
    values = defaultdict(dict)
    for attribute, payload in _records(_section(cubin, ".nv.info")):
        if attribute in (FRAME_SIZE, MIN_STACK_SIZE, REGISTER_COUNT):
            symbol, value = struct.unpack("<II", payload)
            values[symbol][attribute] = value
    # A function that a kernel calls has no count of its own.
    return [
        Resources(of.get(REGISTER_COUNT, 0), max(of.get(FRAME_SIZE, 0), of.get(MIN_STACK_SIZE, 0)))
        for of in values.values()
    ]


def _records(info: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at < len(info):
        record_format, attribute, size = struct.unpack_from("<BBH", info, at)
        at += 4
        if record_format == FORMAT_SIZED:
            yield attribute, info[at : at + size]
            at += size


def _section(elf: bytes, name: str) -> bytes:
    (table,) = struct.unpack_from("<Q", elf, 0x28)
    header_size, count, names = struct.unpack_from("<HHH", elf, 0x3A)
    # a header: name, type, flags, address, offset, size, ...
    headers = [struct.unpack_from("<IIQQQQ", elf, table + i * header_size) for i in range(count)]
    first_name = headers[names][4]
    for header in headers:
        start = first_name + header[0]
        if elf[start : elf.index(b"\0", start)].decode() == name:
            return elf[header[4] : header[4] + header[5]]
    raise ValueError(f"the cubin has no section {name}")
