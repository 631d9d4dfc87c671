"""config.json in the teacher's terms: what a GGUF can say is read, what it cannot is refused by name."""

from typing import Any

import numpy as np
import pytest

from q4kd.trainer.errors import InputError
from q4kd.trainer.formats.huggingface.reader import read_huggingface_config, rope_factors, rope_tensors

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}

PART = {"rope_type": "default", "rope_theta": 1e4}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
LAYERS = {"full_attention": YARN, "sliding_attention": PART}
OLMO3 = {"model_type": "olmo3", "sliding_window": 64, "rope_parameters": LAYERS}
# As Gemma's own older files say it.
GEMMA2 = {
    "model_type": "gemma2",
    "query_pre_attn_scalar": 16,
    "sliding_window": 64,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
}
WIDE = {"query_pre_attn_scalar": 32}
GEMMA3 = {
    "model_type": "gemma3_text",
    "query_pre_attn_scalar": 16,
    "sliding_window": 64,
    "rope_parameters": None,
    "rope_scaling": None,
    "rope_theta": 1e6,
    "rope_local_base_freq": 1e4,
}


def settings(model_type: str = "llama", **changes: Any) -> dict[str, Any]:
    return {
        "model_type": model_type,
        "vocab_size": 40,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 12345.0},
    } | changes


@pytest.mark.parametrize(
    ("model_type", "architecture", "head_dim", "layout"),
    [
        ("qwen2", "qwen2", 16, "split_halves"),
        ("qwen3", "qwen3", 128, "split_halves"),
        ("llama", "llama", 16, "interleaved"),
        ("mistral", "llama", 16, "interleaved"),
    ],
)
def test_architectures(model_type: str, architecture: str, head_dim: int, layout: str) -> None:
    config = read_huggingface_config(settings(model_type))
    assert (config.architecture, config.head_dim, config.rope_layout) == (architecture, head_dim, layout)
    assert config.qk_norm is (architecture == "qwen3")
    assert (config.rope_base, config.num_kv_heads, config.tied_head) == (12345.0, 2, False)
    assert read_huggingface_config(settings(model_type, head_dim=32, num_key_value_heads=None)).num_kv_heads == 4


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "qwen2", "sliding_window": 64, "use_sliding_window": False},
        {"model_type": "mistral", "sliding_window": None},
        {"model_type": "mistral", "sliding_window": 128},
        {"rope_parameters": None, "rope_theta": 1e4, "rope_scaling": None},
        {"rope_parameters": LLAMA3_ROPE},
        {"partial_rotary_factor": 1.0, "layer_types": ["full_attention"]},
    ],
)
def test_what_changes_nothing_is_read(changes: dict[str, Any]) -> None:
    assert read_huggingface_config(settings(**changes)).context_length == 128


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "gemma"}, "model_type"),
        ({"model_type": None}, "model_type"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"model_type": "qwen2", "use_sliding_window": True}, "sliding"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding"),
        ({"model_type": "mistral", "sliding_window": 127}, "sliding_window"),
        ({"model_type": "mistral", "sliding_window": "wide"}, "sliding_window"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_parameters": LLAMA3_ROPE | {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "rope type"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "original_max_position_embeddings"),
        ({"rope_parameters": YARN | {"factor": 0.5}}, "rope factor"),
        ({"rope_parameters": YARN | {"truncate": False}}, "truncate"),
        ({"rope_parameters": None, "rope_theta": 1e4, "rope_scaling": {"type": "linear"}}, "factor"),
        ({"model_type": "qwen2", "rope_parameters": YARN | {"rope_type": "longrope"}}, "rope type"),
        (GEMMA3 | {"model_type": "gemma3"}, "model_type"),
        (GEMMA3 | {"hidden_activation": "gelu"}, "hidden_activation"),
        (GEMMA3 | {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        (GEMMA3 | {"query_pre_attn_scalar": 8}, "query_pre_attn_scalar"),
        (GEMMA3 | {"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        (GEMMA3 | {"layer_types": ["full_attention"]}, "layer_types"),
        (GEMMA3 | {"rope_local_base_freq": "low"}, "rope_local_base_freq"),
        (OLMO3 | {"rope_parameters": {**LAYERS, "sliding_attention": PART | {"rope_theta": 2e4}}}, "sliding_attention"),
        (OLMO3 | {"rope_parameters": {**LAYERS, "sliding_attention": YARN}}, "sliding_attention"),
        (GEMMA2 | {"attn_logit_softcapping": None}, "attn_logit_softcapping"),
        ({"model_type": "granite"}, "embedding_multiplier"),
        ({"model_type": "ministral3"}, "rope type"),
        ({"model_type": "ministral3", "rope_parameters": YARN}, "llama_4_scaling_beta"),
        ({"model_type": "smollm3", "no_rope_layers": [0]}, "no_rope_layers"),
        ({"model_type": "phi3", "rope_parameters": PART | {"partial_rotary_factor": 0.2}}, "partial_rotary_factor"),
        ({"model_type": "phi3", "rope_parameters": PART | {"partial_rotary_factor": 2}}, "partial_rotary_factor"),
        ({"model_type": "qwen3", "rope_parameters": LLAMA3_ROPE}, "rope type"),
        ({"rope_parameters": "plain"}, "rope_parameters"),
        ({"rope_parameters": None}, "rope_theta"),
        ({"rope_parameters": {"rope_theta": float("inf")}}, "rope_theta"),
        ({"head_dim": True}, "head_dim"),
        ({"head_dim": 16.0}, "head_dim"),
        ({"rms_norm_eps": None}, "rms_norm_eps"),
        ({"num_attention_heads": 0}, "num_attention_heads"),
        ({"hidden_size": None}, "hidden_size"),
    ],
)
def test_what_a_file_cannot_say_is_refused_by_name(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError) as caught:
        read_huggingface_config(settings(**changes))
    assert words in caught.value.subject


def test_older_configs_of_gemma_are_read() -> None:
    config = read_huggingface_config(settings(**GEMMA3, num_hidden_layers=7))
    assert config.windows == (64,) * 5 + (0, 64)
    assert (config.rope_base, config.window_rope_base, config.embedding_scale) == (1e6, 1e4, 8.0)
    config = read_huggingface_config(settings(**GEMMA2, num_hidden_layers=46, hidden_size=128, head_dim=16) | WIDE)
    assert config.windows[:3] == (64, 0, 64)
    assert (config.attention_cap, config.logit_cap, config.attention_scale) == (50.0, 30.0, 1 / np.sqrt(32))


@pytest.mark.parametrize(
    ("changes", "attention_factor"),
    [
        ({}, 0.1 * np.log(4) + 1),
        ({"attention_factor": 1.5}, 1.5),
        ({"mscale": 1.0, "mscale_all_dim": 1.0}, 1.0),
        ({"mscale": 2.0, "mscale_all_dim": 0.5}, (0.2 * np.log(4) + 1) / (0.05 * np.log(4) + 1)),
        ({"factor": None}, 0.1 * np.log(4) + 1),
    ],
)
def test_yarn_is_read_as_transformers_does(changes: dict[str, Any], attention_factor: float) -> None:
    found = read_huggingface_config(settings("qwen2", rope_parameters=YARN | changes)).rope_scaling
    assert found is not None
    assert (found.kind, found.factor, found.original_context) == ("yarn", 4.0, 32)
    assert found.attention_factor == pytest.approx(attention_factor, rel=1e-12)


def test_divisors_for_long_texts_are_lists_of_positive_numbers() -> None:
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 32}
    lists = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    found = rope_tensors(settings("phi3", rope_parameters=rope | lists))
    assert {name: factors.tolist() for name, factors in found.items()} == {
        "rope_factors_long.weight": [2.0] * 8,
        "rope_factors_short.weight": [1.0] * 8,
    }
    assert rope_tensors(settings()) == {}
    for wrong in (None, "1.0", [], [1.0, 0.0], [True]):
        with pytest.raises(InputError, match="long_factor"):
            rope_tensors(settings("phi3", rope_parameters=rope | lists | {"long_factor": wrong}))


def test_llama3_scaling_becomes_the_factors_that_llama_cpps_converter_writes() -> None:
    assert rope_factors(settings()) is None
    factors = rope_factors(settings(head_dim=128, rope_parameters=LLAMA3_ROPE))
    assert factors is not None
    assert factors.dtype == np.float32
    wavelengths = 2 * np.pi * 5e5 ** (np.arange(64) / 64)
    assert (factors[wavelengths < 8192 / 4] == 1).all()
    assert (factors[wavelengths > 8192] == 8).all()
    between = (wavelengths > 8192 / 4) & (wavelengths < 8192)
    smooth = (8192 / wavelengths[between] - 1) / (4 - 1)
    assert between.sum() >= 5
    np.testing.assert_allclose(factors[between], 1 / ((1 - smooth) / 8 + smooth), rtol=1e-6)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"original_max_position_embeddings": None}, "original_max_position_embeddings"),
        ({"factor": -8.0}, "factor"),
        ({"low_freq_factor": "1"}, "low_freq_factor"),
        ({"high_freq_factor": 1.0}, "high_freq_factor"),
    ],
)
def test_a_scaling_with_meaningless_numbers_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError) as caught:
        rope_factors(settings(rope_parameters=LLAMA3_ROPE | changes))
    assert words in caught.value.subject
