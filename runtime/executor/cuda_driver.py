"""NVIDIA's driver through ctypes: memory, copies and launches of one GPU. Nothing else of CUDA is needed.

CUDA Driver API, https://docs.nvidia.com/cuda/cuda-driver-api/.
"""

from __future__ import annotations

import ctypes
import math
import sys
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np

from ...ir.errors import ArtifactError, DeviceError, InputError, LlmcError

_MAJOR, _MINOR, _SHARED_OPTIN = 75, 76, 97
"""`CUdevice_attribute`: compute capability, shared memory that a block may opt in to."""
_DYNAMIC_SHARED = 8
"""`CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES`."""
_THREAD_LOCAL = 1
"""`CU_STREAM_CAPTURE_MODE_THREAD_LOCAL`: other threads may do what they like meanwhile."""
_OUT_OF_MEMORY = 2
_FATAL = {700, 702, 709, 710, *range(714, 720), 999}
"""After these (an illegal address, a timeout, …) every call fails (`CUresult`)."""
_DEFAULT_SHARED = 48 * 1024
_C_TYPES = {"address": ctypes.c_uint64, "int32": ctypes.c_int32, "int64": ctypes.c_int64}
_NAME = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"


def why_absent() -> str | None:
    """What keeps this machine from running CUDA kernels; None where nothing does."""
    try:
        library = ctypes.CDLL(_NAME)
    except OSError:
        return f"there is no NVIDIA driver ({_NAME})"
    count = ctypes.c_int()
    status = library.cuInit(0) or library.cuDeviceGetCount(ctypes.byref(count))
    if status != 0:
        return f"the NVIDIA driver does not start (error {status})"
    return None if count.value else "there is no NVIDIA GPU"


class Driver:
    """One GPU, its primary context and a stream in which everything runs in order. One thread at a time, and
    `enter` makes that thread the one.

    Raises InputError where there is no GPU.
    """

    apart = False

    def __init__(self, library: str | None = None) -> None:
        """`library`: the driver, where it is not the system's."""
        if library is None and (why := why_absent()) is not None:
            raise InputError(why, remedy="compile for tvm-cpu, or run it where there is a GPU")
        self._cuda = ctypes.CDLL(library or _NAME)
        self._call("cuInit", ctypes.c_uint(0))
        handle, self._context, self._stream = ctypes.c_int(), ctypes.c_void_p(), ctypes.c_void_p()
        self._call("cuDeviceGet", ctypes.byref(handle), ctypes.c_int(0))
        self._device = handle
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), handle)
        self.enter()
        self._call("cuStreamCreate", ctypes.byref(self._stream), ctypes.c_uint(1))  # beside the default one
        self._held: set[int] = set()
        weakref.finalize(self, _release, self._cuda, self._context, self._held)
        self.capability = (self._attribute(_MAJOR), self._attribute(_MINOR))
        self.most_shared = self._attribute(_SHARED_OPTIN)
        name = ctypes.create_string_buffer(128)
        self._call("cuDeviceGetName", name, ctypes.c_int(len(name)), handle)
        self.name = name.value.decode(errors="replace")

    def _call(self, function: str, *arguments: Any) -> None:
        status = getattr(self._cuda, function)(*arguments)
        if status == 0:
            return
        text = ctypes.c_char_p()
        self._cuda.cuGetErrorString(ctypes.c_int(status), ctypes.byref(text))
        why = text.value.decode(errors="replace") if text.value else f"error {status}"
        if status == _OUT_OF_MEMORY:
            raise LlmcError(
                "the GPU's memory is full",
                remedy="lower kv_tokens, the context or max_sequences, or end what else uses the GPU",
            )
        kind = DeviceError if status in _FATAL else LlmcError
        raise kind(f"{function}: {why}", remedy="start again; see the driver's messages (dmesg)")

    def _attribute(self, which: int) -> int:
        value = ctypes.c_int()
        self._call("cuDeviceGetAttribute", ctypes.byref(value), ctypes.c_int(which), self._device)
        return value.value

    def enter(self) -> None:
        """Make the GPU's context the calling thread's."""
        self._call("cuCtxSetCurrent", self._context)

    # -- memory --------------------------------------------------------------------------------------------
    def free_bytes(self) -> int:
        """Bytes of the GPU's memory that nobody uses."""
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        self._call("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
        return free.value

    def allocate(self, size: int) -> int:
        """The address of new memory on the GPU, aligned to 256 bytes."""
        address = ctypes.c_uint64()
        self._call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(max(1, size)))
        self._held.add(address.value)
        return address.value

    def free(self, address: int) -> None:
        self._held.discard(address)
        self._call("cuMemFree_v2", ctypes.c_uint64(address))

    def pinned(self, size: int) -> np.ndarray:
        """uint8 [size] in this machine's memory that copies reach without a stop; kept until the process
        ends.
        """
        address = ctypes.c_void_p()
        self._call("cuMemHostAlloc", ctypes.byref(address), ctypes.c_size_t(max(1, size)), ctypes.c_uint(0))
        assert address.value is not None
        return np.ctypeslib.as_array((ctypes.c_uint8 * max(1, size)).from_address(address.value))

    def zero(self, address: int, size: int) -> None:
        if size:
            self._call(
                "cuMemsetD8Async",
                ctypes.c_uint64(address),
                ctypes.c_ubyte(0),
                ctypes.c_size_t(size),
                self._stream,
            )

    def upload(self, address: int, array: np.ndarray) -> None:
        """Copy an array, which must stay as it is until `wait`, to the GPU."""
        if array.nbytes:
            self._call(
                "cuMemcpyHtoDAsync_v2",
                ctypes.c_uint64(address),
                ctypes.c_void_p(array.ctypes.data),
                ctypes.c_size_t(array.nbytes),
                self._stream,
            )

    def download(self, array: np.ndarray, address: int) -> None:
        """Copy from the GPU; what the array holds counts after `wait`."""
        if array.nbytes:
            self._call(
                "cuMemcpyDtoHAsync_v2",
                ctypes.c_void_p(array.ctypes.data),
                ctypes.c_uint64(address),
                ctypes.c_size_t(array.nbytes),
                self._stream,
            )

    def copy(self, to: int, source: int, size: int) -> None:
        """From memory of the GPU to other memory of it."""
        self._call(
            "cuMemcpyDtoDAsync_v2",
            ctypes.c_uint64(to),
            ctypes.c_uint64(source),
            ctypes.c_size_t(size),
            self._stream,
        )

    def wait(self) -> None:
        """Until all that was asked for is done."""
        self._call("cuStreamSynchronize", self._stream)

    # -- kernels -------------------------------------------------------------------------------------------
    def load(self, image: bytes) -> ctypes.c_void_p:
        """A module of kernels. Raises ArtifactError for code that this driver does not take."""
        module = ctypes.c_void_p()
        try:
            self._call("cuModuleLoadData", ctypes.byref(module), ctypes.c_char_p(image))
        except LlmcError as error:
            raise ArtifactError(
                f"the driver of {self.name} does not take the kernels ({error.message})",
                remedy="update the driver: it must not be older than the CUDA that compiled them",
            ) from None
        return module

    def function(self, module: ctypes.c_void_p, name: str, shared: int) -> ctypes.c_void_p:
        """A kernel of a module that may take `shared` bytes of dynamic shared memory.

        Raises ArtifactError for one that is not there, or wants more than the GPU has.
        """
        found = ctypes.c_void_p()
        if shared > self.most_shared:
            raise ArtifactError(
                f"kernel {name} wants {shared} bytes of shared memory, "
                f"a block of {self.name} has {self.most_shared}",
                remedy="compile for tvm-cpu or onnx-cuda",
            )
        try:
            self._call("cuModuleGetFunction", ctypes.byref(found), module, name.encode())
        except LlmcError:
            raise ArtifactError(f"the kernels hold no {name}", remedy="compile the model again") from None
        if shared > _DEFAULT_SHARED:
            self._call("cuFuncSetAttribute", found, ctypes.c_int(_DYNAMIC_SHARED), ctypes.c_int(shared))
        return found

    def prepare(
        self,
        function: ctypes.c_void_p,
        grid: Sequence[int],
        block: int,
        shared: int,
        given: Sequence[tuple[str, int]],
    ) -> Launch:
        """A launch, to be repeated. `given`: see `gpu_program.Given`."""
        return Launch(function, grid, block, shared, [_C_TYPES[kind](value) for kind, value in given])

    def launch(self, prepared: Launch) -> None:
        self._call("cuLaunchKernel", *prepared.head, self._stream, prepared.parameters, None)

    # -- graphs --------------------------------------------------------------------------------------------
    def recorded(self, launches: Sequence[Launch]) -> ctypes.c_void_p:
        """Launches as one thing to launch, which the driver checks and orders once (CUDA graphs).

        Raises LlmcError where it cannot.
        """
        graph, executable = ctypes.c_void_p(), ctypes.c_void_p()
        self._call("cuStreamBeginCapture_v2", self._stream, ctypes.c_int(_THREAD_LOCAL))
        try:
            for launch in launches:
                self.launch(launch)
        except LlmcError:
            self._cuda.cuStreamEndCapture(self._stream, ctypes.byref(graph))  # it fails too, and says less
            if graph.value:
                self._cuda.cuGraphDestroy(graph)
            raise
        self._call("cuStreamEndCapture", self._stream, ctypes.byref(graph))
        try:
            self._call("cuGraphInstantiateWithFlags", ctypes.byref(executable), graph, ctypes.c_uint64(0))
        finally:
            self._call("cuGraphDestroy", graph)
        return executable

    def replay(self, executable: ctypes.c_void_p) -> None:
        self._call("cuGraphLaunch", executable, self._stream)

    def forget(self, executable: ctypes.c_void_p) -> None:
        """After `wait`."""
        self._call("cuGraphExecDestroy", executable)


def _release(cuda: ctypes.CDLL, context: ctypes.c_void_p, held: set[int]) -> None:
    """Give back the memory of a driver that nobody uses any more; what fails then is of no consequence."""
    cuda.cuCtxSetCurrent(context)
    for address in held:
        cuda.cuMemFree_v2(ctypes.c_uint64(address))


class Launch:
    """A launch with all its arguments, to be repeated."""

    def __init__(
        self,
        function: ctypes.c_void_p,
        grid: Sequence[int],
        block: int,
        shared: int,
        arguments: Sequence[ctypes.c_int32 | ctypes.c_int64 | ctypes.c_uint64],
    ) -> None:
        sizes = (*grid, block, 1, 1, shared)
        if max(grid[1:]) > 65535 or grid[0] >= 1 << 31:
            raise InputError(f"a step needs {math.prod(grid)} blocks", remedy="send fewer tokens in a step")
        self.head = (function, *(ctypes.c_uint(n) for n in sizes))
        self._held = tuple(arguments)
        pointers = [ctypes.cast(ctypes.pointer(a), ctypes.c_void_p) for a in self._held]
        self.parameters = (ctypes.c_void_p * len(pointers))(*pointers)
