"""The little of CUDA that timing needs, from the driver's own library: buffers, events, graphs.

`libcuda.so.1` comes with every NVIDIA driver and keeps its names across CUDA versions, so a board
with nothing but TensorRT and Python can be measured. Needs CUDA 11.4 or later.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import weakref
from ctypes import POINTER, byref, c_char_p, c_float, c_int, c_size_t, c_uint, c_uint64, c_void_p
from typing import TYPE_CHECKING, Callable

from nas.errors import NasctlError

if TYPE_CHECKING:
    import numpy as np

LIBRARY = "libcuda.so.1"
MAJOR, MINOR = 75, 76  # device attributes: compute capability
NON_BLOCKING = 1  # the stream does not wait for the default one
THREAD_LOCAL = 1  # capture mode: other threads may go on allocating

Call = Callable[[], object]
_OUT, _SIZE = POINTER(c_void_p), POINTER(c_int)
#: name -> argument types; every one returns an error number. `_v2` is the name of today's version
SIGNATURES = {
    "cuInit": (c_uint,),
    "cuDriverGetVersion": (_SIZE,),
    "cuGetErrorString": (c_int, POINTER(c_char_p)),
    "cuDeviceGetCount": (_SIZE,),
    "cuDeviceGet": (_SIZE, c_int),
    "cuDeviceGetName": (c_char_p, c_int, c_int),
    "cuDeviceGetAttribute": (_SIZE, c_int, c_int),
    "cuDevicePrimaryCtxRetain": (_OUT, c_int),
    "cuCtxSetCurrent": (c_void_p,),
    "cuMemAlloc_v2": (POINTER(c_uint64), c_size_t),
    "cuMemFree_v2": (c_uint64,),
    "cuMemcpyHtoDAsync_v2": (c_uint64, c_void_p, c_size_t, c_void_p),
    "cuMemcpyDtoHAsync_v2": (c_void_p, c_uint64, c_size_t, c_void_p),
    "cuStreamCreate": (_OUT, c_uint),
    "cuStreamSynchronize": (c_void_p,),
    "cuStreamBeginCapture_v2": (c_void_p, c_int),
    "cuStreamEndCapture": (c_void_p, _OUT),
    "cuGraphInstantiateWithFlags": (_OUT, c_void_p, c_uint64),
    "cuGraphLaunch": (c_void_p, c_void_p),
    "cuGraphDestroy": (c_void_p,),
    "cuGraphExecDestroy": (c_void_p,),
    "cuEventCreate": (_OUT, c_uint),
    "cuEventRecord": (c_void_p, c_void_p),
    "cuEventSynchronize": (c_void_p,),
    "cuEventElapsedTime": (POINTER(c_float), c_void_p, c_void_p),
}


def unavailable() -> str:
    """Empty when there is an NVIDIA GPU and its driver; else what is missing."""
    try:
        driver = ctypes.CDLL(LIBRARY)
    except OSError:
        return f"no NVIDIA driver on this machine ({LIBRARY} is absent)"
    count = c_int(0)
    if driver.cuInit(0) or driver.cuDeviceGetCount(byref(count)) or count.value == 0:
        return "the NVIDIA driver finds no GPU: is one visible to this process?"
    return ""


@functools.lru_cache(maxsize=None)
def gpu() -> Gpu:
    """The first visible GPU, opened once per process. Raises NasctlError when there is none."""
    if missing := unavailable():
        raise NasctlError(missing)
    return Gpu(ctypes.CDLL(LIBRARY))


class Buffer:
    """Bytes on the GPU, freed with the object."""

    def __init__(self, gpu: Gpu, size: int) -> None:
        pointer = c_uint64()
        gpu.call("cuMemAlloc_v2", byref(pointer), max(size, 1))
        self.pointer = int(pointer.value)
        weakref.finalize(self, gpu.call, "cuMemFree_v2", self.pointer)


class Gpu:
    """A GPU with a stream of its own in the context that all libraries of the process share."""

    def __init__(self, driver: ctypes.CDLL) -> None:
        self._driver = driver
        for name, types in SIGNATURES.items():
            getattr(driver, name).argtypes = types
        self.call("cuInit", 0)
        self._device = self._int("cuDeviceGet", 0)
        self.call("cuCtxSetCurrent", self._handle("cuDevicePrimaryCtxRetain", self._device))
        self.stream = self._handle("cuStreamCreate", NON_BLOCKING).value
        self._start, self._end = self._handle("cuEventCreate", 0), self._handle("cuEventCreate", 0)

    @property
    def name(self) -> str:
        text = ctypes.create_string_buffer(256)
        self.call("cuDeviceGetName", text, len(text), self._device)
        return text.value.decode()

    @property
    def capability(self) -> str:
        major, minor = (
            self._int("cuDeviceGetAttribute", at, self._device) for at in (MAJOR, MINOR)
        )
        return f"{major}.{minor}"

    @property
    def driver_version(self) -> int:
        """The CUDA version that the driver supports, 12040 for 12.4."""
        return self._int("cuDriverGetVersion")

    def call(self, name: str, *arguments: object) -> None:
        """Call the driver. Raises NasctlError with its own words when it reports an error."""
        code = getattr(self._driver, name)(*arguments)
        if code:
            text = c_char_p()
            self._driver.cuGetErrorString(code, byref(text))
            said = text.value.decode() if text.value else f"error {code}"
            raise NasctlError(f"{name} failed ({said})", where="CUDA")

    def upload(self, values: np.ndarray, buffer: Buffer) -> None:
        """Copy a contiguous array to the GPU and wait for it."""
        arguments = (buffer.pointer, values.ctypes.data, values.nbytes, self.stream)
        self.call("cuMemcpyHtoDAsync_v2", *arguments)
        self.synchronize()

    def download(self, buffer: Buffer, values: np.ndarray) -> None:
        """Fill a contiguous array from the GPU, after the work before it."""
        arguments = (values.ctypes.data, buffer.pointer, values.nbytes, self.stream)
        self.call("cuMemcpyDtoHAsync_v2", *arguments)
        self.synchronize()

    def synchronize(self) -> None:
        self.call("cuStreamSynchronize", self.stream)

    def captured(self, enqueue: Call) -> Call:
        """What `enqueue` puts on the stream as one CUDA graph: a call that launches it."""
        graph = c_void_p()
        self.call("cuStreamBeginCapture_v2", self.stream, THREAD_LOCAL)
        try:
            enqueue()
        except BaseException:  # the stream must leave capture mode whatever happened
            with contextlib.suppress(NasctlError):
                self.call("cuStreamEndCapture", self.stream, byref(graph))
            raise
        self.call("cuStreamEndCapture", self.stream, byref(graph))
        ready = self._handle("cuGraphInstantiateWithFlags", graph, 0)
        self.call("cuGraphDestroy", graph)

        def launch() -> None:
            self.call("cuGraphLaunch", ready, self.stream)

        weakref.finalize(launch, self.call, "cuGraphExecDestroy", ready)
        return launch

    def seconds(self, enqueue: Call, *, ahead: Call | None = None) -> float:
        """GPU time of what `enqueue` puts on the stream, between two events.

        `ahead` is work put before the first event, so that the GPU is busy while the host enqueues
        the rest: otherwise the time includes the gap until the launch arrives, some microseconds.
        """
        if ahead:
            ahead()
        self.call("cuEventRecord", self._start, self.stream)
        enqueue()
        self.call("cuEventRecord", self._end, self.stream)
        self.call("cuEventSynchronize", self._end)
        elapsed_ms = c_float()
        self.call("cuEventElapsedTime", byref(elapsed_ms), self._start, self._end)
        return elapsed_ms.value / 1e3

    def _handle(self, name: str, *arguments: object) -> c_void_p:
        handle = c_void_p()
        self.call(name, byref(handle), *arguments)
        return handle

    def _int(self, name: str, *arguments: object) -> int:
        value = c_int()
        self.call(name, byref(value), *arguments)
        return value.value
