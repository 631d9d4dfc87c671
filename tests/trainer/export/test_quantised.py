"""``q4kd export`` into every mixture, with and without an importance matrix: what is written is the model, rounded."""

from collections import Counter
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

from exported_models import write_folder
from safetensors.torch import load_file

from q4kd.harness.__main__ import main
from q4kd.harness.cli.export import _TYPES
from q4kd.trainer.export import to_gguf
from q4kd.trainer.formats.gguf.recipes import RECIPES
from q4kd.trainer.formats.open import open_model

MOVED = "model.layers.0.self_attn.q_proj.weight"
# What a tensor of a type may lose, as a relative Frobenius error.
ROUND_TRIP = {
    "F16": 0.01, "BF16": 0.01, "Q8_0": 0.05, "Q6_K": 0.1, "Q5_K": 0.2, "Q4_K": 0.3, "Q3_K": 0.5, "Q2_K": 0.7,
    "IQ4_XS": 0.3, "IQ4_NL": 0.3, "Q5_0": 0.2, "Q4_0": 0.3,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    write_folder(root / "qwen2", "qwen2", num_hidden_layers=2)
    return root / "qwen2"


def export(folder: Path, out: Path, recipe: str, *words: str) -> int:
    return main(["export", str(folder), "--format", "gguf", "--quantize", recipe, "--out", str(out), *words])


def types(path: Path) -> Counter[str]:
    return Counter(tensor.type for tensor in open_model(path).tensors.values() if len(tensor.shape) == 2)


def test_the_command_offers_every_recipe() -> None:
    assert set(_TYPES) == set(RECIPES)


# Two layers with two query heads to a key head: 14 matrices of layers, the embedding and the head.
@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        ("q5_k_m", {"Q5_K": 13, "Q6_K": 3}),
        ("q4_k_s", {"Q4_K": 13, "Q5_K": 2, "Q6_K": 1}),
        ("q3_k_m", {"Q3_K": 9, "Q4_K": 4, "Q5_K": 2, "Q6_K": 1}),
        ("q3_k_s", {"Q3_K": 15, "Q6_K": 1}),
        ("q2_k", {"Q2_K": 9, "Q3_K": 6, "Q6_K": 1}),
        ("iq4_xs", {"IQ4_XS": 15, "Q6_K": 1}),
        ("iq4_nl", {"IQ4_NL": 15, "Q6_K": 1}),
        ("q5_0", {"Q5_0": 15, "Q6_K": 1}),
        ("q4_0", {"Q4_0": 15, "Q6_K": 1}),
    ],
)
def test_every_mixture_is_written_and_read_back(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], recipe: str, expected: dict[str, int]
) -> None:
    out = tmp_path / "m.gguf"
    assert export(folder, out, recipe) == 0
    assert types(out) == expected
    said = capsys.readouterr().out
    assert "read back" in said
    assert "no superblock" not in said
    fields = gguf.GGUFReader(out).fields
    assert fields["general.file_type"].contents() == RECIPES[recipe]


@pytest.mark.parametrize(
    ("recipe", "kind"),
    [
        ("f16", "F16"),
        ("bf16", "BF16"),
        ("q8_0", "Q8_0"),
        ("q6_k", "Q6_K"),
        ("q5_k_m", "Q5_K"),
        ("q4_k_m", "Q4_K"),
        ("q3_k_s", "Q3_K"),
        ("q2_k", "Q2_K"),
        ("iq4_xs", "IQ4_XS"),
        ("iq4_nl", "IQ4_NL"),
        ("q5_0", "Q5_0"),
        ("q4_0", "Q4_0"),
    ],
)
def test_weights_a_fifth_further_off_than_a_type_explains_are_refused(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    recipe: str,
    kind: str,
) -> None:
    original = to_gguf.write_gguf

    def write(path: Path, **options: Any) -> None:
        state = dict(options["state"])
        weight = state[MOVED].float()
        noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
        state[MOVED] = weight + 1.2 * ROUND_TRIP[kind] * weight.norm() / noise.norm() * noise
        original(path, **options | {"state": state})

    monkeypatch.setattr(to_gguf, "write_gguf", write)
    assert export(folder, tmp_path / "m.gguf", recipe) == 2
    assert f"blk.0.attn_q.weight ({kind})" in capsys.readouterr().err


def write_imatrix(path: Path, importance: dict[str, np.ndarray]) -> Path:
    writer = gguf.GGUFWriter(path, "")
    writer.add_string("general.type", "imatrix")
    for name, values in importance.items():
        writer.add_tensor(f"{name}.in_sum2", values)
        writer.add_tensor(f"{name}.counts", np.full((1, 1), 2.0, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_an_importance_matrix_weighs_the_columns_of_its_matrices(folder: Path, tmp_path: Path) -> None:
    target, source = "blk.1.ffn_up.weight", "model.layers.1.mlp.up_proj.weight"
    columns = np.arange(256) % 8 == 3
    imatrix = write_imatrix(tmp_path / "i.gguf", {target: np.where(columns, 100, 1).astype(np.float32)[None]})
    assert export(folder, tmp_path / "plain.gguf", "q3_k_m") == 0
    assert export(folder, tmp_path / "weighed.gguf", "q3_k_m", "--imatrix", str(imatrix)) == 0
    exact = load_file(folder / "model.safetensors")[source].float().numpy()
    plain, weighed = (gguf.GGUFReader(tmp_path / f"{name}.gguf") for name in ("plain", "weighed"))
    errors, same = [], []
    for before, after in zip(plain.tensors, weighed.tensors, strict=True):
        if before.name == target:
            decoded = [gguf.quants.dequantize(tensor.data, tensor.tensor_type) for tensor in (before, after)]
            errors += [float(np.linalg.norm((each - exact)[:, columns])) for each in decoded]
        else:
            same.append(np.array_equal(before.data, after.data))
    assert errors[1] < 0.8 * errors[0]
    assert all(same)
    assert weighed.fields["q4kd.imatrix.file"].contents() == "i.gguf"


def test_what_importances_cannot_be_used_for_is_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(imatrix: Path, form: str, words: str) -> None:
        given = ["hf"] if form == "hf" else ["gguf", "--quantize", form]
        line = ["export", str(folder), "--format", *given, "--out", str(tmp_path / "out"), "--imatrix", str(imatrix)]
        assert main(line) == 2
        assert words in capsys.readouterr().err
        assert not (tmp_path / "out").exists()

    ones = np.ones((1, 256), np.float32)
    good = write_imatrix(tmp_path / "good.gguf", {"blk.0.ffn_up.weight": ones})
    refused(good, "hf", "--imatrix: expected --format gguf with a quantised type")
    refused(good, "f16", "--imatrix: expected --format gguf with a quantised type")
    other = write_imatrix(tmp_path / "other.gguf", {"blk.9.ffn_up.weight": ones})
    refused(other, "q4_k_m", "tensors of this model")
    short = write_imatrix(tmp_path / "short.gguf", {"blk.0.ffn_up.weight": ones[:, :128]})
    refused(short, "q4_k_m", "expected 256 columns, got 128")


def test_importances_change_the_first_ffn_down_of_plain_types() -> None:
    from q4kd.trainer.formats.gguf.recipes import Mixture, tensor_type

    def kinds(recipe: str, weighed: bool) -> list[str]:
        mixture = Mixture(recipe, 16, tied=False, weighed=weighed)
        return [tensor_type(f"blk.{layer}.ffn_down.weight", (256, 256), mixture) for layer in range(16)]

    assert kinds("q4_0", weighed=True) == 2 * ["Q4_1"] + 14 * ["Q4_0"]
    assert kinds("q5_0", weighed=True) == 2 * ["Q5_1"] + 14 * ["Q5_0"]
    assert kinds("iq4_xs", weighed=False) == 2 * ["Q5_K"] + 14 * ["IQ4_XS"]
    assert kinds("iq4_xs", weighed=True) == 16 * ["IQ4_XS"]
    assert kinds("q4_0", weighed=False) == 16 * ["Q4_0"]
