"""Quantisation to the types of two to five bits, judged by the gguf package's decoder, with and without importances."""

import gguf
import numpy as np
import pytest

from q4kd.trainer.errors import InputError
from q4kd.trainer.formats.blocks import quantize as quantize_module
from q4kd.trainer.formats.blocks.quantize import BLOCK, quantize, round_trip_error

# The relative error of normal weights: a bound just above ours, and what a quantiser without a search reaches.
NORMAL = {"Q2_K": 0.2670, "Q3_K": 0.1460, "Q5_0": 0.0405, "Q4_0": 0.0821, "IQ4_NL": 0.0744, "IQ4_XS": 0.0750}
FITTED = tuple(NORMAL)
SCALED = ("Q2_K", "Q3_K", "IQ4_XS")


def dequantize(stored: np.ndarray, name: str) -> np.ndarray:
    return gguf.quants.dequantize(stored, gguf.GGMLQuantizationType[name])


def normal(rows: int, cols: int = 256, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, cols)).astype(np.float32)


def without_search(weights: np.ndarray, name: str) -> float:
    """The error where each sub-block's peak is put at the end of the grid, the scales unrounded."""
    sub_block = 16 if name in ("Q2_K", "Q3_K") else 32
    x = weights.reshape(-1, sub_block).astype(np.float64)
    if name == "Q2_K":
        low = np.minimum(x.min(1, keepdims=True), 0)
        step = (x.max(1, keepdims=True) - low) / 3
        decoded = low + step * np.rint((x - low) / step)
    else:
        peak = np.take_along_axis(x, np.abs(x).argmax(1)[:, None], 1)
        if name.startswith("IQ4"):
            levels = np.array(gguf.quants.IQ4_NL.kvalues)
            scaled = x / (peak / -127)
            decoded = levels[np.abs(scaled[..., None] - levels).argmin(-1)] * (peak / -127)
        else:
            low = {"Q3_K": -4, "Q4_0": -8, "Q5_0": -16}[name]
            decoded = np.clip(np.rint(x / (peak / low)), low, -low - 1) * (peak / low)
    return float(np.linalg.norm(x - decoded) / np.linalg.norm(x))


@pytest.mark.parametrize("name", FITTED)
def test_normal_weights_beat_the_bound_that_a_quantiser_without_search_fails(name: str) -> None:
    weights = normal(512)
    assert round_trip_error(weights, name) < NORMAL[name] < without_search(weights, name)


@pytest.mark.parametrize("name", BLOCK)
def test_every_position_decodes_to_itself(name: str) -> None:
    """A value that is large at one place only must come back at that place: no nibble, bit or scale is swapped."""
    weights = np.eye(256, dtype=np.float32)
    np.testing.assert_allclose(dequantize(quantize(weights, name), name), weights, atol=1e-2)
    np.testing.assert_allclose(dequantize(quantize(-weights, name), name), -weights, atol=1e-2)


@pytest.mark.parametrize("name", FITTED)
def test_layout_keeps_rows_and_blocks_apart(name: str) -> None:
    weights = normal(6, 768, seed=2) * np.float32([[1], [10], [100], [0], [0.1], [1]])
    stored = quantize(weights, name)
    width, size = BLOCK[name]
    assert stored.shape == (6, 768 // width * size)
    apart = np.concatenate(
        [quantize(np.ascontiguousarray(part), name) for part in np.split(weights, 3, axis=1)], axis=1
    )
    np.testing.assert_array_equal(stored, apart)
    assert not dequantize(stored, name)[3].any()


@pytest.mark.parametrize("name", FITTED)
def test_chunks_do_not_change_the_result(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weights, importance = normal(13, 512), np.abs(normal(1, 512, seed=3))[0]
    whole = quantize(weights, name, importance)
    monkeypatch.setattr(quantize_module, "_CHUNK_WEIGHTS", 3 * 256)
    np.testing.assert_array_equal(quantize(weights, name, importance), whole)


@pytest.mark.parametrize("name", SCALED)
def test_every_sub_block_has_a_scale_of_its_own(name: str) -> None:
    """Sub-blocks whose magnitudes differ by up to eight are all kept to about the type's precision."""
    sizes = np.repeat(np.float32([1, 8, 2, 4, 1, 2, 8, 4, 4, 1, 8, 2, 2, 4, 1, 8]), 16)
    if name == "IQ4_XS":
        sizes = np.repeat(sizes[::16][:8], 32)
    weights = normal(64, seed=5)
    decoded = dequantize(quantize(weights * sizes, name), name) / sizes
    errors = np.linalg.norm((decoded - weights).reshape(64, 8, 32), axis=(0, 2)) / np.linalg.norm(weights) * 8**0.5
    assert errors.max() < 1.35 * NORMAL[name]


@pytest.mark.parametrize("name", FITTED)
@pytest.mark.parametrize("value", [0.0, 3.3, -3.3, 6e4, -6e4, 0.3])
def test_constants(name: str, value: float) -> None:
    weights = np.full((2, 512), value, dtype=np.float32)
    np.testing.assert_allclose(dequantize(quantize(weights, name), name), weights, rtol=6e-3)


@pytest.mark.parametrize("name", FITTED)
@pytest.mark.parametrize("scale", [1e-4, 1e3, 6e4])
def test_the_error_does_not_depend_on_the_scale(name: str, scale: float) -> None:
    assert round_trip_error(normal(64) * np.float32(scale), name) < 1.05 * NORMAL[name]


@pytest.mark.parametrize("name", FITTED)
@pytest.mark.parametrize("scale", [1e-15, 1e-38])
def test_weights_below_the_smallest_step_become_zero(name: str, scale: float) -> None:
    weights = normal(4) * np.float32(scale)
    weights[2:] = np.float32(1e-45) * np.sign(weights[2:])
    with np.errstate(over="raise", divide="raise", invalid="raise"):
        stored = quantize(weights, name)
    np.testing.assert_allclose(dequantize(stored, name), 0, atol=1e-6)


@pytest.mark.parametrize("name", [*FITTED, "Q5_1", "Q4_1"])
def test_what_cannot_be_stored_is_refused(name: str) -> None:
    weights = normal(3)
    with pytest.raises(InputError, match="scale"):
        quantize(weights * np.float32(1e9), name)
    for value in (np.nan, np.inf, -np.inf):
        weights[1, 200] = value
        with pytest.raises(InputError, match="finite"):
            quantize(weights, name)
    with pytest.raises(InputError, match=f"multiple of {BLOCK[name][0]}"):
        quantize(normal(2, 255), name)
    assert quantize(np.zeros((0, 256), np.float32), name).shape == (0, 256 // BLOCK[name][0] * BLOCK[name][1])


@pytest.mark.parametrize("name", [*FITTED, "Q4_K", "Q5_K", "Q6_K"])
def test_columns_that_matter_more_come_back_better(name: str) -> None:
    weights, importance = normal(128, 512, seed=6), np.ones(512, np.float32)
    important = np.arange(512) % 8 == 3
    importance[important] = 100

    def error(stored: np.ndarray, columns: np.ndarray) -> float:
        return float(np.linalg.norm((dequantize(stored, name) - weights)[:, columns]))

    plain, weighted = quantize(weights, name), quantize(weights, name, importance)
    assert error(weighted, important) < 0.8 * error(plain, important)
    assert error(weighted, ~important) < 1.5 * error(plain, ~important)
    # Only ratios matter, however large or small; columns without any importance still come back.
    np.testing.assert_array_equal(quantize(weights, name, importance * np.float32(2.0**40)), weighted)
    nothing = quantize(weights, name, np.zeros(512, np.float32))
    assert error(nothing, ~important) < 1.1 * error(plain, ~important)
