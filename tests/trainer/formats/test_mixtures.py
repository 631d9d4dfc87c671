"""What a file of a mixture of experts says of itself, and what of it is refused by name."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from family_models import MIXTURES, make_family, write_family

from q4kd.harness.__main__ import main
from q4kd.trainer.errors import InputError
from q4kd.trainer.formats.open import open_model

CASE = MIXTURES["qwen3moe"]
MODEL = make_family(CASE)


def write(path: Path, **changes: Any) -> Path:
    """Write the mixture with other metadata; None takes a key away."""
    keys = {key: value for key, value in (CASE.keys | changes).items() if value is not None}
    return write_family(path, dataclasses.replace(CASE, keys=keys), MODEL)


def test_the_experts_are_read(tmp_path: Path) -> None:
    config = open_model(write(tmp_path / "m.gguf")).config
    assert (config.architecture, config.qk_norm, config.rope_layout) == ("qwen3moe", True, "split_halves")
    assert (config.num_experts, config.experts_per_token, config.expert_ffn_size) == (16, 3, 32)
    # 96 shared among three, as llama.cpp reads a file that does not state the size.
    silent = open_model(write(tmp_path / "silent.gguf", expert_feed_forward_length=None)).config
    assert silent == config


def test_what_files_say_that_changes_nothing_is_accepted(tmp_path: Path) -> None:
    said = {"expert_shared_count": 0, "expert_shared_feed_forward_length": 0, "expert_weights_norm": True}
    said |= {"expert_weights_scale": 1.0, "expert_gating_func": 1, "leading_dense_block_count": 0}
    assert open_model(write(tmp_path / "m.gguf", **said)).config.num_experts == 16


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"expert_count": None}, "expert_count"),
        ({"expert_count": 0}, "expert_count"),
        ({"expert_count": 15}, "shape (15, "),
        ({"expert_count": 1 << 20}, "expert_count"),
        ({"expert_count": "16"}, "expert_count"),
        ({"expert_used_count": None}, "expert_used_count"),
        ({"expert_used_count": 0}, "expert_used_count"),
        ({"expert_used_count": 17}, "expert_used_count"),
        ({"expert_feed_forward_length": 64}, "shape (16, 64, 64)"),
        ({"expert_feed_forward_length": 0}, "expert_feed_forward_length"),
        ({"expert_shared_feed_forward_length": 32}, "expert_shared_feed_forward_length"),
        ({"expert_shared_count": 1}, "expert_shared_count"),
        ({"expert_weights_norm": False}, "expert_weights_norm"),
        ({"expert_weights_scale": 2.5}, "expert_weights_scale"),
        ({"expert_gating_func": 2}, "expert_gating_func"),
        ({"expert_group_count": 4}, "expert_group_count"),
        ({"leading_dense_block_count": 1}, "leading_dense_block_count"),
        ({"attention.sliding_window": 8}, "sliding_window"),
    ],
)
def test_what_a_mixture_has_not_is_refused_by_name(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    path = write(tmp_path / "m.gguf", **changes)
    with pytest.raises(InputError, match="expected") as caught:
        open_model(path)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def rewrite(path: Path, source: Path, *, without: str = "", extra: dict[str, tuple[int, ...]] | None = None) -> Path:
    """Write a copy without a tensor, or with further ones."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(path, "qwen3moe")
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            writer.add_key_value(key, field.contents(), field.types[0])
    for held in reader.tensors:
        if held.name != without:
            writer.add_tensor(held.name, np.asarray(held.data))
    for name, shape in (extra or {}).items():
        writer.add_tensor(name, np.ones(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("part", ["ffn_gate_inp", "ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"])
def test_a_missing_tensor_is_named(tmp_path: Path, part: str) -> None:
    name = f"blk.2.{part}.weight"
    path = rewrite(tmp_path / "m.gguf", write(tmp_path / "source.gguf"), without=name)
    with pytest.raises(InputError, match=rf"expected tensor {name}, got 1 missing"):
        open_model(path)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("blk.0.ffn_gate_shexp.weight", (32, 64)),
        ("blk.0.ffn_gate.weight", (96, 64)),
        ("blk.0.exp_probs_b.bias", (16,)),
        ("blk.0.ffn_gate_inp.bias", (16,)),
    ],
)
def test_a_tensor_of_another_mixture_is_refused(tmp_path: Path, name: str, shape: tuple[int, ...]) -> None:
    path = rewrite(tmp_path / "m.gguf", write(tmp_path / "source.gguf"), extra={name: shape})
    with pytest.raises(InputError, match="would be ignored"):
        open_model(path)


def test_inspect_prints_the_experts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "m.gguf")
    assert main(["inspect", str(path)]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "num_experts 16 experts_per_token 3 expert_ffn_size 32" in said
    assert main(["inspect", str(path), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    model = open_model(path)
    idle = model.config.num_layers * 13 * 3 * 32 * model.config.hidden_size
    assert (facts["weights"], facts["active_weights"]) == (model.num_weights, model.num_weights - idle)
    assert f"weights {model.num_weights:,}, of which {model.num_weights - idle:,} are active for a token" in said
    config = facts["config"]
    assert (config["num_experts"], config["experts_per_token"], config["expert_ffn_size"]) == (16, 3, 32)


def test_a_dense_file_with_experts_is_refused_with_every_part(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = rewrite(tmp_path / "m.gguf", write(tmp_path / "source.gguf"), extra={"blk.0.ffn_up_shexp.weight": (32, 64)})
    assert main(["inspect", str(path)]) == 2
    assert "blk.N.ffn_up_shexp.weight; supported: " in " ".join(capsys.readouterr().out.split())
