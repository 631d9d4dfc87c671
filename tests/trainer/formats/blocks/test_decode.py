"""Decoders against two independent ones, to the last bit."""

import itertools

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from q4kd.harness.oracles import block_spec, block_spec_low
from q4kd.trainer.errors import InputError
from q4kd.trainer.formats.blocks import decode as quant
from q4kd.trainer.formats.blocks import decode_low
from q4kd.trainer.formats.blocks.decode import DECODERS, decode_rows
from q4kd.trainer.formats.blocks.layout import FORMATS

TYPES = ("Q4_K", "Q5_K", "Q6_K", "Q8_0", "Q5_0", "Q4_0", "BF16", "F16", "F32")
TYPES += ("Q4_1", "Q5_1", "Q2_K", "Q3_K", "IQ4_NL", "IQ4_XS")
TYPES += ("IQ3_S", "IQ3_XXS", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_S", "IQ1_M", "MXFP4", "NVFP4", "TQ1_0", "TQ2_0")
# Where a block's float16 numbers lie.
HALVES = {"Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "Q8_0": (0,), "Q5_0": (0,), "Q4_0": (0,)}
HALVES |= {"Q4_1": (0, 2), "Q5_1": (0, 2), "Q2_K": (80, 82), "Q3_K": (108,), "IQ4_NL": (0,), "IQ4_XS": (0,)}
HALVES |= dict.fromkeys(("IQ3_S", "IQ3_XXS", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_S"), (0,))
HALVES |= {"TQ1_0": (52,), "TQ2_0": (64,)}
# Zero, the least and the greatest subnormal, the least normal, the greatest finite number, some between; both signs.
EXTREMES = [
    sign | bits for bits in (0x0000, 0x0001, 0x03FF, 0x0400, 0x7BFF, 0x3C00, 0x1E66, 0x0155) for sign in (0, 0x8000)
]


def decode(name: str, packed: np.ndarray) -> np.ndarray:
    form = FORMATS[name]
    cols = packed.shape[1] // form.block_bytes * form.block_size
    out = torch.full((len(packed), cols), torch.nan)
    return decode_rows(name, torch.from_numpy(packed), out).numpy()


def by_gguf(name: str, packed: np.ndarray) -> np.ndarray:
    return gguf.quants.dequantize(packed, gguf.GGMLQuantizationType[name]).reshape(len(packed), -1)


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    """Equal to the last bit; NaN payloads aside."""
    both_nan = np.isnan(a) & np.isnan(b)
    return bool(((a.view(np.uint32) == b.view(np.uint32)) | both_nan).all())


def pack_scales(scales: np.ndarray, mins: np.ndarray) -> np.ndarray:
    """Pack 6-bit scales and mins, ``[n, 8]`` each, into ``[n, 12]`` by the bit diagram of ``blocks/decode.py``."""
    low, high = np.s_[:, :4], np.s_[:, 4:]
    parts = [scales[low] | scales[high] >> 4 << 6, mins[low] | mins[high] >> 4 << 6]
    return np.concatenate([*parts, (scales[high] & 15) | (mins[high] & 15) << 4], axis=1).astype(np.uint8)


def extreme_blocks(name: str) -> np.ndarray:
    """Every combination of extreme scales with all-0, all-255 and random remaining bytes."""
    offsets, size = HALVES[name], FORMATS[name].block_bytes
    rng = np.random.default_rng(7)
    blocks = []
    for halves in itertools.product(EXTREMES, repeat=len(offsets)):
        three = np.stack([np.zeros(size), np.full(size, 255), rng.integers(0, 256, size)]).astype(np.uint8)
        for offset, half in zip(offsets, halves, strict=True):
            three[:, offset : offset + 2] = np.frombuffer(np.uint16(half).tobytes(), np.uint8)
        blocks.append(three)
    return np.concatenate(blocks)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@settings(max_examples=300, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), name=st.sampled_from(TYPES), blocks=st.integers(1, 3))
def test_random_bytes_decode_as_gguf_decodes_them(seed: int, name: str, blocks: int) -> None:
    form = FORMATS[name]
    width = form.block_bytes * blocks * (1 if form.is_quantized else 7)
    packed = np.random.default_rng(seed).integers(0, 256, (5, width), dtype=np.uint8)
    assert same_bits(decode(name, packed), by_gguf(name, packed))


@pytest.mark.parametrize("name", HALVES)
def test_extreme_scales_with_every_kind_of_quants_are_bit_equal(name: str) -> None:
    packed = extreme_blocks(name)
    ours, theirs = decode(name, packed), by_gguf(name, packed)
    assert np.isfinite(theirs).all()
    assert np.array_equal(ours.view(np.uint32), theirs.view(np.uint32))
    # The cases really are extreme: a negative zero, a step that only a subnormal scale gives, the greatest scale.
    assert (theirs.view(np.uint32) == 0x80000000).any()
    assert 0 < np.abs(theirs[theirs != 0]).min() < 2.0**-20
    assert np.abs(theirs).max() >= 65504 * (1 if name.startswith("TQ") else 7)


@pytest.mark.parametrize("name", ["Q4_K", "Q5_K"])
def test_every_six_bit_scale_and_min_is_bit_equal_in_every_sub_block(name: str) -> None:
    values, sub_blocks = np.arange(64)[:, None], np.arange(8)
    scales, mins = (values + 9 * sub_blocks) % 64, (5 * values + 3 * sub_blocks) % 64
    assert all(len(set(table[:, column])) == 64 for table in (scales, mins) for column in range(8))
    packed = np.random.default_rng(8).integers(0, 256, (64, FORMATS[name].block_bytes), dtype=np.uint8)
    packed[:, 0:4] = np.array([[0.37, -1.3]], np.float16).view(np.uint8)
    packed[:, 4:16] = pack_scales(scales, mins)
    unpacked = quant.unpack_q4_k_scales(torch.from_numpy(packed[:, 4:16]))
    assert np.array_equal(unpacked[0].numpy(), scales)
    assert np.array_equal(unpacked[1].numpy(), mins)
    assert np.array_equal(decode(name, packed).view(np.uint32), by_gguf(name, packed).view(np.uint32))


def test_every_signed_scale_and_every_quant_of_q6_k_is_bit_equal() -> None:
    packed = np.random.default_rng(9).integers(0, 256, (16, 210), dtype=np.uint8)
    packed[:, 192:208] = np.arange(256).reshape(16, 16)
    packed[:, 208:210] = np.array([-0.0123], np.float16).view(np.uint8)
    ours = decode("Q6_K", packed)
    assert np.array_equal(ours.view(np.uint32), by_gguf("Q6_K", packed).view(np.uint32))
    assert len(np.unique(ours)) > 1000


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("name", ["F16", "BF16"])
def test_every_sixteen_bit_pattern_is_bit_equal(name: str) -> None:
    packed = np.arange(2**16, dtype=np.uint16).view(np.uint8).reshape(256, 512)
    ours = decode(name, packed)
    assert same_bits(ours, by_gguf(name, packed))
    assert np.isnan(ours).sum() == 2 * (1023 if name == "F16" else 127)


@pytest.mark.parametrize("name", TYPES)
def test_tiles_of_any_number_of_rows_are_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    form = FORMATS[name]
    cols = 512
    packed = np.random.default_rng(10).integers(0, 64, (11, form.row_bytes(cols)), dtype=np.uint8)
    whole = decode(name, packed)
    assert not np.isnan(whole).any()
    monkeypatch.setattr(quant, "_WEIGHTS_AT_ONCE", 3 * 256)
    assert np.array_equal(decode(name, packed).view(np.uint32), whole.view(np.uint32))


@pytest.mark.parametrize("name", ["Q4_K", "Q5_K"])
def test_the_decoders_use_the_one_function_that_unpacks_scales(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = np.random.default_rng(11).integers(0, 64, (2, FORMATS[name].block_bytes), dtype=np.uint8)
    before, unpack = decode(name, packed), quant.unpack_q4_k_scales

    def without_mins(scales: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        steps, mins = unpack(scales)
        return steps, mins * 0

    monkeypatch.setattr(quant, "unpack_q4_k_scales", without_mins)
    assert not np.array_equal(decode(name, packed), before)


def test_extreme_scales_decode_as_the_layout_says() -> None:
    samples = block_spec.sample_blocks(seed=11)
    for name in ("q4_k", "q6_k"):
        blocks = np.asarray(samples[name], np.uint8)
        expected = block_spec.DECODERS[name](blocks)
        assert same_bits(decode(name.upper(), blocks), expected)
        assert np.isfinite(expected).all()
        assert np.abs(expected).max() > 65504  # float16 would not hold it


def test_scalar_reference_agrees_with_gguf() -> None:
    # The harness's own decoder must itself be right, or bit-equality with it would mean nothing.
    samples = block_spec.sample_blocks(seed=12)
    for name in ("q4_k", "q6_k"):
        blocks = np.asarray(samples[name], np.uint8)
        assert same_bits(block_spec.DECODERS[name](blocks), by_gguf(name.upper(), blocks))


@pytest.mark.parametrize("name", block_spec_low.LOW_SPECS)
def test_low_types_decode_as_the_layout_says(name: str) -> None:
    rows = block_spec_low.sample_low_rows(seed=13)[name]
    expected = block_spec_low.decode_low(name, rows)
    assert np.isfinite(expected).all()
    assert np.abs(expected).max() > 65504
    assert np.array_equal(decode(name.upper(), rows).view(np.uint32), expected.view(np.uint32))
    assert np.array_equal(by_gguf(name.upper(), rows).view(np.uint32), expected.view(np.uint32))


def test_every_scale_of_q3_k_and_of_iq4_xs_is_bit_equal_in_every_sub_block() -> None:
    scales = (np.arange(64)[:, None] + 5 * np.arange(16)) % 64
    rng = np.random.default_rng(14)
    q3, iq4 = (rng.integers(0, 256, (64, FORMATS[name].block_bytes), dtype=np.uint8) for name in ("Q3_K", "IQ4_XS"))
    q3[:, 108:110] = iq4[:, 0:2] = np.array([-0.0123], np.float16).view(np.uint8)
    q3[:, 96:104] = (scales[:, :8] & 15) | (scales[:, 8:] & 15) << 4
    q3[:, 104:108] = sum((scales[:, 4 * part : 4 * part + 4] >> 4) << 2 * part for part in range(4))
    assert np.array_equal(decode_low.unpack_q3_k_scales(torch.from_numpy(q3[:, 96:108])).numpy(), scales - 32)
    few = scales[:, :8]
    iq4[:, 4:8] = (few[:, 0::2] & 15) | (few[:, 1::2] & 15) << 4
    high = sum((few[:, part] >> 4) << 2 * part for part in range(8)).astype("<u2")
    iq4[:, 2:4] = high.view(np.uint8).reshape(-1, 2)
    for name, packed in (("Q3_K", q3), ("IQ4_XS", iq4)):
        assert np.array_equal(decode(name, packed).view(np.uint32), by_gguf(name, packed).view(np.uint32))


def test_formats_match_ggml() -> None:
    assert set(FORMATS) == set(DECODERS) == set(TYPES)
    for name, form in FORMATS.items():
        assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]] == (form.block_size, form.block_bytes)
        assert form.is_quantized == (name not in ("F32", "F16", "BF16"))


def test_part_of_a_block_is_refused() -> None:
    with pytest.raises(InputError, match="multiple of 256"):
        FORMATS["Q5_K"].row_bytes(300)
    with pytest.raises(InputError, match="multiple of 32"):
        FORMATS["Q8_0"].row_bytes(300)
    with pytest.raises(InputError, match="Q9_Z"):
        decode_rows("Q9_Z", torch.zeros(1, 1, dtype=torch.uint8), torch.zeros(1, 1))
