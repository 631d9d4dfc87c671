"""What a file of each family says of itself, and what of it is refused by name."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from q4kd.harness.inputs.models.synthetic_families import FAMILIES, ORIGINAL, WINDOW, write_family_model
from q4kd.trainer.errors import InputError
from q4kd.trainer.formats.architecture import TeacherConfig
from q4kd.trainer.formats.open import open_model


def write(path: Path, name: str, **changes: Any) -> Path:
    """Write a family's model with other metadata; None takes a key away."""
    model = FAMILIES[name]
    keys = {key: value for key, value in (model.keys | changes).items() if value is not None}
    write_family_model(path, dataclasses.replace(model, keys=keys))
    return path


def config(path: Path, name: str, **changes: Any) -> TeacherConfig:
    return open_model(write(path, name, **changes)).config


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_opens(tmp_path: Path, name: str) -> None:
    read = config(tmp_path / "m.gguf", name)
    assert read.architecture == FAMILIES[name].architecture
    assert read.num_layers == FAMILIES[name].layers


def test_windows_are_read_layer_by_layer(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    assert config(path, "gemma3").windows == (WINDOW,) * 5 + (0,)
    assert config(path, "gemma2").windows == (WINDOW, 0) * 2
    assert config(path, "gemma2", **{"attention.sliding_window": None}).windows == (4096, 0) * 2
    assert config(path, "gemma2", **{"attention.sliding_window_pattern": 4}).windows == (WINDOW,) * 3 + (0,)
    assert config(path, "olmo3").windows == (WINDOW, WINDOW, 0, WINDOW)
    assert config(path, "mistral-window").windows == (WINDOW,) * 4
    # A window as long as the context leaves nothing out.
    assert config(path, "mistral-window", **{"attention.sliding_window": 640}).windows == ()
    assert config(path, "phi3-long").windows == ()


def test_rotary_embeddings_are_read(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    gemma = config(path, "gemma3")
    assert (gemma.rope_base, gemma.window_rope_base) == (1e6, 10_000.0)
    assert gemma.rope_scaling is not None and (gemma.rope_scaling.kind, gemma.rope_scaling.factor) == ("linear", 8.0)
    assert config(path, "gemma3", **{"rope.freq_base_swa": 5000.0}).window_rope_base == 5000.0
    assert config(path, "gemma3", **{"attention.sliding_window": None}).window_rope_base == 0
    assert config(path, "olmo3").window_rope_base == config(path, "olmo3").rope_base
    long = config(path, "phi3-long")
    assert long.rope_scaling is not None and long.rope_scaling.kind == "long"
    assert (long.rope_scaling.original_context, long.rope_scaling.attention_factor) == (ORIGINAL, 1.25)
    assert long.rotary_dim == 12
    assert config(path, "llama-linear", **{"rope.scaling.type": "none"}).rope_scaling is None
    assert config(path, "llama-linear", **{"rope.scaling.factor": 0.0}).rope_scaling is None
    old = config(path, "llama-linear", **{"rope.scaling.factor": None, "rope.scale_linear": 3.0}).rope_scaling
    assert old is not None and old.factor == 3.0
    assert [config(path, "smollm3").is_rotated(layer) for layer in range(4)] == [True, True, True, False]


def test_yarn_multiplies_by_its_own_factor_or_by_a_ratio(tmp_path: Path) -> None:
    path, log = tmp_path / "m.gguf", math.log(8.0)
    plain = config(path, "qwen2-yarn").rope_scaling
    assert plain is not None and plain.attention_factor == pytest.approx(1 + 0.1 * log)
    ratio = config(path, "ministral3").rope_scaling
    assert ratio is not None and ratio.attention_factor == pytest.approx(1.0)
    ends = {"rope.scaling.yarn_beta_fast": 16.0, "rope.scaling.yarn_beta_slow": 2.0}
    stated = config(path, "qwen2-yarn", **ends).rope_scaling
    assert stated is not None and (stated.beta_fast, stated.beta_slow) == (16.0, 2.0)


def test_multipliers_and_caps_are_read(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    granite = config(path, "granite")
    assert (granite.embedding_scale, granite.attention_scale) == (3.0, pytest.approx(0.7))
    assert (granite.residual_scale, granite.logit_scale) == (pytest.approx(0.4), 0.4)
    caps = config(path, "gemma2")
    assert (caps.attention_cap, caps.logit_cap, caps.embedding_scale) == (2.0, 3.0, 8.0)
    both = {"attn_logit_softcapping": None, "final_logit_softcapping": None}
    default = config(path, "gemma2", **both)
    assert (default.attention_cap, default.logit_cap) == (50.0, 30.0)


def test_the_27b_gemmas_scale_queries_by_hidden_size_and_heads(tmp_path: Path) -> None:
    model = dataclasses.replace(FAMILIES["gemma2"], layers=46)
    write_family_model(tmp_path / "m.gguf", dataclasses.replace(model, keys=model.keys | {"attention.key_length": 16}))
    assert open_model(tmp_path / "m.gguf").config.query_scale == pytest.approx(16**-0.5)


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("gemma2", {"rope.scaling.factor": 2.0}, "rope.scaling.factor"),
        ("gemma3", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ("gemma3", {"rope.scaling.type": "yarn"}, "rope.scaling"),
        ("gemma3", {"attention.sliding_window_pattern": [True] * 5}, "6 booleans"),
        ("gemma3", {"attention.sliding_window_pattern": 0}, "sliding_window_pattern"),
        ("gemma3", {"attention.sliding_window": -1.0}, "sliding_window"),
        ("gemma3", {"rope.dimension_count": 8}, "partial rotary"),
        (
            "phi3-long",
            {"rope.scaling.type": "linear", "rope.scaling.factor": 2.0, "rope.scaling.attn_factor": None},
            "rope.scaling.type",
        ),
        ("phi3-long", {"rope.scaling.factor": 4.0}, "rope.scaling.factor"),
        ("phi3-long", {"rope.dimension_count": 20}, "rope.dimension_count"),
        ("glm4", {"rope.dimension_count": 7}, "an even number"),
        ("glm4", {"rope.dimension_sections": [1, 1, 1, 1]}, "rope.dimension_sections"),
        ("qwen2-yarn", {"rope.scaling.yarn_ext_factor": 0.5}, "yarn_ext_factor"),
        ("qwen2-yarn", {"rope.scaling.factor": None}, "rope.scaling.factor"),
        ("qwen2-yarn", {"rope.freq_base": 1.0}, "rope.freq_base"),
        ("qwen2-yarn", {"attention.temperature_scale": 0.1}, "attention.temperature_scale"),
        ("llama-linear", {"rope.scaling.attn_factor": 1.5}, "attn_factor"),
        ("mistral-window", {"attention.sliding_window_pattern": 2}, "sliding_window_pattern"),
        ("granite", {"rope.scaling.finetuned": False}, "finetuned"),
        ("granite", {"logit_scale": 0.0}, "logit_scale"),
        ("smollm3", {"attention.sliding_window": 40}, "sliding_window"),
    ],
)
def test_what_a_family_has_not_is_refused_by_name(
    tmp_path: Path, name: str, changes: dict[str, Any], words: str
) -> None:
    path = write(tmp_path / "m.gguf", name, **changes)
    with pytest.raises(InputError, match="expected") as caught:
        open_model(path)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "tensor", "words"),
    [
        ("olmo3", "blk.0.attn_norm.weight", "would be ignored"),
        ("granite", "blk.0.post_attention_norm.weight", "would be ignored"),
        ("gemma3", "rope_freqs.weight", "would be ignored"),
        ("qwen2-yarn", "rope_factors_long.weight", "would be ignored"),
    ],
)
def test_a_tensor_of_another_family_is_refused(tmp_path: Path, name: str, tensor: str, words: str) -> None:
    reader_path, path = tmp_path / "source.gguf", tmp_path / "m.gguf"
    write_family_model(reader_path, FAMILIES[name])
    reader = gguf.GGUFReader(reader_path)
    writer = gguf.GGUFWriter(path, FAMILIES[name].architecture)
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            kind = field.types[1] if len(field.types) > 1 else None
            writer.add_key_value(key, field.contents(), field.types[0], kind)
    for held in reader.tensors:
        writer.add_tensor(held.name, np.asarray(held.data))
    writer.add_tensor(tensor, np.ones(64, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(InputError, match=words):
        open_model(path)
