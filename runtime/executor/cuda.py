"""Runs target `tvm-cuda` by NVIDIA's driver."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from ...codegen.artifact import Artifact
from ...ir.errors import ArtifactError
from .base import Executor
from .cuda_adapters import CudaAdapters
from .cuda_driver import Driver
from .gpu import GpuExecutor


def choose_image(images: Sequence[Mapping[str, Any]], capability: tuple[int, int]) -> Mapping[str, Any]:
    """The kernels for a GPU: the newest of its own generation that is not newer than it is, else PTX.

    Raises ArtifactError where none runs there.
    """
    major, minor = capability
    own = [
        (arch % 10, image)
        for image in images
        if str(image["arch"]).startswith("sm_")
        and (arch := int(str(image["arch"])[3:])) // 10 == major
        and arch % 10 <= minor
    ]
    if own:
        return max(own, key=lambda found: found[0])[1]
    ptx = [image for image in images if image["arch"] == "ptx"]
    if ptx and major >= 8:
        return ptx[0]
    have = ", ".join(str(image["arch"]) for image in images)
    raise ArtifactError(
        f"the artifact has kernels for {have}, the GPU is sm_{major}{minor}",
        remedy="compile with --target tvm-cuda:arch=all; GPUs before sm_80 are not supported",
    )


class CudaExecutor(GpuExecutor):
    """Used by one thread at a time."""

    target: ClassVar[str] = "tvm-cuda"
    _driver: Driver

    def _load(self, artifact: Artifact, entry: Mapping[str, Any]) -> tuple[str, Any]:
        image = choose_image(entry["images"], self._driver.capability)
        return str(image["arch"]), self._driver.load(artifact.path(image["path"]).read_bytes())

    def _adapter_slots(self) -> CudaAdapters | None:
        if self.adapter_places is None:
            return None
        addresses, arguments = self._addresses, self._arguments

        # Without this executor: a cycle would hold the GPU's memory until it is found.
        def bind(name: str, address: int) -> None:
            addresses[arguments[name]] = address

        return CudaAdapters(self.adapter_places, self._driver, bind, self._program.forget)


def open_target(artifact: Artifact, *, isa: str | None, threads: int | None) -> Executor:
    """Open `tvm-cuda` on the first GPU. Raises InputError where there is none."""
    return CudaExecutor(artifact, Driver())
