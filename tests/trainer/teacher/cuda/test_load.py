"""Loading a file into the device's arena, and the synthetic model, on the CPU."""

import dataclasses
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from q4kd.harness.inputs.demo import GOLDEN_TEACHER
from q4kd.trainer.bench.synthetic_7b import make_blocks, make_tensors, qwen2_5_7b, tensor_types, write_gguf
from q4kd.trainer.errors import InputError
from q4kd.trainer.formats.blocks.decode import decode_rows
from q4kd.trainer.formats.blocks.layout import FORMATS, block_format
from q4kd.trainer.formats.blocks.scales import check_scales
from q4kd.trainer.formats.model_file import ModelFile
from q4kd.trainer.formats.open import open_model
from q4kd.trainer.teacher.cpu.forward import CpuForward
from q4kd.trainer.teacher.cuda.load import (
    ALIGNMENT,
    CHUNK_BYTES,
    all_finite,
    arena_layout,
    file_chunks,
    file_offset,
    fill_arena,
    load_tensors,
    scale_fields,
)
from q4kd.trainer.teacher.forward import check_weights

TINY = dataclasses.replace(
    qwen2_5_7b(2), hidden_size=256, ffn_size=512, num_heads=2, num_kv_heads=1, vocab_size=300, context_length=64
)


class HostCopier:
    """Copies at once, and spoils its buffer afterwards: a copy taken too late would be seen."""

    def __init__(self, size: int = CHUNK_BYTES) -> None:
        self._buffer = torch.empty(size, dtype=torch.uint8)
        self.copies = 0

    def buffer(self) -> torch.Tensor:
        self._buffer.fill_(0xA5)
        return self._buffer

    def copy(self, source: torch.Tensor, target: torch.Tensor) -> None:
        target.copy_(source)
        self.copies += 1

    def finish(self) -> None:
        assert self.copies >= 0


def arena_for(model: ModelFile) -> torch.Tensor:
    return torch.full((arena_layout(model.tensors)[1],), 0x5A, dtype=torch.uint8)


def golden_copy(tmp_path: Path) -> Path:
    path = tmp_path / "model.gguf"
    path.write_bytes(GOLDEN_TEACHER.read_bytes())
    return path


def test_every_tensor_arrives_in_the_files_bytes() -> None:
    model = open_model(GOLDEN_TEACHER)
    arena = arena_for(model)
    loaded = load_tensors(model, arena, HostCopier)
    for name, tensor in model.tensors.items():
        assert np.array_equal(loaded[name].packed.numpy().reshape(-1), tensor.data.reshape(-1))
        assert (loaded[name].packed.data_ptr() - arena.data_ptr()) % ALIGNMENT == 0
        assert (loaded[name].type, loaded[name].shape) == (tensor.type, tensor.shape)
    assert model.tensor_bytes <= arena.numel() < model.tensor_bytes + ALIGNMENT * len(model.tensors)


@pytest.mark.parametrize("chunk_bytes", [1000, 4096, 1 << 20])
def test_small_pieces_and_many_threads_give_the_same_bytes(chunk_bytes: int) -> None:
    model = open_model(GOLDEN_TEACHER)
    offsets, _ = arena_layout(model.tensors)
    whole, parts = arena_for(model), arena_for(model)
    fill_arena(model.files, file_chunks(model, offsets), whole, HostCopier)
    chunks = file_chunks(model, offsets, chunk_bytes)
    assert max(piece.num_bytes for piece in chunks) <= chunk_bytes
    fill_arena(model.files, chunks, parts, lambda: HostCopier(chunk_bytes))
    assert torch.equal(whole, parts)


def test_offsets_are_those_of_the_file() -> None:
    data = GOLDEN_TEACHER.read_bytes()
    for tensor in open_model(GOLDEN_TEACHER).tensors.values():
        start = file_offset(tensor)
        assert data[start : start + tensor.num_bytes] == tensor.data.tobytes()


def test_a_tensor_that_is_no_view_of_the_file_is_refused() -> None:
    tensor = next(iter(open_model(GOLDEN_TEACHER).tensors.values()))
    with pytest.raises(InputError, match="memory map"):
        file_offset(dataclasses.replace(tensor, data=tensor.data.copy()))


def test_a_file_cut_after_it_was_opened_is_refused(tmp_path: Path) -> None:
    path = golden_copy(tmp_path)
    model = open_model(path)
    path.write_bytes(GOLDEN_TEACHER.read_bytes()[:-1000])
    with pytest.raises(InputError, match="cut while it was read"):
        load_tensors(model, arena_for(model), HostCopier)


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3e38])
@pytest.mark.parametrize("type_name", ["Q4_K", "Q6_K", "F32"])
def test_a_scale_that_is_no_number_is_refused_by_name(tmp_path: Path, type_name: str, value: float) -> None:
    path = golden_copy(tmp_path)
    model = open_model(path)
    tensor = [tensor for tensor in model.tensors.values() if tensor.type == type_name][-1]
    at = {"Q4_K": 2, "Q6_K": 208, "F32": 0}[type_name]
    stored = np.array([value], np.float32 if type_name == "F32" else np.float16).tobytes()
    data = bytearray(path.read_bytes())
    data[file_offset(tensor) + at : file_offset(tensor) + at + len(stored)] = stored
    del model, tensor
    path.write_bytes(bytes(data))
    model = open_model(path)
    with pytest.raises(InputError, match=r"tensor .*finite scales"):
        load_tensors(model, arena_for(model), HostCopier)
    with pytest.raises(InputError, match=r"tensor .*finite scales"):
        check_weights(model)


def test_blocks_whose_scales_are_no_plain_floats_are_looked_through_too() -> None:
    for name, at, bad, good in (("MXFP4", 0, 173, 172), ("IQ1_M", 53, 0xCF, 0x8F), ("NVFP4", 0, None, 0x7F)):
        packed = torch.zeros(3, 4 * FORMATS[name].block_bytes, dtype=torch.uint8)
        blocks = packed.view(-1, FORMATS[name].block_bytes)
        if name == "IQ1_M":
            blocks[7, 55] = 0x70  # the upper bits of the exponent; the lower two are in byte 53
        blocks[7, at] = good
        assert all_finite(name, packed)
        if bad is not None:
            blocks[7, at] = bad
            assert not all_finite(name, packed)
            assert check_scales(name, packed.numpy()) == 1


def test_scale_fields_of_every_type_are_where_the_decoder_reads_them() -> None:
    for type_name, block_bytes, count in (
        ("Q4_K", 144, 2),
        ("Q5_K", 176, 2),
        ("Q6_K", 210, 1),
        ("Q8_0", 34, 1),
        ("Q5_0", 22, 1),
        ("Q4_0", 18, 1),
        ("Q4_1", 20, 2),
        ("Q5_1", 24, 2),
        ("Q2_K", 84, 2),
        ("Q3_K", 110, 1),
        ("IQ4_NL", 18, 1),
        ("IQ4_XS", 136, 1),
    ):
        fields = scale_fields(type_name, torch.full((3, block_bytes), 0x22, dtype=torch.uint8))
        assert fields.shape == (3, count)
        for column in range(count):
            packed = torch.full((3, block_bytes), 0x22, dtype=torch.uint8)
            scale_fields(type_name, packed)[1, column] = float("nan")
            out = decode_rows(type_name, packed, torch.empty(3, block_format(type_name).block_size))
            assert out[1].isnan().all()
            assert out[[0, 2]].isfinite().all()


def test_the_synthetic_model_has_the_types_and_bytes_of_qwen2_5_7b() -> None:
    types = Counter(tensor_types(qwen2_5_7b()).values())
    assert types == {"F32": 141, "Q4_K": 169, "Q6_K": 29}


@pytest.mark.parametrize("type_name", ["Q4_K", "Q6_K"])
def test_synthetic_weights_are_as_spread_as_trained_ones(type_name: str) -> None:
    blocks = make_blocks(type_name, 256, 1024, torch.Generator().manual_seed(1))
    weights = decode_rows(type_name, blocks, torch.empty(256, 1024))
    assert 0.019 < float(weights.std()) < 0.022
    assert abs(float(weights.mean())) < 5e-4


def test_a_synthetic_file_is_the_synthetic_model(tmp_path: Path) -> None:
    tensors = make_tensors(TINY, torch.device("cpu"))
    path = tmp_path / "synthetic.gguf"
    write_gguf(path, TINY, tensors)
    model = open_model(path)
    assert dataclasses.replace(model.config, rms_eps=TINY.rms_eps) == TINY
    for name, tensor in model.tensors.items():
        assert np.array_equal(tensor.data.reshape(-1), tensors[name].packed.numpy().reshape(-1))
    forward = CpuForward(model, "q4k")
    logits = forward.head_logits(forward.hidden(torch.arange(9)[None])[0])
    assert logits.isfinite().all()
    assert float(logits.std()) > 0.1
