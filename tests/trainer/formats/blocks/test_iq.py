"""Types whose scales are no plain halves, and the grids: against gguf's own, to the last bit."""

import gguf
import numpy as np
import pytest
import torch

from q4kd.trainer.formats.blocks.decode import decode_rows
from q4kd.trainer.formats.blocks.grids import GRIDS
from q4kd.trainer.formats.blocks.layout import FORMATS
from q4kd.trainer.formats.blocks.scales import LARGEST, check_scales

HALVES = np.array([0x0000, 0x8000, 0x0001, 0x83FF, 0x0400, 0x7BFF, 0xFBFF, 0x3C00, 0x9E66], np.uint16)


def both(name: str, packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Our weights and gguf's, as bits."""
    with np.errstate(all="ignore"):
        theirs = gguf.quants.dequantize(packed, gguf.GGMLQuantizationType[name])
    ours = decode_rows(name, torch.from_numpy(packed), torch.full(theirs.shape, torch.nan))
    return ours.numpy().view(np.uint32), np.ascontiguousarray(theirs).view(np.uint32)


def iq1_m_blocks(halves: np.ndarray) -> np.ndarray:
    """Random IQ1_M blocks with these float16 scales, whose four bits each are the top ones of the scale words."""
    blocks = np.random.default_rng(3).integers(0, 256, (len(halves), 56), dtype=np.uint8)
    for part in range(4):
        at = 49 + 2 * part
        blocks[:, at] = (blocks[:, at] & 0x0F) | ((halves >> (4 * part) & 15) << 4)
    return blocks


@pytest.mark.parametrize("name", GRIDS)
def test_a_grid_is_that_of_the_format(name: str) -> None:
    theirs = getattr(gguf.quants, "IQ1_S" if name == "IQ1" else name)
    theirs.init_grid()
    assert np.array_equal(GRIDS[name].points(), theirs.grid.reshape(theirs.grid_shape))


@pytest.mark.parametrize("name", ["IQ3_S", "IQ3_XXS", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_S", "IQ1_M"])
def test_every_point_and_every_sign_is_met_and_bit_equal(name: str) -> None:
    packed = np.random.default_rng(4).integers(0, 256, (4096, FORMATS[name].block_bytes), dtype=np.uint8)
    if name == "IQ1_M":
        packed = iq1_m_blocks(np.full(4096, 0x3C00, np.uint16))
    else:
        packed[:, 0:2] = np.array([1.0], np.float16).view(np.uint8)
    ours, theirs = both(name, packed)
    assert np.array_equal(ours, theirs)
    # 131,072 points were drawn (or 262,144), so that each of at most 2,048 came about 64 times.
    values = np.unique(np.abs(ours.view(np.float32)))
    levels = {"IQ3_S": 8 * 16, "IQ3_XXS": 8 * 16, "IQ1_S": 3 * 8, "IQ1_M": 3 * 8}.get(name, 3 * 16)
    assert levels // 2 < len(values) <= levels


def test_iq1_m_gathers_its_scale_from_four_words() -> None:
    blocks = iq1_m_blocks(np.repeat(HALVES, 8))
    ours, theirs = both("IQ1_M", blocks)
    assert np.array_equal(ours, theirs)
    assert check_scales("IQ1_M", blocks) == 0
    assert np.abs(ours.view(np.float32)).max() >= 65504 * 7
    assert check_scales("IQ1_M", iq1_m_blocks(np.array([0x7C00, 0x3C00, 0xFC00, 0x7E01, 0x7BFF], np.uint16))) == 3


def test_every_scale_of_mxfp4_with_every_quant_is_bit_equal() -> None:
    blocks = np.zeros((256, 17), np.uint8)
    blocks[:, 0] = np.arange(256)
    blocks[:, 1:] = np.arange(16) * 17 ^ 0x50
    ours, theirs = both("MXFP4", blocks)
    assert np.array_equal(ours, theirs)
    assert not (ours == 0x80000000).any()  # minus zero reads as zero
    values = ours.view(np.float32)
    assert np.flatnonzero(~np.isfinite(values).all(axis=1)).tolist() == [253, 254, 255]
    assert np.flatnonzero(~(np.abs(values) < LARGEST).all(axis=1)).tolist() == list(range(173, 256))
    assert check_scales("MXFP4", blocks) == 256 - 173


def test_every_scale_of_nvfp4_with_every_quant_is_bit_equal() -> None:
    blocks = np.zeros((256, 36), np.uint8)
    blocks[:, :4] = np.arange(256)[:, None] ^ np.array([0, 1, 2, 3])
    blocks[:, 4:] = (np.arange(8) * 17 ^ np.array([[0x00], [0x50], [0xA0], [0xF8]])).reshape(-1)
    ours, theirs = both("NVFP4", blocks)
    assert np.array_equal(ours, theirs)
    assert np.isfinite(ours.view(np.float32)).all()
    assert check_scales("NVFP4", blocks) == 0


def test_every_byte_of_the_ternary_types_is_bit_equal() -> None:
    for name, size in (("TQ1_0", 52), ("TQ2_0", 64)):
        blocks = np.zeros((256, size + 2), np.uint8)
        blocks[:, :size] = np.arange(256)[:, None] + 5 * np.arange(size) & 255
        blocks[:, size:] = np.array([-0.37], np.float16).view(np.uint8)
        ours, theirs = both(name, blocks)
        assert np.array_equal(ours, theirs)
        assert len(np.unique(ours)) == (3 if name == "TQ1_0" else 4)
