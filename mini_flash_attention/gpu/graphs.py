"""Which CUDA graph a stream is captured into, and when that graph is gone.

CUDA tells it by a user object, which a graph and all that is made of it own, and which has a destructor. When
the last of them is gone and has run to its end, a thread of the driver calls that, maybe while Python ends.
So it is given nothing of Python: it is the C function `time`, which writes the time where it is told to.
"""

import ctypes
import functools
from typing import Any, NamedTuple

ACTIVE = 1  # of CUstreamCaptureStatus
NO_DESTRUCTOR_SYNC = 1  # of CUuserObject_flags: what CUDA asks for
MOVE = 1  # of CUuserObjectRetain_flags: the reference becomes the graph's


class Graph(NamedTuple):
    """A graph that is being captured."""

    capture: int  # its number: no other capture of the process has it
    handle: int


@functools.cache
def _driver() -> Any | None:
    """CUDA's driver, with functions that it has since CUDA 11.3."""
    pointer, number = ctypes.c_void_p, ctypes.c_uint
    try:
        driver = ctypes.CDLL("libcuda.so.1")
        driver.cuStreamGetCaptureInfo_v2.argtypes = [pointer] * 6
        driver.cuUserObjectCreate.argtypes = [pointer, pointer, pointer, number, number]
        driver.cuGraphRetainUserObject.argtypes = [pointer, pointer, number, number]
    except (OSError, AttributeError):
        return None
    return driver


def captured(stream: int) -> Graph | None:
    """The graph into which the stream is captured. None: into none, or the driver does not tell."""
    driver = _driver()
    if driver is None:
        return None
    status, capture, graph = ctypes.c_int(), ctypes.c_uint64(), ctypes.c_void_p()
    outputs = (ctypes.byref(x) for x in (status, capture, graph))
    failed = driver.cuStreamGetCaptureInfo_v2(stream, *outputs, None, None)
    return None if failed or status.value != ACTIVE else Graph(capture.value, graph.value)


def flags(count: int) -> Any:
    """Numbers for `tell`, 0. They are never freed, as graphs may outlive all objects of Python."""
    numbers = (ctypes.c_long * count)()
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(numbers))
    return numbers


def tell(graph: Graph, flags: Any, index: int) -> bool:
    """When the graph is gone, flags[index] becomes another number than 0. Returns whether it will."""
    driver, user_object = _driver(), ctypes.c_void_p()
    time = ctypes.cast(ctypes.CDLL(None).time, ctypes.c_void_p)
    flag = ctypes.addressof(flags) + index * ctypes.sizeof(ctypes.c_long)
    if driver.cuUserObjectCreate(ctypes.byref(user_object), flag, time, 1, NO_DESTRUCTOR_SYNC):
        return False
    return not driver.cuGraphRetainUserObject(graph.handle, user_object, 1, MOVE)
