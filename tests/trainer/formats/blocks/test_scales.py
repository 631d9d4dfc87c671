"""Blocks with a scale that is no number are counted, exactly those, whatever the tensor's size."""

import gguf
import numpy as np
import pytest

from q4kd.trainer.errors import InputError
from q4kd.trainer.formats.blocks import scales
from q4kd.trainer.formats.blocks.layout import FORMATS
from q4kd.trainer.formats.blocks.scales import LARGEST, check_scales


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("name", FORMATS)
def test_the_count_is_that_of_the_blocks_that_decode_to_something_else_than_usable_numbers(name: str) -> None:
    form = FORMATS[name]
    packed = np.random.default_rng(1).integers(0, 256, (64, 32 * form.block_bytes), dtype=np.uint8)
    decoded = gguf.quants.dequantize(packed, gguf.GGMLQuantizationType[name]).reshape(-1, form.block_size)
    expected = int((~(np.abs(decoded) < LARGEST)).any(axis=1).sum())
    assert (expected == 0) if name == "NVFP4" else (0 < expected < 64 * 32)
    assert check_scales(name, packed) == expected


@pytest.mark.parametrize(
    ("name", "offset"),
    [
        (name, offset)
        for name, (offsets, *_) in scales.FLOATS.items()
        if FORMATS[name].is_quantized
        for offset in offsets
    ],
)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_one_bad_scale_is_found_and_the_greatest_finite_one_is_not(name: str, offset: int, value: float) -> None:
    size = FORMATS[name].block_bytes
    packed = np.full((10, 4, size), 255, np.uint8)  # all ones everywhere but in the scales
    for half in scales.FLOATS[name][0]:
        packed[:, :, half : half + 2] = np.array([-65504], np.float16).view(np.uint8)
    assert check_scales(name, packed.reshape(10, -1)) == 0
    packed[7, 2, offset : offset + 2] = np.array([value], np.float16).view(np.uint8)
    assert check_scales(name, packed.reshape(10, -1)) == 1


@pytest.mark.parametrize("value", [LARGEST, -3e38, np.nan, np.inf])
def test_weights_that_overflow_when_they_are_squared_count_as_bad_and_the_next_smaller_does_not(value: float) -> None:
    below = np.nextafter(np.float32(LARGEST), np.float32(0))
    floats = np.array([[below, -below, 0, 1]], np.float32)
    assert check_scales("F32", floats.view(np.uint8)) == 0
    assert check_scales("BF16", (floats.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)) == 0
    floats[0, 2] = value
    assert check_scales("F32", floats.view(np.uint8)) == 1
    assert check_scales("BF16", (floats.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)) == 1


@pytest.mark.parametrize("name", FORMATS)
def test_pieces_do_not_change_the_count(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = np.random.default_rng(2).integers(0, 256, (7, 512 * FORMATS[name].block_bytes), dtype=np.uint8)
    whole = check_scales(name, packed)
    monkeypatch.setattr(scales, "_CHUNK_BYTES", 1000)
    assert check_scales(name, packed) == whole >= (name != "NVFP4")


def test_an_empty_tensor_has_none_and_an_unknown_type_is_refused() -> None:
    assert check_scales("Q4_K", np.zeros((0, 144), np.uint8)) == 0
    with pytest.raises(InputError, match="Q9_Z"):
        check_scales("Q9_Z", np.zeros((1, 144), np.uint8))


def test_the_callers_bytes_are_left_as_they_are() -> None:
    packed = np.full((1, 144), 255, np.uint8)
    packed.flags.writeable = False
    assert check_scales("Q4_K", packed) == 1
