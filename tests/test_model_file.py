"""Opening teacher files: the golden one is read as it is, and what would be silently wrong is refused by name."""

import struct
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from model_files import write_model

from q4kd.harness.experiments_teacher import GOLDEN_TEACHER
from q4kd.trainer.architecture import expected_shapes
from q4kd.trainer.errors import InputError
from q4kd.trainer.gguf_header import check_header
from q4kd.trainer.model_file import open_model


def test_golden_file_is_read_as_the_gguf_package_reads_it() -> None:
    model = open_model(GOLDEN_TEACHER)
    reader = gguf.GGUFReader(GOLDEN_TEACHER)
    assert {tensor.name for tensor in reader.tensors} == set(model.tensors)
    for tensor in reader.tensors:
        assert model.tensors[tensor.name].num_bytes == tensor.n_bytes
        assert model.tensors[tensor.name].data.tobytes() == np.asarray(tensor.data).tobytes()
    assert (model.config.num_layers, model.config.vocab_size, model.config.tied_head) == (2, 512, False)
    assert len(model.tokens) == 512
    assert set(expected_shapes(model.config)) == set(model.tensors)


def test_the_valid_twin_of_every_refused_file_opens(tmp_path: Path) -> None:
    assert open_model(write_model(tmp_path / "ok.gguf")).config.tied_head


def _unknown_tensor(writer: gguf.GGUFWriter) -> None:
    writer.add_tensor("blk.0.attn_q_norm.weight", np.zeros(16, np.float32))


def _experts(writer: gguf.GGUFWriter) -> None:
    writer.add_expert_count(8)


def _scaled_rope(writer: gguf.GGUFWriter) -> None:
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)


def _window(writer: gguf.GGUFWriter) -> None:
    writer.add_sliding_window(64)  # of a context of 128


def _unsupported_type(writer: gguf.GGUFWriter) -> None:
    writer.add_tensor("blk.0.attn_q.bias", np.zeros(64, np.int32))


@pytest.mark.parametrize(
    ("change", "keys", "words"),
    [
        (_unknown_tensor, {}, "attn_q_norm"),
        (_experts, {}, "expert_count"),
        (_scaled_rope, {}, "rope.scaling.type"),
        (_window, {}, "sliding_window"),
        (_unsupported_type, {}, "I32"),
        (None, {"layers": 2}, "blk.1."),
        (None, {"ffn": 128}, "ffn_"),
        (None, {"heads": 2}, "shape"),
        (None, {"kv": 3}, "multiple of key-value heads"),
        (None, {"layers": 0}, "block_count"),
    ],
)
def test_what_would_be_wrong_is_refused_by_name(
    tmp_path: Path, change: Callable[[gguf.GGUFWriter], None] | None, keys: dict[str, int], words: str
) -> None:
    path = write_model(tmp_path / "bad.gguf", change, **keys)
    with pytest.raises(InputError, match="expected") as caught:
        open_model(path)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "mamba")
    writer.add_tensor("token_embd.weight", np.zeros((4, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(InputError, match="mamba"):
        open_model(tmp_path / "a.gguf")


@pytest.mark.parametrize("keep", [0, 3, 20, 100, 4000, 200_000, 1_146_015])
def test_a_truncated_file_is_one_clear_error(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "cut.gguf"
    path.write_bytes(GOLDEN_TEACHER.read_bytes()[:keep])
    with pytest.raises(InputError):
        open_model(path)


def test_huge_counts_are_refused_at_once(tmp_path: Path) -> None:
    path = tmp_path / "huge.gguf"
    # One key whose array announces 2**40 entries: the gguf package would loop over them.
    key = b"k" * 4
    body = struct.pack("<Q", len(key)) + key + struct.pack("<IIQ", 9, 0, 1 << 40)
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + body)
    with pytest.raises(InputError, match="at most"):
        check_header(path)
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 0))
    with pytest.raises(InputError, match="at most"):
        check_header(path)


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="No such file"):
        open_model(tmp_path / "none.gguf")
    with pytest.raises(InputError, match="directory"):
        open_model(tmp_path)
