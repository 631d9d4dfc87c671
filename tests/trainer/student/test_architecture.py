"""Architectures that cannot be trained are refused by their config alone, each with its reason on one line."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from q4kd.trainer.errors import InputError
from q4kd.trainer.student.shape import shape_student

SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 0}
WIDE = {**SIZES, "intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 64}
SMALL = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "rotary_dim": 8}
LINEAR = {
    "linear_num_value_heads": 2,
    "linear_num_key_heads": 1,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "head_dim": 8,
}
EXPERTS = {
    "head_dim": 8,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
}


def shape(folder: Path, kind: str, settings: dict[str, Any], *, packed: bool = True) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": kind, **settings}))
    shape_student(folder, 1, 16, torch.float32, is_masked=packed)


@pytest.mark.parametrize("kind", ["gptj", "codegen", "phi", "bert"])
@pytest.mark.parametrize("packed", [True, False])
def test_a_head_with_a_bias_is_refused(tmp_path: Path, kind: str, packed: bool) -> None:
    with pytest.raises(InputError, match=r"expected an output head without bias, got .*, whose head has one"):
        shape(tmp_path, kind, SMALL if kind in ("gptj", "codegen") else WIDE, packed=packed)


@pytest.mark.parametrize(
    ("kind", "settings", "said"),
    [
        ("mamba", {"state_size": 4}, "MambaForCausalLM, whose"),
        ("mamba2", {"state_size": 4, "num_heads": 4, "head_dim": 16, "n_groups": 1}, "layers keep a state"),
        ("rwkv", {}, "RwkvForCausalLM, whose layers keep a state"),
        ("lfm2", {"layer_types": ["conv", "full_attention"]}, "whose conv layers keep a state"),
        (
            "qwen3_5_text",
            {**LINEAR, "layer_types": ["linear_attention", "full_attention"]},
            "whose linear_attention layers keep a state",
        ),
        ("bloom", {}, "BloomForCausalLM"),
        ("falcon", {"alibi": True}, "FalconForCausalLM"),
    ],
)
def test_documents_that_a_mask_cannot_keep_apart_are_refused_and_trained_one_by_one(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], kind: str, settings: dict[str, Any], said: str
) -> None:
    sizes = {**WIDE, **settings}
    with pytest.raises(InputError, match=r"packing: documents, got .*; set packing to none") as refused:
        shape(tmp_path, kind, sizes)
    assert said in str(refused.value) and "\n" not in str(refused.value)
    assert capfd.readouterr().err == ""  # what transformers says of slow paths is not the reason
    shape(tmp_path, kind, sizes, packed=False)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("gpt2", SMALL),
        ("opt", {**SIZES, "ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 64}),
        ("falcon", SIZES),
        ("gpt_neox", WIDE),
        ("qwen3_moe", {**WIDE, **EXPERTS}),
        ("gpt_oss", {**WIDE, **EXPERTS, "sliding_window": 12}),
        (
            "gemma3_text",
            {**WIDE, "head_dim": 8, "sliding_window": 12, "layer_types": ["sliding_attention", "full_attention"]},
        ),
        ("lfm2", {**WIDE, "layer_types": ["full_attention", "full_attention"]}),
    ],
)
def test_other_families_are_taken(tmp_path: Path, kind: str, settings: dict[str, Any]) -> None:
    shape(tmp_path, kind, settings)


def test_what_is_no_causal_lm_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="expected a Hugging Face causal LM"):
        shape(tmp_path, "t5", {"vocab_size": 64, "d_model": 32, "num_layers": 2, "num_heads": 4, "d_ff": 48})
