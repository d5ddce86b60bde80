"""The WGSL kernels on this machine's driver, against float64 and the ops' meanings: the checks of the CUDA
kernels (`test_cuda_kernels.py`), which have the same arrays.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from llmc.codegen.tvm.webgpu import TvmWebGpu
from llmc.codegen.tvm.wgsl.kernels import MAKERS

from . import test_cuda_kernels as shared
from . import test_cuda_state_kernels as states
from .webgpu_device import WebGpuDevice

KV = TvmWebGpu.kv_dtypes
CASES = [name for name, case in shared.CASES.items() if case["dtype"] in KV and case["dim"] % 2 == 0]


@pytest.fixture(scope="module")
def gpu() -> WebGpuDevice:
    makers = SimpleNamespace(**MAKERS)
    codes = shared.product_codes(makers) | shared.small_codes(makers, KV)
    codes |= {name.replace(" ", "_"): states.code_of(name, MAKERS) for name in states.CASES}
    return WebGpuDevice(codes | shared.attention_codes(makers, CASES))


@pytest.mark.parametrize("form", shared.FORMS)
def test_products(gpu: WebGpuDevice, form: str) -> None:
    shared.test_products_equal_float64_and_do_not_depend_on_their_batch(gpu, form)


def test_rows_of_tables(gpu: WebGpuDevice) -> None:
    shared.test_rows_of_tables_are_exact(gpu)


@pytest.mark.parametrize(("rows", "width", "k"), [(1, 5, 5), (40, 130, 8)])
def test_top_k(gpu: WebGpuDevice, rows: int, width: int, k: int) -> None:
    shared.test_top_k_takes_equal_values_in_their_order_and_nan_first(gpu, rows, width, k)


@pytest.mark.parametrize("tokens", [1, 23, 300])
def test_pairs_are_sorted_by_expert(gpu: WebGpuDevice, tokens: int) -> None:
    shared.test_pairs_are_sorted_by_expert(gpu, tokens)


@pytest.mark.parametrize("form", shared.MOES)
def test_products_by_experts(gpu: WebGpuDevice, form: str) -> None:
    shared.test_products_by_experts(gpu, form)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("gate", shared.GATES)
def test_gates_of_experts_and_their_sums(gpu: WebGpuDevice, gate: str, bias: bool) -> None:
    shared.test_gates_of_experts_and_their_sums(gpu, gate, bias)


def test_norms(gpu: WebGpuDevice) -> None:
    shared.test_norms(gpu)


@pytest.mark.parametrize("name", shared.ROPES)
def test_rope(gpu: WebGpuDevice, name: str) -> None:
    shared.test_rope(gpu, name)


@pytest.mark.parametrize("name", shared.ACTIVATIONS)
def test_activations_and_gates(gpu: WebGpuDevice, name: str) -> None:
    shared.test_activations_and_gates(gpu, name)


@pytest.mark.parametrize("dim", [20, 64, 256])
@pytest.mark.parametrize("dtype", KV)
def test_append_kv(gpu: WebGpuDevice, dtype: str, dim: int) -> None:
    shared.test_append_kv_writes_the_bytes_of_its_meaning(gpu, dtype, dim)


@pytest.mark.parametrize("name", CASES)
def test_attention(gpu: WebGpuDevice, name: str) -> None:
    shared.test_attention_equals_its_meaning_alone_and_in_steps_of_few_and_many(gpu, name)


@pytest.mark.parametrize("name", ["window", "both_window", "odd"])
def test_a_broken_token_or_sequence_disturbs_no_other(gpu: WebGpuDevice, name: str) -> None:
    shared.test_a_broken_token_or_sequence_disturbs_no_other(gpu, name)


@pytest.mark.parametrize("finite", [True, False])
@pytest.mark.parametrize("name", ["window", "both_window"])
def test_pages_before_a_window_do_not_count(gpu: WebGpuDevice, name: str, finite: bool) -> None:
    shared.test_pages_before_a_window_do_not_count(gpu, name, finite)


@pytest.mark.parametrize("name", list(states.CASES))
def test_recurrences(gpu: WebGpuDevice, name: str) -> None:
    states.test_recurrence_equals_its_definition(gpu, name)
