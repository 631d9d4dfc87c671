"""What a file of gpt-oss says of itself, and what of it is refused by name."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from family_models import MIXTURES, WINDOW, make_family, write_family

from q4kd.harness.__main__ import main
from q4kd.trainer.errors import InputError
from q4kd.trainer.formats.open import open_model

CASE = MIXTURES["gpt-oss"]
MODEL = make_family(CASE)
LAYER = {
    "attn_norm.weight", "post_attention_norm.weight", "attn_sinks.weight",
    "attn_q.weight", "attn_k.weight", "attn_v.weight", "attn_output.weight",
    "attn_q.bias", "attn_k.bias", "attn_v.bias", "attn_output.bias",
    "ffn_gate_inp.weight", "ffn_gate_exps.weight", "ffn_up_exps.weight", "ffn_down_exps.weight",
    "ffn_gate_inp.bias", "ffn_gate_exps.bias", "ffn_up_exps.bias", "ffn_down_exps.bias",
}  # fmt: skip


def write(path: Path, **changes: Any) -> Path:
    """Write the model with other metadata; None takes a key away."""
    keys = {key: value for key, value in (CASE.keys | changes).items() if value is not None}
    return write_family(path, dataclasses.replace(CASE, keys=keys), MODEL)


def rewrite(
    path: Path,
    source: Path,
    *,
    without: str = "",
    extra: dict[str, np.ndarray] | None = None,
    kind: gguf.GGMLQuantizationType | None = None,
) -> Path:
    """Write a copy without a tensor, and with further ones, which are of a kind that is not their array's own."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(path, "gpt-oss")
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            writer.add_key_value(key, field.contents(), field.types[0], field.types[-1])
    for held in reader.tensors:
        if held.name != without:
            writer.add_tensor(held.name, np.asarray(held.data))
    for name, values in (extra or {}).items():
        writer.add_tensor(name, values, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_the_file_is_read(tmp_path: Path) -> None:
    model = open_model(write(tmp_path / "m.gguf"))
    config = model.config
    assert config.windows == (WINDOW, 0, WINDOW, 0)
    assert (config.num_experts, config.experts_per_token, config.expert_ffn_size) == (8, 3, 96)
    assert config.rope_scaling is not None and not config.rope_scaling.is_rounded
    assert (config.rope_scaling.kind, config.rope_scaling.factor, config.rope_scaling.original_context) == (
        "yarn", 4.0, 32
    )  # fmt: skip
    assert {name.removeprefix("blk.1.") for name in model.tensors if name.startswith("blk.1.")} == LAYER


def test_a_file_as_llama_cpp_writes_it_is_read(tmp_path: Path) -> None:
    """``expert_gating_func`` 3 is a softmax over the chosen; windows are scaled as the other layers are."""
    said = {"expert_gating_func": 3, "rope.freq_base_swa": 10_000.0, "attention.sliding_window_pattern": 2}
    said |= {"rope.scaling.yarn_beta_fast": 32.0, "rope.scaling.yarn_beta_slow": 1.0, "rope.dimension_count": 16}
    assert open_model(write(tmp_path / "m.gguf", **said)).config == open_model(write(tmp_path / "n.gguf")).config


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"attention.sliding_window": None}, "sliding_window: expected a number from 1"),
        ({"attention.sliding_window": 0}, "sliding_window: expected a number from 1"),
        ({"attention.sliding_window": -1.0}, "sliding_window"),
        ({"attention.sliding_window_pattern": [True, False]}, "sliding_window_pattern"),
        ({"rope.freq_base_swa": 20_000.0}, "rope.freq_base_swa: expected rope.freq_base, 10000, got 20000"),
        ({"rope.scaling.type": "linear"}, "rope.scaling"),
        ({"rope.scaling.factor": None}, "rope.scaling.factor"),
        ({"rope.scaling.factor": 0.5}, "rope.scaling.factor"),
        ({"rope.scaling.yarn_ext_factor": 0.5}, "yarn_ext_factor"),
        ({"expert_gating_func": 1}, "expert_gating_func: expected 0 or 3, got 1"),
        ({"expert_gating_func": 2}, "expert_gating_func: expected 0 or 3, got 2"),
        ({"expert_weights_norm": False}, "expert_weights_norm"),
        ({"expert_weights_scale": 2.5}, "expert_weights_scale"),
        ({"expert_shared_count": 1}, "expert_shared_count"),
        ({"expert_count": None}, "expert_count"),
        ({"expert_count": 7}, "shape (7, "),
        ({"expert_used_count": 9}, "expert_used_count"),
        ({"expert_feed_forward_length": 64}, "shape (8, 64"),
        ({"attn_logit_softcapping": 30.0}, "attn_logit_softcapping"),
        ({"attention.scale": 0.5}, "attention.scale"),
        ({"rope.dimension_count": 8}, "rope.dimension_count"),
    ],
)
def test_what_gpt_oss_has_not_is_refused_by_name(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    path = write(tmp_path / "m.gguf", **changes)
    with pytest.raises(InputError, match="expected") as caught:
        open_model(path)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("part", sorted(LAYER))
def test_a_missing_tensor_is_named(tmp_path: Path, part: str) -> None:
    path = rewrite(tmp_path / "m.gguf", write(tmp_path / "source.gguf"), without=f"blk.2.{part}")
    with pytest.raises(InputError, match=rf"expected tensor blk.2.{part}, got 1 missing"):
        open_model(path)


@pytest.mark.parametrize(
    ("name", "values", "words"),
    [
        ("blk.0.ffn_norm.weight", np.ones(64), "would be ignored"),
        ("blk.0.post_ffw_norm.weight", np.ones(64), "would be ignored"),
        ("blk.0.attn_q_norm.weight", np.ones(16), "would be ignored"),
        ("blk.0.ffn_up_shexp.weight", np.ones((96, 64)), "would be ignored"),
        ("rope_freqs.weight", np.ones(8), "would be ignored"),
    ],
)
def test_a_tensor_of_another_family_is_refused(tmp_path: Path, name: str, values: np.ndarray, words: str) -> None:
    path = rewrite(tmp_path / "m.gguf", write(tmp_path / "source.gguf"), extra={name: values.astype(np.float32)})
    with pytest.raises(InputError, match=words):
        open_model(path)


@pytest.mark.parametrize(
    ("part", "shape"), [("attn_sinks.weight", (2,)), ("ffn_gate_exps.bias", (96, 8)), ("ffn_down_exps.bias", (64,))]
)
def test_a_tensor_of_another_shape_is_refused(tmp_path: Path, part: str, shape: tuple[int, ...]) -> None:
    name = f"blk.1.{part}"
    source = write(tmp_path / "source.gguf")
    path = rewrite(tmp_path / "m.gguf", source, without=name, extra={name: np.ones(shape, np.float32)})
    with pytest.raises(InputError, match=f"{part}: expected shape"):
        open_model(path)


def test_biases_of_experts_are_held_as_vectors_are(tmp_path: Path) -> None:
    """A bias in blocks would be decoded nowhere, so it is refused by its type."""
    name, kind = "blk.0.ffn_up_exps.bias", gguf.GGMLQuantizationType.Q8_0
    packed = gguf.quants.quantize(np.ones((8, 96), np.float32), kind)
    source = write(tmp_path / "source.gguf")
    path = rewrite(tmp_path / "m.gguf", source, without=name, extra={name: packed}, kind=kind)
    with pytest.raises(InputError, match=r"ffn_up_exps.bias: expected an F32, F16 or BF16 vector, got Q8_0"):
        open_model(path)


def test_inspect_prints_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "m.gguf")
    assert main(["inspect", str(path), "--json"]) == 0
    config = json.loads(capsys.readouterr().out)["config"]
    assert (config["num_experts"], config["windows"]) == (8, [WINDOW, 0, WINDOW, 0])
    assert main(["inspect", str(path)]) == 0
    assert "num_experts 8 experts_per_token 3 expert_ffn_size 96" in " ".join(capsys.readouterr().out.split())
