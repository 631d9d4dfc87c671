"""Sizes of students of many architectures, found without allocating them, and what is refused by them alone."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from q4kd.trainer.errors import InputError
from q4kd.trainer.student.shape import shape_student

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
GPT2 = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "pad_token_id": 0}
OPT = {
    **{key: SIZES[key] for key in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")},
    "ffn_dim": 48,
    "word_embed_proj_dim": 16,
    "max_position_embeddings": 64,
}
BLOOM = {"vocab_size": 64, "hidden_size": 32, "n_layer": 2, "n_head": 4}
STUDENTS: dict[str, dict[str, Any]] = {
    "llama": SIZES,
    "gpt2": GPT2,
    "opt": OPT,
    "falcon": {key: value for key, value in SIZES.items() if key not in ("num_key_value_heads", "intermediate_size")},
    "mpt": {"vocab_size": 64, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64},
    "mixtral": {**SIZES, "num_local_experts": 4},
    "qwen3_moe": {**SIZES, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "bloom": BLOOM,
    "mamba": {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
}
WITHOUT_MASK = ("bloom", "mamba")


def write(folder: Path, kind: str, **changes: object) -> Path:
    (folder / "config.json").write_text(json.dumps({"model_type": kind, **STUDENTS[kind], **changes}))
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", STUDENTS)
def test_every_architecture_is_measured_or_says_which_packing_it_takes(
    kind: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = write(tmp_path, kind)
    shape = shape_student(folder, 2, 16, dtype)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    assert shape.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert (shape.vocab, shape.layers) == (64, 2)
    assert shape.saved_bytes > shape.largest_saved_bytes > 0
    assert shape.linear_weights > 64 * 32
    if kind in WITHOUT_MASK:
        with pytest.raises(InputError, match=r"packing: documents, got .*; set packing to none"):
            shape_student(folder, 2, 16, dtype, is_masked=True)
    else:
        assert shape_student(folder, 2, 16, dtype, is_masked=True).saved_bytes >= shape.saved_bytes


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt"])
def test_more_positions_than_the_student_has_are_refused(kind: str, tmp_path: Path) -> None:
    folder = write(tmp_path, kind)
    shape_student(folder, 1, 64, torch.float32)
    with pytest.raises(InputError, match="seq_len 65: expected at most 64, the student's max_position_embeddings"):
        shape_student(folder, 1, 65, torch.float32)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_attention_heads": 0},
        {"hidden_size": "many"},
        {"hidden_size": -1},
        {"hidden_act": "nothing"},
        {"num_hidden_layers": None},
        {"model_type": "not-known"},
        {"rope_parameters": {"rope_type": "not-known"}},
        {"attn_implementation": "org/kernel"},
        {"text_config": {"quantization_config": {"quant_method": "gptq"}}},
    ],
)
def test_a_config_that_cannot_be_is_one_line(changes: dict[str, object], tmp_path: Path) -> None:
    with pytest.raises(InputError) as refused:
        shape_student(write(tmp_path, "llama", **changes), 1, 8, torch.float32)
    assert "\n" not in str(refused.value)
