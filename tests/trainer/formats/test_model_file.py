"""Opening teacher files: the golden one is read as it is, and what would be silently wrong is refused by name."""

import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from model_files import write_model
from teachers import load_quietly

from q4kd.harness.__main__ import main
from q4kd.harness.inputs.demo import GOLDEN_TEACHER
from q4kd.trainer.errors import InputError
from q4kd.trainer.formats.architecture import read_dimensions
from q4kd.trainer.formats.open import open_model
from q4kd.trainer.formats.tensor_shapes import expected_shapes


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


Change = Callable[[gguf.GGUFWriter], None]


def _key(key: str, value: Any) -> Change:
    """Add a metadata value of the type that its Python type says."""
    kinds = {str: "STRING", bool: "BOOL", int: "UINT32", float: "FLOAT32"}
    return lambda writer: writer.add_key_value(key, value, gguf.GGUFValueType[kinds[type(value)]])


def _vectors(*lengths: tuple[str, int]) -> Change:
    def add(writer: gguf.GGUFWriter) -> None:
        for name, length in lengths:
            writer.add_tensor(name, np.ones(length, np.float32))

    return add


_BIASES = (("blk.0.attn_q.bias", 64), ("blk.0.attn_k.bias", 32), ("blk.0.attn_v.bias", 32))


def _array(key: str, value: list[int]) -> Change:
    return lambda writer: writer.add_array(key, value)


@pytest.mark.parametrize(
    ("change", "twin", "words"),
    [
        (_key("qwen2.expert_count", 8), _key("qwen2.expert_count", 0), "expert_count"),
        (_key("qwen2.rope.scaling.type", "yarn"), _key("qwen2.rope.scaling.type", "none"), "rope.scaling.factor"),
        (_key("qwen2.rope.scaling.type", "dynamic"), _key("qwen2.rope.scaling.type", ""), "rope.scaling.type"),
        (_key("qwen2.rope.scaling.type", "longrope"), _key("qwen2.rope.scaling.factor", 4.0), "rope_factors_long"),
        (_key("qwen2.rope.scaling.factor", -4.0), _key("qwen2.rope.scaling.type", "linear"), "rope.scaling.factor"),
        (_key("qwen2.rope.scale_linear", "2"), _key("qwen2.rope.scale_linear", 2.0), "rope.scale_linear"),
        (_key("qwen2.rope.scaling.attn_factor", 0.5), _key("qwen2.rope.scaling.attn_factor", 1.0), "attn_factor"),
        (_key("qwen2.rope.dimension_count", 8), _key("qwen2.rope.dimension_count", 16), "partial rotary"),
        (_key("qwen2.attention.value_length", 8), _key("qwen2.attention.value_length", 16), "value_length"),
        (_key("qwen2.attention.key_length", 32), _key("qwen2.attention.key_length", 16), "attn_q.weight"),
        (_key("qwen2.attention.sliding_window", 127), _key("qwen2.attention.sliding_window", 128), "sliding_window"),
        (_array("qwen2.attention.sliding_window", [64]), _key("qwen2.attention.sliding_window", 0), "sliding_window"),
        (
            _key("qwen2.attn_logit_softcapping", 50.0),
            _key("qwen2.attn_logit_softcapping", 0.0),
            "attn_logit_softcapping",
        ),
        (_key("qwen2.final_logit_softcapping", 30.0), _key("qwen2.pooling_type", 1), "final_logit_softcapping"),
        (_key("qwen2.logit_scale", 0.5), _key("qwen2.logit_scale", 1.0), "logit_scale"),
        (_key("qwen2.attention.scale", 0.1), _key("qwen2.attention.scale", 0.0), "attention.scale"),
        (_key("qwen2.attention.causal", False), _key("qwen2.attention.causal", True), "attention.causal"),
        (_key("qwen2.attention.new_trick", 1), _key("other.attention.new_trick", 1), "attention.new_trick"),
        (_key("qwen2.rope.freq_base", "fast"), _key("qwen2.rope.freq_base", 1e6), "rope.freq_base"),
        (_key("qwen2.rope.freq_base", float("nan")), _key("qwen2.rope.freq_base", 1.0), "rope.freq_base"),
        (_key("general.type", "adapter"), _key("general.type", "model"), "adapter"),
        (_key("general.type", "mmproj"), _key("general.type", "model"), "mmproj"),
        (_key("split.count", 3), _key("split.count", 1), "split.no"),
        (_vectors(("blk.0.attn_q_norm.weight", 16)), _key("general.name", "x"), "attn_q_norm"),
        (_vectors(("rope_freqs.weight", 8)), _key("general.name", "x"), "rope_freqs"),
        (_vectors(("blk.0.attn_output.bias", 64)), _vectors(*_BIASES), "attn_output.bias"),
        (_vectors(*_BIASES[:2]), _vectors(*_BIASES), "blk.0.attn_v.bias"),
        (_vectors(("blk.0.attn_q.bias", 63), *_BIASES[1:]), _vectors(*_BIASES), "shape"),
    ],
)
def test_what_would_be_silently_wrong_is_refused_by_name_and_its_twin_opens(
    tmp_path: Path, change: Change, twin: Change, words: str
) -> None:
    assert open_model(write_model(tmp_path / "twin.gguf", twin)).config.tied_head
    with pytest.raises(InputError, match="expected") as caught:
        open_model(write_model(tmp_path / "bad.gguf", change))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def _unsupported_type(writer: gguf.GGUFWriter) -> None:
    writer.add_tensor("blk.0.attn_q.bias", np.zeros(64, np.int32))


@pytest.mark.parametrize(
    ("change", "keys", "words"),
    [
        (_unsupported_type, {}, "I32"),
        (None, {"layers": 2}, "blk.1."),
        (None, {"ffn": 128}, "ffn_"),
        (None, {"heads": 2}, "shape"),
        (None, {"kv": 3}, "multiple of key-value heads"),
        (None, {"layers": 0}, "block_count"),
        (None, {"hidden": 0}, "embedding_length"),
    ],
)
def test_metadata_that_contradict_the_tensors_are_refused(
    tmp_path: Path, change: Change | None, keys: dict[str, int], words: str
) -> None:
    with pytest.raises(InputError, match="expected") as caught:
        open_model(write_model(tmp_path / "bad.gguf", change, **keys))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("factor", [0.0, -1.0, np.inf, np.nan])
def test_rotary_factors_that_cannot_divide_are_refused(tmp_path: Path, factor: float) -> None:
    def factors(last: float) -> Change:
        values = np.array([1, 1, 1, 1, 2, 4, 8, last], np.float32)
        return lambda writer: writer.add_tensor("rope_freqs.weight", values)

    good = open_model(write_model(tmp_path / "good.gguf", factors(8), architecture="llama"))
    assert good.tensors["rope_freqs.weight"].shape == (8,)
    with pytest.raises(InputError, match=r"rope_freqs\.weight: expected positive"):
        open_model(write_model(tmp_path / "bad.gguf", factors(factor), architecture="llama"))


@pytest.mark.parametrize("claimed", [7, 40, 152_064])
def test_the_vocabulary_is_counted_in_the_embedding(tmp_path: Path, claimed: int) -> None:
    path = write_model(tmp_path / "m.gguf", _key("qwen2.vocab_size", claimed))
    assert open_model(path).config.vocab_size == 40
    logits = load_quietly(path).logits(torch.tensor([[0, 39]]))
    assert logits.shape == (1, 2, 40)


def test_a_number_that_is_not_whole_is_no_size(tmp_path: Path) -> None:
    tensors = open_model(write_model(tmp_path / "m.gguf")).tensors
    values = {"embedding_length": 64, "attention.head_count": 4, "feed_forward_length": 96, "context_length": 128}
    values |= {"attention.layer_norm_rms_epsilon": 1e-6, "attention.head_count_kv": 2, "block_count": 1}
    assert read_dimensions(Path("m"), "qwen2", values, tensors).num_layers == 1
    with pytest.raises(InputError, match=r"block_count: expected a whole number, got 1\.5"):
        read_dimensions(Path("m"), "qwen2", values | {"block_count": 1.5}, tensors)


@pytest.mark.parametrize(
    ("name", "copied"),
    [("blk.0.attn_k.weight", "blk.0.attn_v.weight"), ("qwen2.block_count", "qwen2.blockcounts")],
)
def test_a_name_that_comes_twice_is_refused(tmp_path: Path, name: str, copied: str) -> None:
    path = write_model(tmp_path / "m.gguf", _key("other.key", 1) if "attn" in name else _key(copied, 1))
    packed = path.read_bytes()
    assert packed.count(copied.encode()) == 1
    path.write_bytes(packed.replace(copied.encode(), name.encode()))
    with pytest.raises(InputError, match=r"each .* once, got .* twice"):
        open_model(path)


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
        open_model(path)
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 0))
    with pytest.raises(InputError, match="at most"):
        open_model(path)


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="No such file"):
        open_model(tmp_path / "none.gguf")
    with pytest.raises(InputError, match="directory"):
        open_model(tmp_path)


def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.gguf")
    with pytest.raises(InputError, match="a pipe, socket or device"):
        open_model(tmp_path / "pipe.gguf")


def test_a_name_cannot_steer_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a\x1b[31m\x07\nb\udcff.gguf"
    shutil.copyfile(GOLDEN_TEACHER, path)
    np.save(tmp_path / "ids.npy", np.arange(8))
    assert main(["inspect", str(path)]) == 0
    out = str(tmp_path / "\x1b]0;x\x07.npy")
    assert main(["logits", str(path), "--ids", str(tmp_path / "ids.npy"), "--out", out]) == 0
    said = capsys.readouterr().out
    assert all(line.isprintable() for line in said.split("\n"))
    assert "a?[31m??b?.gguf: qwen2, " in said and "?]0;x?.npy" in said
