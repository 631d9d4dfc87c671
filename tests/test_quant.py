"""Decoders against two independent ones, to the last bit."""

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from q4kd.harness import block_spec
from q4kd.trainer.errors import InputError
from q4kd.trainer.formats import FORMATS
from q4kd.trainer.quant import DECODERS, decode_rows

TYPES = ("Q4_K", "Q6_K", "F16", "F32")


def decode(name: str, packed: np.ndarray) -> np.ndarray:
    form = FORMATS[name]
    cols = packed.shape[1] // form.block_bytes * form.block_size
    out = torch.full((len(packed), cols), torch.nan)
    return decode_rows(name, torch.from_numpy(packed), out).numpy()


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    """Equal to the last bit; NaN payloads aside."""
    both_nan = np.isnan(a) & np.isnan(b)
    return bool(((a.view(np.uint32) == b.view(np.uint32)) | both_nan).all())


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@settings(max_examples=300, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), name=st.sampled_from(TYPES), blocks=st.integers(1, 3))
def test_random_bytes_decode_as_gguf_decodes_them(seed: int, name: str, blocks: int) -> None:
    form = FORMATS[name]
    width = form.block_bytes * blocks * (1 if form.is_k_quant else 7)
    packed = np.random.default_rng(seed).integers(0, 256, (5, width), dtype=np.uint8)
    expected = gguf.quants.dequantize(packed, getattr(gguf.GGMLQuantizationType, name))
    assert same_bits(decode(name, packed), expected.reshape(5, -1))


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
        expected = gguf.quants.dequantize(blocks, getattr(gguf.GGMLQuantizationType, name.upper()))
        assert same_bits(block_spec.DECODERS[name](blocks), expected)


def test_formats_match_ggml() -> None:
    assert set(FORMATS) == set(DECODERS) == set(TYPES)
    for name, form in FORMATS.items():
        assert gguf.GGML_QUANT_SIZES[getattr(gguf.GGMLQuantizationType, name)] == (form.block_size, form.block_bytes)


def test_part_of_a_block_is_refused() -> None:
    with pytest.raises(InputError, match="multiple of 256"):
        FORMATS["Q4_K"].row_bytes(300)
    with pytest.raises(InputError, match="Q9_Z"):
        decode_rows("Q9_Z", torch.zeros(1, 1, dtype=torch.uint8), torch.zeros(1, 1))
