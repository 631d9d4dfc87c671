"""What a Gemma 4 file says of itself, and what of it is refused by name."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
if not hasattr(transformers, "Gemma4ForCausalLM"):
    pytest.skip("this transformers does not know Gemma 4", allow_module_level=True)

from gemma4_models import GEMMA4, GEMMA4_MIXTURES, make_gemma4, write_gemma4  # noqa: E402

from q4kd.harness.__main__ import main  # noqa: E402
from q4kd.trainer.errors import InputError  # noqa: E402
from q4kd.trainer.formats.gguf.unsupported import find_unsupported  # noqa: E402
from q4kd.trainer.formats.open import open_model  # noqa: E402

DENSE, MIXTURE = GEMMA4["gemma4"], GEMMA4_MIXTURES["gemma4-mixture"]
MODELS = {id(case): make_gemma4(case) for case in (DENSE, MIXTURE, GEMMA4["gemma4-values"])}


def write(path: Path, case: Any = MIXTURE, tensors: dict[str, Any] | None = None, **changes: Any) -> Path:
    """Write a model with other metadata and tensors; None takes one away."""
    changed = dataclasses.replace(case, keys=case.keys | changes)
    return write_gemma4(path, changed, MODELS[id(case)], **(tensors or {}))


def test_the_sizes_of_each_layer_are_read(tmp_path: Path) -> None:
    config = open_model(write(tmp_path / "m.gguf")).config
    assert [config.head_dim_of(layer) for layer in range(6)] == [16, 16, 32] * 2
    assert [config.kv_heads_of(layer) for layer in range(6)] == [2, 2, 1] * 2
    assert [config.shares_keys(layer) for layer in range(6)] == [False, False, True] * 2
    assert config.windows == (7, 7, 0) * 2
    assert (config.q_size, config.kv_size, config.query_scale) == (128, 32, 1.0)
    assert (config.rope_base, config.window_rope_base) == (10_000.0, 1_000.0)
    assert (config.embedding_scale, config.logit_cap) == (8.0, 3.0)
    assert (config.num_experts, config.experts_per_token, config.expert_ffn_size) == (8, 3, 24)
    assert config.fused_experts


def test_a_dense_file_and_one_with_values_of_its_own(tmp_path: Path) -> None:
    assert open_model(write(tmp_path / "m.gguf", DENSE)).config.num_experts == 0
    assert open_model(write(tmp_path / "zero.gguf", DENSE, expert_count=0)).config.num_experts == 0
    config = open_model(write(tmp_path / "v.gguf", GEMMA4["gemma4-values"])).config
    assert not config.keys_as_values and config.layer_kv_heads == () and config.logit_cap == 0


def test_layers_without_scales_are_scaled_by_none(tmp_path: Path) -> None:
    gone = {f"blk.{layer}.layer_output_scale.weight": None for layer in range(6)}
    assert open_model(write(tmp_path / "m.gguf", tensors=gone)).config.num_layers == 6


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"attention.key_length_swa": None}, "attention.key_length_swa"),
        ({"attention.key_length_swa": 32}, "attention.value_length_swa"),
        ({"attention.key_length_swa": 0}, "attention.key_length_swa"),
        ({"attention.key_length_swa": 15, "attention.value_length_swa": 15, "rope.dimension_count_swa": 15}, "even"),
        ({"attention.value_length_swa": 32}, "attention.value_length_swa"),
        ({"rope.dimension_count_swa": 8}, "rope.dimension_count_swa"),
        ({"rope.dimension_count": 8}, "rope.dimension_count"),
        ({"attention.key_length": 16}, "attention.value_length"),
        ({"attention.sliding_window": None}, "attention.sliding_window"),
        ({"attention.sliding_window": 0}, "attention.sliding_window"),
        ({"attention.sliding_window_pattern": None}, "sliding_window_pattern"),
        ({"attention.sliding_window_pattern": [True] * 5}, "sliding_window_pattern"),
        ({"attention.sliding_window_pattern": [False, True, True] * 2}, "attn_q.weight: expected shape (128, 64)"),
        ({"attention.head_count_kv": [2, 2, 1]}, "6 numbers that divide 4 query heads"),
        ({"attention.head_count_kv": [2, 2, 3] * 2}, "6 numbers that divide 4 query heads"),
        ({"attention.head_count_kv": [2, 2, 0] * 2}, "6 numbers that divide 4 query heads"),
        ({"attention.head_count_kv": [2, 2, 8] * 2}, "6 numbers that divide 4 query heads"),
        ({"attention.head_count_kv": [2.0, 2.0, 1.0] * 2}, "6 numbers that divide 4 query heads"),
        ({"attention.head_count_kv": 2}, "expected shape (64, 64)"),
        ({"attention.shared_kv_layers": 2}, "attention.shared_kv_layers"),
        ({"embedding_length_per_layer_input": 256}, "embedding_length_per_layer_input"),
        ({"feed_forward_length": [96] * 6}, "feed_forward_length"),
        ({"expert_count": None}, "ffn_gate_inp.scale"),
        ({"expert_count": 7}, "shape (7,)"),
        ({"expert_used_count": 9}, "expert_used_count"),
        ({"expert_feed_forward_length": None}, "expert_feed_forward_length"),
        ({"expert_feed_forward_length": 48}, "shape (8, "),
        ({"expert_gating_func": 2}, "expert_gating_func"),
        ({"rope.scaling.type": "yarn"}, "rope.scaling.type"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
    ],
)
def test_what_is_not_implemented_or_wrong_is_refused_by_name(
    tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    path = write(tmp_path / "m.gguf", **changes)
    with pytest.raises(InputError, match="expected") as caught:
        open_model(path)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"rope_freqs.weight": None}, "expected tensor rope_freqs.weight"),
        ({"rope_freqs.weight": np.zeros(16, np.float32)}, "positive"),
        ({"rope_freqs.weight": np.ones(8, np.float32)}, "shape (16,)"),
        ({"blk.1.layer_output_scale.weight": None}, "expected tensor blk.1.layer_output_scale.weight"),
        ({"blk.1.layer_output_scale.weight": np.ones(2, np.float32)}, "shape (1,)"),
        ({"blk.0.attn_v.weight": None}, "expected tensor blk.0.attn_v.weight"),
        ({"blk.2.attn_v.weight": np.ones((32, 64), np.float32)}, "expected tensor blk.5.attn_v.weight"),
        ({"blk.1.ffn_gate_inp.scale": None}, "expected tensor blk.1.ffn_gate_inp.scale"),
        ({"blk.1.ffn_down_exps.scale": None}, "expected tensor blk.1.ffn_down_exps.scale"),
        ({"blk.1.ffn_down_exps.scale": np.ones(1, np.float32)}, "shape (8,)"),
        ({"blk.1.ffn_gate_up_exps.weight": None}, "expected tensor blk.1.ffn_gate_up_exps.weight"),
        ({"blk.1.ffn_gate_exps.weight": np.ones((8, 24, 64), np.float32)}, "would be ignored"),
        ({"blk.1.pre_ffw_norm_2.weight": None}, "expected tensor blk.1.pre_ffw_norm_2.weight"),
        ({"blk.1.ffn_gate_exps.scale": np.ones(8, np.float32)}, "an NVFP4 matrix beside it"),
        ({"per_layer_token_embd.weight": np.ones((320, 96), np.float32)}, "would be ignored"),
        ({"blk.0.attn_qkv.weight": np.ones((128, 64), np.float32)}, "would be ignored"),
    ],
)
def test_a_tensor_that_is_missing_or_of_another_model_is_named(
    tmp_path: Path, tensors: dict[str, Any], words: str
) -> None:
    path = write(tmp_path / "m.gguf", tensors=tensors)
    with pytest.raises(InputError, match="expected") as caught:
        open_model(path)
    assert words in str(caught.value)


def test_a_weight_that_is_not_finite_is_refused_though_divisors_are_large(tmp_path: Path) -> None:
    from teachers import load_quietly

    path = write(tmp_path / "m.gguf", tensors={"blk.1.ffn_down_exps.scale": np.full(8, np.nan, np.float32)})
    with pytest.raises(InputError, match=r"blk\.1\.ffn_down_exps\.scale"):
        load_quietly(path)


def test_inspect_prints_the_sizes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "m.gguf")
    assert main(["inspect", str(path)]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "window_head_dim 16" in said and "keys_as_values True" in said
    assert main(["inspect", str(path), "--json"]) == 0
    config = json.loads(capsys.readouterr().out)["config"]
    assert (config["window_head_dim"], config["layer_kv_heads"]) == (16, [2, 2, 1] * 2)
    assert find_unsupported(path) == []


def test_every_part_of_a_small_model_that_stands_in_the_way_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "m.gguf", **{"embedding_length_per_layer_input": 16, "attention.shared_kv_layers": 2})
    assert main(["inspect", str(path)]) == 2
    said = " ".join(capsys.readouterr().out.split())
    assert "gemma4.embedding_length_per_layer_input 16" in said and "gemma4.attention.shared_kv_layers 2" in said
