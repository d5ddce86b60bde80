"""The maths against plain loops and against round to nearest, and the quantizer through llmc's own checks."""

from __future__ import annotations

import numpy as np
import pytest
from llmc.plugins import InputError
from llmc.plugins.testing import check_pass, check_quantizer, tiny_model
from llmc_half_quadratic import HalfQuadratic, QuantizeHalfQuadratic
from llmc_half_quadratic.maths import POWER, half_quadratic, shrink


def values(found, group: int) -> np.ndarray:
    k = found.codes.shape[1]
    scale, low = (
        np.repeat(part.astype(np.float32), group, 1)[:, :k] for part in (found.scale, found.zero_point)
    )
    return found.codes * scale + low


def heavy_tailed(n: int, k: int) -> np.ndarray:
    """As weights of language models are: most of one size, a few far out."""
    return (0.02 * np.random.default_rng(0).standard_t(4, (n, k))).astype(np.float32)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("k", [64, 128, 100, 8])
def test_no_group_is_worse_than_round_to_nearest_and_most_are_better(bits: int, k: int) -> None:
    w = heavy_tailed(40, k)
    size = {}
    for steps in (0, 12):
        found = half_quadratic(w, bits=bits, group=32, steps=steps)
        assert found.codes.max() < 1 << bits and found.scale.shape == (40, -(-k // 32))
        error = np.abs(w - values(found, 32)) ** POWER
        size[steps] = np.add.reduceat(error, np.arange(0, k, 32), axis=1)
    assert (size[12] <= size[0] * 1.0001).all()
    better = (size[12] < 0.99 * size[0]).mean()
    assert better > 0.5 if k > 8 else better > 0, "eight weights leave little to fit, and some still gain"


def test_weights_on_a_grid_are_kept() -> None:
    rng = np.random.default_rng(1)
    codes = rng.integers(0, 16, (6, 64))
    codes[:, :2] = [0, 15]
    w = (0.25 * codes - 1.5).astype(np.float32)
    found = half_quadratic(w, bits=4, group=64, steps=12)
    np.testing.assert_array_equal(values(found, 64), w)


def test_groups_of_one_value_and_of_zeros() -> None:
    w = np.zeros((2, 32), np.float32)
    w[1] = 0.5
    found = half_quadratic(w, bits=3, group=16, steps=5)
    np.testing.assert_allclose(values(found, 16), w, atol=1e-4)


def test_what_is_shrunk_is_the_minimum_for_large_errors() -> None:
    """Against a search: e of least |e|^p + β/2 (x − e)², where x is far out (first order is exact to 2 %)."""
    for x, beta in ((3.0, 4.0), (-5.0, 2.0), (8.0, 9.0)):
        e = np.linspace(-10, 10, 200_001)
        wanted = e[np.argmin(np.abs(e) ** POWER + beta / 2 * (x - e) ** 2)]
        found = float(shrink(np.array([x]), beta * 1.0 / POWER)[0])
        assert abs(found - wanted) < 0.02 * abs(x)


def test_the_quantizer_keeps_to_what_llmc_asks() -> None:
    errors = {
        s: check_quantizer(HalfQuadratic(), s) for s in ("hqq-int3-g16", "minmax-int3-g16", "hqq-int8-g16")
    }
    assert errors["hqq-int3-g16"] < errors["minmax-int3-g16"] < 0.3
    assert errors["hqq-int8-g16"] < 0.01


def test_the_pass_changes_little_at_eight_bits() -> None:
    assert check_pass(QuantizeHalfQuadratic(bits=8, group=16), tiny_model(layers=1), tolerance=0.05).changed


@pytest.mark.parametrize("options", [{"bits": 1}, {"bits": 9}, {"group": 7}, {"group": 0}, {"steps": -1}])
def test_impossible_options_are_refused(options: dict) -> None:
    with pytest.raises(InputError, match="pass quantize-half-quadratic: bits="):
        QuantizeHalfQuadratic(**options)
