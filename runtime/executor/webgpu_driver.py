"""A GPU through WebGPU as wgpu-native implements it (package wgpu): Vulkan, Metal or Direct3D 12 below.

https://www.w3.org/TR/webgpu/. WebGPU has buffers and no addresses: here an address is the number of a buffer
and a place in it. Commands are collected and sent when a result is asked for.
"""

from __future__ import annotations

import os
import re
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from ...ir.errors import ArtifactError, DeviceError, InputError, LlmcError
from ..memory import available_memory
from .gpu_program import Given, round_up

ON_CPU = "LLMC_WEBGPU_CPU"
"""Variable of the environment: 1 takes a driver that is a processor (Mesa's lavapipe), slow, for tests."""
_SHIFT = 40
"""Bits of a place in a buffer."""
_LEAST = 16
_MOST_BLOCKS = 65535
"""Of a dispatch along an axis (`maxComputeWorkgroupsPerDimension`, which no implementation raises)."""
_LIMITS = (
    "max-storage-buffer-binding-size",
    "max-buffer-size",
    "max-storage-buffers-per-shader-stage",
    "max-compute-workgroup-storage-size",
    "max-compute-invocations-per-workgroup",
    "max-compute-workgroup-size-x",
)
_BACKENDS = ("Vulkan", "Metal", "D3D12")
_KINDS = ("DiscreteGPU", "IntegratedGPU", "Unknown", "CPU")
"""Of drivers and adapters, in the order of preference."""
_AT_ONCE = 128
"""Launches that are sent together: systems end what keeps a GPU from drawing for seconds."""
_STAGING = 4 << 20
"""Bytes that downloads share at least."""
_FOLDS = re.compile(r"\.z \* \w+\.x \+ \w+\.x")
"""In a kernel whose blocks go on along the third axis where they are more than an axis has."""
_COMPUTE = 4
"""`GPUShaderStage.COMPUTE`."""
_PART = 16 << 20
"""Bytes that are written to the GPU at once."""
_SHARE = 0.7
"""Of the memory that the system has free: WebGPU does not tell what a GPU has."""


def why_absent() -> str | None:
    """What keeps this machine from running WGSL kernels; None where nothing does."""
    try:
        import wgpu
    except ImportError:
        return "the package wgpu is not installed (pip install 'llmc[webgpu]')"
    try:
        return None if _adapter(wgpu) is not None else "no driver of Vulkan, Metal or Direct3D 12 has a GPU"
    except (wgpu.GPUError, OSError, RuntimeError) as error:
        return f"WebGPU does not start ({error})"


def _adapter(wgpu: Any) -> Any:
    """The GPU: the first that is no processor, else the processor's own driver where `ON_CPU` asks for it."""
    found = [a for a in wgpu.gpu.enumerate_adapters_sync() if a.info["backend_type"] in _BACKENDS]
    if os.environ.get(ON_CPU) != "1":
        found = [a for a in found if a.info["adapter_type"] != "CPU"]

    def place(adapter: Any) -> tuple[int, int]:
        kind, backend = adapter.info["adapter_type"], adapter.info["backend_type"]
        return _KINDS.index(kind) if kind in _KINDS else len(_KINDS), _BACKENDS.index(backend)

    return min(found, key=place, default=None)


class WebGpuDriver:
    """The first GPU. One thread at a time.

    Raises InputError where there is none; its methods DeviceError where the GPU, or its driver, does no more.
    """

    apart = True

    def __init__(self) -> None:
        remedy = "compile for tvm-cpu, or run it where there is a GPU and its driver"
        if (why := why_absent()) is not None:
            raise InputError(why, remedy=remedy)
        import wgpu

        self._wgpu, self._errors = wgpu, (wgpu.GPUError, RuntimeError)
        adapter = _adapter(wgpu)
        self.name = str(adapter.info["device"])
        self.backend = str(adapter.info["backend_type"])
        limits = {name: adapter.limits[name] for name in _LIMITS if name in adapter.limits}
        try:
            self._device: Any = adapter.request_device_sync(required_limits=limits)
        except self._errors as error:
            raise InputError(f"{self.name} does not start ({error})", remedy=remedy) from None
        self._queue: Any = self._device.queue
        self.most_bound = min(limits["max-storage-buffer-binding-size"], limits["max-buffer-size"])
        self._buffers: dict[int, Any] = {}
        self._next = 1
        self._encoder: Any = None
        self._pass: Any = None
        self._launched = 0
        self._unsent = 0
        """Bytes that were written and wait, in memory of their own, for what is sent next."""
        self._staging: list[_Staging] = []
        self._tick = self.allocate(_LEAST)

    def enter(self) -> None:
        """Nothing: a device belongs to no thread."""

    @contextmanager
    def _told(self) -> Generator[None]:
        """Errors of wgpu-native as ours. What was being collected is dropped: it cannot be sent."""
        try:
            yield
        except self._errors as error:
            self._encoder = self._pass = None
            self._staging.clear()
            raise DeviceError(
                f"{self.name}: {error}", remedy="start again; see the system's messages"
            ) from None

    # -- memory --------------------------------------------------------------------------------------------
    def free_bytes(self) -> int:
        """Of the machine's memory: what a GPU of its own has is not told."""
        return int(available_memory() * _SHARE)

    def allocate(self, size: int) -> int:
        """The address of new memory, of zeros. Raises LlmcError where there is not so much."""
        wanted = max(_LEAST, round_up(size, _LEAST))
        if wanted > self.most_bound:
            raise LlmcError(
                f"{self.name} gives kernels arrays of at most {self.most_bound >> 20} MiB, "
                f"{wanted >> 20} are wanted",
                remedy="lower kv_tokens or the context; a weight this large runs on tvm-cpu",
            )
        usage = self._wgpu.BufferUsage
        kinds = usage.STORAGE | usage.COPY_SRC | usage.COPY_DST
        with self._told():
            try:
                buffer = self._device.create_buffer(size=wanted, usage=kinds)
            except self._wgpu.GPUOutOfMemoryError as error:
                raise LlmcError(
                    f"{self.name} has no {wanted >> 20} MiB of memory left ({error})",
                    remedy="lower kv_tokens, the context or max_sequences, or end what else uses the GPU",
                ) from None
        number, self._next = self._next, self._next + 1
        self._buffers[number] = buffer
        return number << _SHIFT

    def free(self, address: int) -> None:
        """Give memory back; what was asked for before has been sent, and still reads it."""
        with self._told():
            self._send()
            self._buffers.pop(address >> _SHIFT).destroy()

    def pinned(self, size: int) -> np.ndarray:
        """uint8 [size] of this machine's memory."""
        return np.zeros(max(1, size), np.uint8)

    def _place(self, address: int) -> tuple[Any, int]:
        return self._buffers[address >> _SHIFT], address & ((1 << _SHIFT) - 1)

    def zero(self, address: int, size: int) -> None:
        if size:
            buffer, at = self._place(address)
            with self._told():
                self._commands().clear_buffer(buffer, at, round_up(size, 4))

    def upload(self, address: int, array: np.ndarray) -> None:
        """Copy an array to the GPU, after what was asked for before."""
        if not array.nbytes:
            return
        buffer, at = self._place(address)
        data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        if rest := len(data) % 4:  # copies are of four bytes: an allocation is longer than what is in it
            data = np.concatenate([data, np.zeros(4 - rest, np.uint8)])
        with self._told():
            self._send()
            for first in range(0, len(data), _PART):
                part = data[first : first + _PART]
                self._queue.write_buffer(buffer, at + first, part)
                self._unsent += len(part)
                if self._unsent >= _PART:
                    self._submit([])

    def download(self, array: np.ndarray, address: int) -> None:
        """Copy from the GPU; what the array holds counts after `wait`."""
        if not array.nbytes:
            return
        buffer, at = self._place(address)
        size = round_up(array.nbytes, 4)
        with self._told():
            if not self._staging or not self._staging[-1].holds(size):
                usage, length = self._wgpu.BufferUsage, max(size, _STAGING)
                made = self._device.create_buffer(size=length, usage=usage.MAP_READ | usage.COPY_DST)
                self._staging.append(_Staging(made, length))
            staging = self._staging[-1]
            self._commands().copy_buffer_to_buffer(buffer, at, staging.buffer, staging.used, size)
            staging.add(array, size)

    def copy(self, to: int, source: int, size: int) -> None:
        """From memory of the GPU to other memory of it; bytes by four."""
        (a, at), (b, into) = self._place(source), self._place(to)
        with self._told():
            if a is not b:
                self._commands().copy_buffer_to_buffer(a, at, b, into, size)
                return
            # A buffer is not copied to itself.
            usage = self._wgpu.BufferUsage
            between = self._device.create_buffer(size=size, usage=usage.COPY_SRC | usage.COPY_DST)
            self._commands().copy_buffer_to_buffer(a, at, between, 0, size)
            self._commands().copy_buffer_to_buffer(between, 0, b, into, size)

    def wait(self) -> None:
        """Until all that was asked for is done."""
        if not self._staging:  # what is got last comes when all before it is done
            self.download(np.zeros(4, np.uint8), self._tick)
        with self._told():
            self._send()
            staging, self._staging = self._staging, []
            for one in staging:
                one.give()

    # -- commands ------------------------------------------------------------------------------------------
    def _commands(self) -> Any:
        """The encoder of commands, outside of a pass."""
        if self._pass is not None:
            ended, self._pass = self._pass, None
            ended.end()
        if self._encoder is None:
            self._encoder = self._device.create_command_encoder()
        return self._encoder

    def _send(self) -> None:
        if self._encoder is not None:
            encoder, self._encoder = self._commands(), None
            self._launched = 0
            self._submit([encoder.finish()])

    def _submit(self, commands: Sequence[Any]) -> None:
        self._queue.submit(commands)
        self._unsent = 0

    # -- kernels -------------------------------------------------------------------------------------------
    def load(self, text: str) -> Mapping[str, str]:
        """Function → its module in WGSL."""
        return modules_of(text)

    def function(self, module: Mapping[str, str], name: str, shared: int) -> Any:
        """The pipeline of a kernel. Raises ArtifactError for one that is not there, or that the GPU's driver
        does not take.
        """
        if name not in module:
            raise ArtifactError(f"the kernels hold no {name}", remedy="compile the model again")
        try:
            shader = self._device.create_shader_module(code=module[name])
            bound = self._device.create_bind_group_layout(entries=_bound(module[name]))
            layout = self._device.create_pipeline_layout(bind_group_layouts=[bound])
            stage = {"module": shader, "entry_point": "main"}
            folds = _FOLDS.search(module[name]) is not None
            return self._device.create_compute_pipeline(layout=layout, compute=stage), bound, folds
        except self._errors as error:
            raise ArtifactError(
                f"{self.name} does not take kernel {name}: {str(error).strip()[:300]}",
                remedy="update the driver and wgpu, compile the model again, or compile it for tvm-cpu",
            ) from None

    def prepare(
        self, function: Any, grid: Sequence[int], block: int, shared: int, given: Sequence[Given]
    ) -> Any:
        """A launch, to be repeated: pipeline, what is bound, and blocks."""
        pipeline, layout, folds = function
        x, y, z = grid
        if folds and x > _MOST_BLOCKS:  # it goes on along the third axis
            z = -(-x // _MOST_BLOCKS)
            x = -(-x // z)
        if max(x, y, z) > _MOST_BLOCKS:
            raise InputError(f"a step needs {x * y * z} blocks", remedy="send fewer tokens in a step")
        numbers = [value for kind, value in given if kind != "address"]
        sizes = np.array([*numbers, grid[0] - 1], np.int64).astype(np.int32)
        entries: list[dict[str, Any]] = []
        for kind, value in given:
            if kind == "address":
                buffer, at = self._place(value)
                bound = {"buffer": buffer, "offset": at, "size": buffer.size - at}
                entries.append({"binding": len(entries), "resource": bound})
        with self._told():
            uniform = self._device.create_buffer_with_data(data=sizes, usage=self._wgpu.BufferUsage.UNIFORM)
            bound = {"buffer": uniform, "offset": 0, "size": uniform.size}
            entries.append({"binding": len(entries), "resource": bound})
            return pipeline, self._device.create_bind_group(layout=layout, entries=entries), (x, y, z)

    def launch(self, prepared: Any) -> None:
        self.replay([prepared])

    def recorded(self, launches: Sequence[Any]) -> Sequence[Any]:
        """The launches themselves: commands of WebGPU are sent once."""
        return launches

    def replay(self, executable: Sequence[Any]) -> None:
        with self._told():
            for pipeline, group, grid in executable:
                if self._pass is None:
                    self._pass = self._commands().begin_compute_pass()
                self._pass.set_pipeline(pipeline)
                self._pass.set_bind_group(0, group)
                self._pass.dispatch_workgroups(*grid)
                self._launched += 1
                if self._launched >= _AT_ONCE:
                    self._send()

    def forget(self, executable: Sequence[Any]) -> None:
        """Nothing is held."""


class _Staging:
    """Memory that downloads go through."""

    def __init__(self, buffer: Any, length: int) -> None:
        self.buffer, self.used, self._length = buffer, 0, length
        self._parts: list[tuple[np.ndarray, int]] = []

    def holds(self, size: int) -> bool:
        return self.used + size <= self._length

    def add(self, array: np.ndarray, size: int) -> None:
        """An array that is copied to `used`, in `size` bytes."""
        self._parts.append((array, self.used))
        self.used += size

    def give(self) -> None:
        """Wait for what was copied, and give it to the arrays."""
        self.buffer.map_sync("READ", 0, self.used)
        content = np.frombuffer(self.buffer.read_mapped(0, self.used), np.uint8)
        for array, at in self._parts:
            array.reshape(-1).view(np.uint8)[:] = content[at : at + array.nbytes]
        self.buffer.destroy()


def _bound(text: str) -> list[dict[str, Any]]:
    """What a module binds. Said, and not left to wgpu, which leaves out what is not used."""
    kinds = {"storage, read": "read-only-storage", "storage, read_write": "storage", "uniform": "uniform"}
    return [
        {"binding": int(place), "visibility": _COMPUTE, "buffer": {"type": kinds[kind]}}
        for place, kind in re.findall(r"@binding\((\d+)\) var<([\w, ]+)>", text)
    ]


def modules_of(text: str) -> dict[str, str]:
    """Function → its module, of what `codegen/tvm/wgsl/text.py` wrote."""
    parts = re.split(r"^//// (\w+)\n", text, flags=re.MULTILINE)[1:]
    return dict(zip(parts[::2], parts[1::2], strict=True))
