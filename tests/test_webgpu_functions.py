"""Modules that are no language models on tvm-webgpu, with what WGSL lacks; and what becomes of errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import llmc
import numpy as np
import pytest
import torch
from llmc.ir.errors import CompileError, DeviceError
from llmc.runtime.executor.webgpu import WebGpuExecutor
from llmc.runtime.executor.webgpu_driver import WebGpuDriver
from torch import nn

from .webgpu_device import driver as any_driver


class Several(nn.Module):
    """An output that the next kernel reads, and one that is an input."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.layer = nn.LayerNorm(24), nn.Linear(24, 40)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        y = self.norm(x)
        return y, self.layer(y) + 1, x


class Kinds(nn.Module):
    """Weights of whole numbers of 64 bits and of truth values."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("order", torch.tensor([5, 1, 3, 0, 2, 4]))
        self.register_buffer("mask", torch.tensor([True, False, True, True, False, False]))
        self.scale = nn.Parameter(torch.tensor([1.5, -2.0, 0.25, 3.0, 7.0, 0.125]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        moved = x * self.order + torch.where(self.mask, x, -x) * self.scale
        return torch.where(moved > 1.0, moved, torch.zeros_like(moved)) + (self.order % 3)


class Picked(nn.Module):
    """Columns in another order."""

    def __init__(self, *order: int) -> None:
        super().__init__()
        self.register_buffer("order", torch.tensor(order))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, self.order] * 2


def executor_of(
    module: nn.Module, folder: Path, driver: WebGpuDriver, **example: torch.Tensor
) -> WebGpuExecutor:
    artifact = llmc.compile(
        module.eval(), folder / "out.llmc", example_inputs=example, targets=["tvm-webgpu"], quant="none"
    )
    return WebGpuExecutor(artifact, driver)


@pytest.fixture(scope="module")
def driver() -> WebGpuDriver:
    return any_driver()


def outputs(found: dict[str, np.ndarray]) -> list[np.ndarray]:
    return list(found.values())


def test_several_outputs(driver: WebGpuDriver, tmp_path: Path) -> None:
    module, x = Several(), torch.randn(7, 24)
    executor = executor_of(module, tmp_path, driver, x=x)
    with torch.no_grad():
        wanted = [y.numpy() for y in module(x)]
    for _ in range(4):  # recorded from the third time on
        for ours, theirs in zip(outputs(executor.run({"x": x.numpy()})), wanted, strict=True):
            assert np.abs(ours - theirs).max() < 2e-3  # weights are float16


@pytest.mark.parametrize("module", [Kinds(), Picked(4, 1, 1, 5)])
def test_weights_of_every_kind(module: nn.Module, driver: WebGpuDriver, tmp_path: Path) -> None:
    x = torch.randn(5, 6)
    executor = executor_of(module, tmp_path, driver, x=x)
    with torch.no_grad():
        wanted = module(x).numpy()
    (ours,) = outputs(executor.run({"x": x.numpy()}))
    assert np.abs(ours - wanted).max() < 1e-5


def test_whole_numbers_beyond_32_bits_are_refused(driver: WebGpuDriver, tmp_path: Path) -> None:
    with pytest.raises(CompileError, match="whole numbers beyond 32 bits"):
        executor_of(Picked(1, 1 << 40), tmp_path, driver, x=torch.randn(5, 6))


def test_a_driver_works_on_after_an_error() -> None:
    driver = any_driver()
    address = driver.allocate(64)
    driver.copy(address, driver.allocate(64), 4096)  # more than there is
    with pytest.raises(DeviceError):
        driver.wait()
    sent, got = np.arange(16, dtype=np.float32), np.zeros(16, np.float32)
    driver.upload(address, sent)
    driver.download(got, address)
    driver.wait()
    assert np.array_equal(got, sent)


def test_a_lost_device_is_told() -> None:
    driver: Any = any_driver()
    address = driver.allocate(64)
    driver._device.destroy()
    with pytest.raises(DeviceError, match=driver.name.split()[0]):
        driver.upload(address, np.zeros(16, np.float32))
