"""What a file of a hybrid decoder says of its recurrent layers, and what of it is refused by name."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from hybrid_models import HYBRIDS, make_hybrid, write_hybrid

from q4kd.harness.__main__ import main
from q4kd.trainer.errors import InputError
from q4kd.trainer.formats.open import open_model
from q4kd.trainer.formats.recurrence import Recurrence

CASE = HYBRIDS["qwen35moe"]
MODEL = make_hybrid(CASE)


def write(path: Path, *, predictors: int = 0, **changes: Any) -> Path:
    """Write the mixture with other metadata; None takes a key away."""
    keys = {key: value for key, value in (CASE.keys | changes).items() if value is not None}
    return write_hybrid(path, dataclasses.replace(CASE, keys=keys), MODEL, predictors=predictors)


def rewrite(
    path: Path, source: Path, *, without: str = "", changed: dict[str, np.ndarray | tuple[int, ...]] | None = None
) -> Path:
    """Write a copy without a tensor, or with others: arrays, or ones of a shape."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(path, CASE.architecture)
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            writer.add_key_value(key, field.contents(), field.types[0], sub_type=field.types[-1])
    tensors = {held.name: np.asarray(held.data) for held in reader.tensors if held.name != without}
    for name, value in (changed or {}).items():
        tensors[name] = value if isinstance(value, np.ndarray) else np.ones(value, np.float32)
    for name, data in tensors.items():
        writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_the_sizes_are_read(tmp_path: Path) -> None:
    config = open_model(write(tmp_path / "m.gguf")).config
    layers = (True, True, True, False)
    assert config.recurrence == Recurrence(key_heads=2, value_heads=6, head_dim=16, taps=4, layers=layers)
    assert (config.num_layers, config.skipped_blocks, config.rotary_dim, config.head_dim) == (4, 0, 16, 32)
    assert (config.num_experts, config.experts_per_token, config.expert_ffn_size) == (8, 3, 32)
    assert config.shared_ffn_size == 40
    silent = write(tmp_path / "silent.gguf", full_attention_interval=None)
    assert open_model(silent).config == config


def test_listed_layers_are_those_of_the_list(tmp_path: Path) -> None:
    case = HYBRIDS["qwen35-listed"]
    config = open_model(write_hybrid(tmp_path / "m.gguf", case, make_hybrid(case), predictors=1)).config
    assert config.recurrence is not None and config.recurrence.layers == (True, False, True, True, False)
    assert [config.recurrence_of(layer) is not None for layer in range(5)] == [True, False, True, True, False]
    assert (config.num_layers, config.skipped_blocks) == (5, 1)


def test_blocks_that_predict_further_tokens_are_left_out(tmp_path: Path) -> None:
    plain, more = open_model(write(tmp_path / "m.gguf")), open_model(write(tmp_path / "p.gguf", predictors=2))
    assert more.config == dataclasses.replace(plain.config, skipped_blocks=2)
    assert list(more.tensors) == list(plain.tensors)
    assert more.tensor_bytes == plain.tensor_bytes and more.file_bytes > plain.file_bytes


def test_a_block_behind_them_is_refused(tmp_path: Path) -> None:
    source = write(tmp_path / "source.gguf", predictors=1)
    path = rewrite(tmp_path / "m.gguf", source, changed={"blk.5.attn_norm.weight": (64,)})
    with pytest.raises(InputError, match=r"tensor blk\.5\.attn_norm\.weight: expected only the tensors of qwen35moe"):
        open_model(path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"ssm.conv_kernel": None}, "ssm.conv_kernel"),
        ({"ssm.conv_kernel": 0}, "ssm.conv_kernel"),
        ({"ssm.conv_kernel": 32}, "ssm.conv_kernel"),
        ({"ssm.conv_kernel": 3}, "ssm_conv1d.weight: expected shape (160, 3)"),
        ({"ssm.state_size": None}, "ssm.state_size"),
        ({"ssm.state_size": 0}, "ssm.state_size"),
        ({"ssm.state_size": 1 << 20}, "ssm.state_size"),
        ({"ssm.state_size": "16"}, "ssm.state_size"),
        ({"ssm.state_size": 8}, "ssm.inner_size: expected 6 value heads of 8 elements, 48"),
        ({"ssm.group_count": None}, "ssm.group_count"),
        ({"ssm.group_count": 7}, "ssm.group_count"),
        ({"ssm.group_count": 4}, "ssm.time_step_rank: expected a multiple of the 4 key heads, got 6"),
        ({"ssm.group_count": 3}, "expected shape (192, "),
        ({"ssm.time_step_rank": None}, "ssm.time_step_rank"),
        ({"ssm.time_step_rank": 1 << 20}, "ssm.time_step_rank"),
        ({"ssm.inner_size": None}, "ssm.inner_size"),
        ({"ssm.inner_size": 192}, "ssm.inner_size: expected 6 value heads of 16 elements, 96, got 192"),
        ({"full_attention_interval": 0}, "full_attention_interval"),
        ({"full_attention_interval": 3}, "would be ignored"),
        ({"attention.recurrent_layers": [True, True, True]}, "recurrent_layers: expected 4 booleans"),
        ({"attention.recurrent_layers": [1, 1, 1, 0]}, "recurrent_layers: expected 4 booleans"),
        ({"attention.recurrent_layers": [0.5]}, "recurrent_layers: expected 4 booleans"),
        ({"attention.recurrent_layers": [True, True, False, True]}, "would be ignored"),
        ({"rope.dimension_sections": [3, 3, 1, 0]}, "sections that cover the 8 pairs"),
        ({"rope.dimension_sections": [2, 3, 3, 0]}, "sections that cover the 8 pairs"),
        ({"rope.dimension_sections": [3, 3, 2]}, "four whole numbers"),
        ({"rope.dimension_sections": [3, 3, 2, 0, 0]}, "four whole numbers"),
        ({"rope.dimension_sections": [1 << 30, 3, 2, 0]}, "sections that cover the 8 pairs"),
        ({"nextn_predict_layers": 4}, "nextn_predict_layers"),
        ({"nextn_predict_layers": 1.5}, "nextn_predict_layers"),
        ({"rope.dimension_count": 15}, "rope.dimension_count"),
        ({"expert_shared_feed_forward_length": None}, "expert_shared_feed_forward_length"),
        ({"expert_shared_feed_forward_length": 48}, "shexp.weight: expected shape (48, 64)"),
        ({"expert_feed_forward_length": None}, "feed_forward_length"),
        ({"expert_weights_scale": 2.5}, "expert_weights_scale"),
        ({"expert_gating_func": 2}, "expert_gating_func"),
        ({"expert_shared_count": 1}, "expert_shared_count"),
        ({"ssm.dt_b_c_rms": True}, "ssm.dt_b_c_rms"),
    ],
)
def test_what_a_hybrid_has_not_is_refused_by_name(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    path = write(tmp_path / "m.gguf", **changes)
    with pytest.raises(InputError, match="expected") as caught:
        open_model(path)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name",
    [
        "blk.0.attn_qkv.weight",
        "blk.0.attn_gate.weight",
        "blk.0.ssm_alpha.weight",
        "blk.0.ssm_beta.weight",
        "blk.0.ssm_conv1d.weight",
        "blk.0.ssm_dt.bias",
        "blk.0.ssm_a",
        "blk.0.ssm_norm.weight",
        "blk.0.ssm_out.weight",
        "blk.0.post_attention_norm.weight",
        "blk.3.attn_q.weight",
        "blk.3.attn_q_norm.weight",
        "blk.2.ffn_gate_inp_shexp.weight",
        "blk.2.ffn_down_shexp.weight",
    ],
)
def test_a_missing_tensor_is_named(tmp_path: Path, name: str) -> None:
    path = rewrite(tmp_path / "m.gguf", write(tmp_path / "source.gguf"), without=name)
    with pytest.raises(InputError, match=rf"expected tensor {name}, got 1 missing"):
        open_model(path)


@pytest.mark.parametrize(
    ("name", "shape", "words"),
    [
        ("blk.0.attn_q.weight", (256, 64), "would be ignored"),
        ("blk.3.ssm_a", (6,), "would be ignored"),
        ("blk.0.ffn_norm.weight", (64,), "would be ignored"),
        ("blk.3.attn_q.bias", (256,), "would be ignored"),
        ("blk.3.attn_q.weight", (128, 64), r"expected shape \(256, 64\)"),
        ("blk.0.ssm_a.weight", (6,), "would be ignored"),
        ("blk.0.ssm_conv1d.weight", (160, 1, 4), r"expected shape \(160, 4\)"),
        ("blk.0.ssm_norm.weight", (96,), r"expected shape \(16,\)"),
    ],
)
def test_a_tensor_of_another_layer_is_refused(tmp_path: Path, name: str, shape: tuple[int, ...], words: str) -> None:
    path = rewrite(tmp_path / "m.gguf", write(tmp_path / "source.gguf"), changed={name: shape})
    with pytest.raises(InputError, match=words):
        open_model(path)


@pytest.mark.parametrize("value", [0.5, np.nan, np.inf])
def test_a_state_that_would_grow_is_refused(tmp_path: Path, value: float) -> None:
    decays = np.array([-1, -1, value, -1, -1, -1], np.float32)
    path = rewrite(tmp_path / "m.gguf", write(tmp_path / "source.gguf"), changed={"blk.1.ssm_a": decays})
    with pytest.raises(InputError, match=r"blk\.1\.ssm_a: expected numbers up to 0"):
        open_model(path)


def test_inspect_prints_the_recurrent_layers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "m.gguf", predictors=1)
    assert main(["inspect", str(path)]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "recurrence key_heads=2 value_heads=6 head_dim=16 taps=4 layers=3 of 4" in said
    assert "shared_ffn_size 40" in said and "skipped_blocks 1" in said
    assert main(["inspect", str(path), "--json"]) == 0
    config = json.loads(capsys.readouterr().out)["config"]
    assert config["recurrence"]["layers"] == [True, True, True, False]


def test_a_refused_hybrid_is_explained_without_the_blocks_that_are_skipped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write(tmp_path / "source.gguf", predictors=1)
    path = rewrite(tmp_path / "m.gguf", source, changed={"blk.0.ssm_d": (6,)})
    assert main(["inspect", str(path)]) == 2
    out = " ".join(capsys.readouterr().out.split())
    assert "blk.N.ssm_d; supported: " in out and "nextn" not in out
