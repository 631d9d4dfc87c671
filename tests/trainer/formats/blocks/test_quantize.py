"""K-quantisation, judged by the gguf package's own decoder and against a quantiser without a search."""

import gguf
import numpy as np
import pytest

from q4kd.trainer.errors import InputError
from q4kd.trainer.formats.blocks import quantize as quantize_module
from q4kd.trainer.formats.blocks.quantize import quantize, round_trip_error

BYTES = {"Q4_K": 144, "Q5_K": 176, "Q6_K": 210}


def dequantize(stored, quant_type):
    return gguf.quants.dequantize(stored, gguf.GGMLQuantizationType[quant_type])


def normal(rows, cols=256, seed=0):
    return np.random.default_rng(seed).standard_normal((rows, cols)).astype(np.float32)


def relative(weights, decoded):
    return float(np.linalg.norm(weights.astype(np.float64) - decoded) / np.linalg.norm(weights.astype(np.float64)))


def naive_q4_k(weights, top=15):
    """Min/max fit, scales rounded to nearest, no search: what a first attempt at Q4_K decodes to."""
    x = weights.reshape(-1, 8, 32)
    m = -np.minimum(x.min(-1), 0)
    s = (x.max(-1) + m) / top
    d = (s.max(-1, keepdims=True) / 63).astype(np.float16).astype(np.float32)
    dmin = (m.max(-1, keepdims=True) / 63).astype(np.float16).astype(np.float32)
    step = (d * np.clip(np.rint(s / d), 0, 63))[..., None]
    floor = (dmin * np.clip(np.rint(m / dmin), 0, 63))[..., None]
    with np.errstate(divide="ignore", invalid="ignore"):
        q = np.where(step > 0, np.clip(np.rint((x + floor) / step), 0, top), 0)
    return (step * q - floor).reshape(weights.shape)


def naive_q5_k(weights):
    return naive_q4_k(weights, top=31)


def naive_q6_k(weights):
    """Largest magnitude to 31, scales rounded to nearest, no search."""
    x = weights.reshape(-1, 16, 16)
    s = np.abs(x).max(-1) / 31
    d = (s.max(-1, keepdims=True) / 127).astype(np.float16).astype(np.float32)
    step = (d * np.rint(s / d))[..., None]
    return (step * np.clip(np.rint(x / step), -32, 31)).reshape(weights.shape)


@pytest.mark.parametrize(
    ("quant_type", "naive", "bound", "margin"),
    [("Q4_K", naive_q4_k, 0.0703, 0.90), ("Q5_K", naive_q5_k, 0.0347, 0.92), ("Q6_K", naive_q6_k, 0.0173, 0.96)],
)
def test_normal_weights_beat_the_bound_that_a_quantiser_without_search_fails(quant_type, naive, bound, margin):
    weights = normal(1024)
    ours, theirs = round_trip_error(weights, quant_type), relative(weights, naive(weights))
    assert ours < bound < theirs
    assert ours < margin * theirs


@pytest.mark.parametrize(("quant_type", "bound"), [("Q4_K", 0.095), ("Q5_K", 0.047), ("Q6_K", 0.026)])
def test_heavy_tails_and_uneven_sub_blocks(quant_type, bound):
    rng = np.random.default_rng(1)
    tails = rng.standard_t(3, size=(256, 256)).astype(np.float32)
    uneven = (normal(256) * np.repeat(np.exp(rng.normal(size=(256, 8))), 32, axis=1)).astype(np.float32)
    assert round_trip_error(tails, quant_type) < bound
    assert round_trip_error(uneven, quant_type) < bound


@pytest.mark.parametrize("quant_type", BYTES)
def test_layout_keeps_rows_and_superblocks_apart(quant_type):
    weights = normal(6, 768, seed=2) * np.float32([[1], [10], [100], [0], [0.1], [1]])
    stored = quantize(weights, quant_type)
    assert stored.dtype == np.uint8
    assert stored.shape == (6, 3 * BYTES[quant_type])
    for row in range(6):
        for block in range(3):
            alone = quantize(weights[row : row + 1, 256 * block : 256 * block + 256], quant_type)
            np.testing.assert_array_equal(stored[row, BYTES[quant_type] * block :][: BYTES[quant_type]], alone[0])


@pytest.mark.parametrize("quant_type", BYTES)
def test_every_position_decodes_to_itself(quant_type):
    """A value that is large at one place only must come back at that place: no nibble or scale is swapped."""
    weights = np.eye(256, dtype=np.float32)
    np.testing.assert_allclose(dequantize(quantize(weights, quant_type), quant_type), weights, atol=2e-3)


@pytest.mark.parametrize("quant_type", BYTES)
def test_chunks_do_not_change_the_result(quant_type, monkeypatch):
    weights = normal(13, 512)
    whole = quantize(weights, quant_type)
    monkeypatch.setattr(quantize_module, "_CHUNK_WEIGHTS", 3 * 256)
    np.testing.assert_array_equal(quantize(weights, quant_type), whole)


def representable_q4_k(rng, blocks, top=15):
    d = rng.uniform(1e-4, 1e-2, (blocks, 1)).astype(np.float16).astype(np.float32)
    dmin = rng.uniform(1e-4, 1e-2, (blocks, 1)).astype(np.float16).astype(np.float32)
    sc, m = rng.integers(32, 64, (blocks, 8)), rng.integers(0, 64, (blocks, 8))
    sc[:, 3], m[:, 5] = 63, 63
    q = rng.integers(0, top + 1, (blocks, 8, 32))
    return (d * sc)[..., None] * q - (dmin * m)[..., None]


def representable_q5_k(rng, blocks):
    return representable_q4_k(rng, blocks, top=31)


def representable_q6_k(rng, blocks):
    d = rng.uniform(1e-4, 1e-2, (blocks, 1)).astype(np.float16).astype(np.float32)
    sc = rng.integers(-127, 128, (blocks, 16))
    sc[:, 7] = -128
    q = rng.integers(-31, 32, (blocks, 16, 16))
    q[:, :, 5] = -32
    return (d * sc)[..., None] * q


@pytest.mark.parametrize(
    ("quant_type", "make", "bound"),
    [("Q4_K", representable_q4_k, 0.01), ("Q5_K", representable_q5_k, 0.01), ("Q6_K", representable_q6_k, 0.002)],
)
def test_representable_weights_come_back(quant_type, make, bound):
    weights = make(np.random.default_rng(3), 200).astype(np.float32).reshape(200, 256)
    assert round_trip_error(weights, quant_type) < bound


@pytest.mark.parametrize(("quant_type", "bound"), [("Q4_K", 0.01), ("Q5_K", 0.01), ("Q6_K", 0.002)])
def test_quantising_twice_changes_little(quant_type, bound):
    once = dequantize(quantize(normal(256), quant_type), quant_type)
    assert round_trip_error(once, quant_type) < bound


@pytest.mark.parametrize("quant_type", BYTES)
@pytest.mark.parametrize("value", [0.0, 3.3, -3.3, 6e4, -6e4, 1e-2])
def test_constants(quant_type, value):
    weights = np.full((2, 512), value, dtype=np.float32)
    np.testing.assert_allclose(dequantize(quantize(weights, quant_type), quant_type), weights, rtol=2e-3)


@pytest.mark.parametrize(("quant_type", "bound"), [("Q4_K", 0.0725), ("Q5_K", 0.0360), ("Q6_K", 0.0195)])
@pytest.mark.parametrize("scale", [1e-5, 1e-3, 1e3, 6e4])
def test_the_error_does_not_depend_on_the_scale(quant_type, bound, scale):
    assert round_trip_error(normal(64) * np.float32(scale), quant_type) < bound


@pytest.mark.parametrize("quant_type", BYTES)
@pytest.mark.parametrize("scale", [4e-9, 1e-15, 1e-30, 1e-38])
def test_weights_below_the_smallest_step_become_zero(quant_type, scale):
    """The smallest step is 2^-24, the least float16 scale times one."""
    weights = normal(4) * np.float32(scale)
    weights[2:] = np.float32(1e-45) * np.sign(weights[2:])
    with np.errstate(over="raise", divide="raise", invalid="raise"):
        stored = quantize(weights, quant_type)
    np.testing.assert_array_equal(dequantize(stored, quant_type), np.zeros_like(weights))


@pytest.mark.parametrize("quant_type", BYTES)
@pytest.mark.parametrize("outlier", [50.0, -1000.0, 6e4])
def test_an_outlier_costs_its_neighbours_little_more_than_it_must(quant_type, outlier):
    """The largest step is outlier / 15 (or / 32); one sub-block's scale is at least that / 63 (or / 128)."""
    weights = normal(64, seed=4)
    weights[:, 7] = outlier
    decoded = dequantize(quantize(weights, quant_type), quant_type)
    np.testing.assert_allclose(decoded[:, 7], outlier, rtol=2e-2)
    others = relative(weights[:, 32:], decoded[:, 32:])
    coarsest = abs(outlier) / {"Q4_K": 15 * 63, "Q5_K": 31 * 63, "Q6_K": 32 * 128}[quant_type]
    assert others < 0.12 + min(1.0, 0.5 * coarsest)


@pytest.mark.parametrize("quant_type", ["Q4_K", "Q5_K", "Q6_K", "Q8_0", "F16", "F32"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(quant_type, value):
    weights = normal(3)
    weights[1, 200] = value
    with pytest.raises(InputError, match="finite"):
        quantize(weights, quant_type)


@pytest.mark.parametrize("quant_type", BYTES)
@pytest.mark.parametrize(
    "weights",
    [
        np.zeros((2, 255), np.float32),
        np.zeros((2, 0), np.float32),
        np.zeros(256, np.float32),
        np.zeros((2, 256), np.float64),
    ],
)
def test_shapes_and_dtypes_without_superblocks_are_refused(quant_type, weights):
    with pytest.raises(InputError, match="multiple of 256"):
        quantize(weights, quant_type)


@pytest.mark.parametrize("quant_type", BYTES)
def test_no_rows_give_no_bytes(quant_type):
    assert quantize(np.zeros((0, 256), np.float32), quant_type).shape == (0, BYTES[quant_type])


@pytest.mark.parametrize("quant_type", [*BYTES, "Q8_0"])
def test_magnitudes_beyond_a_float16_scale_are_refused(quant_type):
    with pytest.raises(InputError, match="scale"):
        quantize(normal(1) * np.float32(1e9), quant_type)


def test_f16_and_f32():
    weights = normal(5, 100)
    np.testing.assert_array_equal(quantize(weights, "F32"), weights)
    np.testing.assert_array_equal(quantize(weights, "F16"), weights.astype(np.float16))
    assert 0 < round_trip_error(weights, "F16") < 5e-4
    assert round_trip_error(weights, "F32") == 0
    assert 0 < round_trip_error(normal(5, 96), "Q8_0") < 0.01
    assert quantize(normal(5, 96), "Q8_0").shape == (5, 3 * 34)
    with pytest.raises(InputError, match="multiple of 32"):
        quantize(weights, "Q8_0")
    with pytest.raises(InputError, match="65520"):
        quantize(weights * np.float32(1e5), "F16")
    with pytest.raises(InputError, match="IQ2_S"):
        quantize(weights, "IQ2_S")


def test_weights_far_from_zero_keep_a_scale_that_fits_without_a_min():
    """All positive: the least squares asks for a negative min, which Q4_K cannot store."""
    weights = 5 + normal(64) * np.float32(0.1)
    assert round_trip_error(weights, "Q4_K") < 0.02
    assert round_trip_error(-weights, "Q4_K") < 0.003


def test_rare_outliers_of_both_signs_are_fitted_from_either_end_of_their_sub_block():
    """Counting levels from the least value alone gives 0.0768 here."""
    rng = np.random.default_rng(6)
    weights = (rng.standard_normal((512, 256)) * np.where(rng.random((512, 256)) < 0.002, 50, 1)).astype(np.float32)
    assert round_trip_error(weights, "Q4_K") < 0.0745
