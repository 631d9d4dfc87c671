"""``q4kd export`` end to end: the folder and the file it writes, and what it leaves when it must not write."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

import transformers
from example_bundle import build, register
from exported_models import CHAT_TEMPLATE, write_folder
from made_runs import make_run
from safetensors.torch import load_file, save_file

import q4kd.trainer.export.to_gguf as export_gguf
import q4kd.trainer.export.to_huggingface as export_hf
from q4kd.harness.__main__ import main
from q4kd.harness.oracles.reference import from_hugging_face, read_gguf, reference_logits
from q4kd.trainer.files import read_json, sha256_file
from q4kd.trainer.formats.open import open_model

IDS = np.arange(5, 29)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of each kind that the writer treats in its own way."""
    root = tmp_path_factory.mktemp("models")
    for name in ("qwen2-tied", "qwen3", "llama3-tied"):
        write_folder(root / name, name, num_hidden_layers=1)
    return root


def export(source: Path, out: Path, form: str, *words: str) -> int:
    options = ["--format", "hf"] if form == "hf" else ["--format", "gguf", "--quantize", form]
    return main(["export", str(source), *options, "--out", str(out), *words])


def logits(folder: Path) -> np.ndarray:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True).eval()
    with torch.no_grad():
        return model(torch.from_numpy(IDS)[None]).logits[0].float().numpy()


@pytest.mark.parametrize("name", ["qwen2-tied", "qwen3", "llama3-tied"])
def test_the_folder_is_the_model_to_the_bit(folders: Path, tmp_path: Path, name: str) -> None:
    assert export(folders / name, tmp_path / "out", "hf") == 0
    assert np.array_equal(logits(tmp_path / "out"), logits(folders / name))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.chat_template == CHAT_TEMPLATE
    assert read_json(tmp_path / "out/generation_config.json")["eos_token_id"] == 3
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()} == {0o644}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_folder_in_another_precision(folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--format", "hf", "--quantize", "bf16", "--out", str(tmp_path / "out")]
    assert main(["export", str(folders / "qwen3"), *words]) == 0
    written, source = (load_file(path / "model.safetensors") for path in (tmp_path / "out", folders / "qwen3"))
    assert all(torch.equal(written[name], tensor.bfloat16()) for name, tensor in source.items())
    out = capsys.readouterr().out
    assert sha256_file(tmp_path / "out/model.safetensors") in out
    assert "bfloat16" in out


@pytest.mark.parametrize("name", ["qwen2-tied", "qwen3", "llama3-tied"])
@pytest.mark.parametrize(("form", "bound"), [("f32", 1e-6), ("f16", 2e-3), ("bf16", 2e-2), ("q4_k_m", 0.3)])
def test_the_file_is_the_model_within_its_type(
    folders: Path, tmp_path: Path, name: str, form: str, bound: float, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "m.gguf"
    assert export(folders / name, path, form) == 0
    assert sha256_file(path) in capsys.readouterr().out
    state = {key: tensor.numpy() for key, tensor in load_file(folders / name / "model.safetensors").items()}
    exact = reference_logits(from_hugging_face(state, read_json(folders / name / "config.json")), IDS)
    found = reference_logits(read_gguf(path), IDS)
    errors = np.linalg.norm(found - exact, axis=-1) / np.linalg.norm(exact, axis=-1)
    assert errors.max() <= bound
    assert form == "f32" or errors.max() > 0
    metadata = open_model(path).metadata
    assert metadata["tokenizer.chat_template"] == CHAT_TEMPLATE
    ids = [metadata[f"tokenizer.ggml.{role}_token_id"] for role in ("bos", "eos", "padding")]
    assert ids == [1, 3, 4]


def test_a_run_is_exported_with_its_provenance(folders: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", model=False)
    shutil.copytree(folders / "qwen3", run / "model")
    assert main(["export", str(run), "--format", "gguf", "--quantize", "q8_0"]) == 0
    metadata = open_model(tmp_path / "run-q8_0.gguf").metadata
    notes = {key: value for key, value in metadata.items() if key.startswith("q4kd.") and key != "q4kd.version"}
    assert notes == {
        "q4kd.teacher.file": "t.gguf",
        "q4kd.teacher.sha256": "ab",
        "q4kd.data.sha256": "d1",
        "q4kd.step": 6,
    }
    assert main(["export", str(run), "--format", "hf"]) == 0
    card = (tmp_path / "run-hf/README.md").read_text()
    assert "| 6 | 2.8000 |" in card
    assert str(tmp_path) not in card
    assert "/home/me" not in card


def test_a_checkpoint_is_exported_from_its_weights(
    folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "run", model=False)
    weights = run / "checkpoints/step-000004/model.safetensors"
    state = load_file(folders / "qwen2-tied/model.safetensors")
    # A checkpoint keeps one name of a tied pair, and not always the embedding's.
    state["lm_head.weight"] = state.pop("model.embed_tokens.weight")
    save_file(state, weights)
    document = read_json(weights.parent / "state.json")
    document["sha256"]["model.safetensors"] = sha256_file(weights)
    (weights.parent / "state.json").write_text(json.dumps(document))
    words = ["--checkpoint", "best", "--student", str(folders / "qwen2-tied")]
    assert export(run, tmp_path / "out", "hf", *words) == 0
    assert np.array_equal(logits(tmp_path / "out"), logits(folders / "qwen2-tied"))
    assert export(run, tmp_path / "m.gguf", "f32", *words) == 0
    assert export(folders / "qwen2-tied", tmp_path / "n.gguf", "f32") == 0
    ours, direct = (open_model(tmp_path / name).tensors for name in ("m.gguf", "n.gguf"))
    assert ours.keys() == direct.keys()
    assert all(np.array_equal(ours[name].data, direct[name].data) for name in ours)
    state["model.norm.weight"][3] = torch.inf
    save_file(state, weights)
    document["sha256"]["model.safetensors"] = sha256_file(weights)
    (weights.parent / "state.json").write_text(json.dumps(document))
    assert export(run, tmp_path / "infinite", "hf", *words) == 2
    assert "expected finite weights, got NaN or infinity in model.norm.weight" in capsys.readouterr().err


def test_an_adapter_checkpoint_is_named_as_one(
    folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "run", model=False, steps=(2,))
    weights = run / "checkpoints/step-000002/model.safetensors"
    save_file({"base_model.model.q_proj.lora_A.weight": torch.zeros(2, 2)}, weights)
    document = read_json(weights.parent / "state.json")
    document["sha256"]["model.safetensors"] = sha256_file(weights)
    (weights.parent / "state.json").write_text(json.dumps(document))
    words = ["--checkpoint", "last", "--student", str(folders / "qwen3")]
    assert export(run, tmp_path / "m.gguf", "f16", *words) == 2
    assert "a LoRA adapter" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--format", "hf", "--quantize", "q4_k_m"], "use --format gguf"),
        (["--format", "gguf", "--bundle", "b"], "leave it out, or export a Hugging Face folder"),
        (["--format", "gguf", "--checkpoint", "last"], "a model folder"),
        (["--format", "gguf", "--out", "{tmp}/no/m.gguf"], "make it, or choose another"),
        (["--format", "gguf", "--out", "{tmp}"], "a name that is free"),
        (["--format", "hf", "--out", "{tmp}"], "a name that is free"),
        (["--format", "hf", "--bundle", "{tmp}/none"], "a bundle folder, .tar.xz or .tar.gz"),
    ],
)
def test_bad_options_are_one_line(
    folders: Path, tmp_path: Path, words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(folders / "qwen3"), *[word.format(tmp=tmp_path) for word in words]]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("change", [{"model_type": "gpt2"}, {"num_hidden_layers": 2}, {"vocab_size": 100}])
@pytest.mark.parametrize("form", ["hf", "q8_0"])
def test_a_config_of_another_model_leaves_nothing(
    folders: Path, tmp_path: Path, change: dict[str, Any], form: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "model"
    shutil.copytree(folders / "qwen3", source)
    config = read_json(source / "config.json") | change
    if "num_hidden_layers" in change:
        config.pop("layer_types", None)
    (source / "config.json").write_text(json.dumps(config))
    assert export(source, tmp_path / "out", form) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_weights_that_half_precision_cannot_hold_are_refused(folders: Path, tmp_path: Path) -> None:
    source = tmp_path / "model"
    shutil.copytree(folders / "qwen3", source)
    state = load_file(source / "model.safetensors")
    state["model.layers.0.mlp.up_proj.weight"][0, 0] = 1e6
    save_file(state, source / "model.safetensors", metadata={"format": "pt"})
    words = ["--out", str(tmp_path / "out"), "--quantize", "f16"]
    assert main(["export", str(source), "--format", "hf", *words]) == 2
    assert main(["export", str(source), "--format", "gguf", *words]) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def _dropped(target: str, part: str) -> Any:
    """Return a stand-in for ``write_gguf`` that writes something else than it was given."""
    original = export_gguf.write_gguf

    def write(path: Path, **options: Any) -> None:
        import dataclasses

        if target == "state":
            options["state"] = {
                name: tensor * 2 if part in name else tensor for name, tensor in options["state"].items()
            }
        else:
            options["tokenizer"] = dataclasses.replace(options["tokenizer"], **{part: {}})
        original(path, **options)

    return write


@pytest.mark.parametrize(
    ("target", "part", "said"),
    [
        ("state", "q_norm", "attn_q_norm.weight (F32)"),
        ("state", "up_proj", "ffn_up.weight (Q8_0)"),
        ("tokenizer", "special_ids", "bos token"),
        ("tokenizer", "chat_templates", "chat template"),
    ],
)
def test_a_file_that_reads_back_as_another_is_not_kept(
    folders: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    target: str,
    part: str,
    said: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(export_gguf, "write_gguf", _dropped(target, part))
    assert export(folders / "qwen3", tmp_path / "m.gguf", "q8_0") == 2
    assert said in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_reads_back_as_another_is_not_kept(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = export_hf.read_weights

    def read(folder: Path) -> Any:
        state = original(folder)
        return {name: tensor + 1 if name == "model.norm.weight" else tensor for name, tensor in state.items()}

    monkeypatch.setattr(export_hf, "read_weights", read)
    assert export(folders / "qwen3", tmp_path / "out", "hf") == 2
    assert "bit by bit" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("form", ["hf", "q8_0"])
def test_a_full_disk_is_one_line_and_leaves_nothing(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_arguments: Any, **_options: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("gguf.GGUFWriter.write_tensor_data", full)
    monkeypatch.setattr(transformers.PreTrainedModel, "save_pretrained", full)
    assert export(folders / "qwen3", tmp_path / "out", form) == 2
    assert "No space left on device; choose another folder, or make room" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_card_cites_a_bundle_that_verifies(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    register(monkeypatch)
    bundle = build(tmp_path / "evidence")
    assert export(folders / "qwen3", tmp_path / "out", "hf", "--bundle", str(bundle)) == 0
    card = (tmp_path / "out/README.md").read_text()
    findings = read_json(bundle / "findings.json")
    assert "claim corroborated on profile" in card
    assert "authenticity not established" in card
    for finding in findings["findings"]:
        assert f"{finding['id']} | {finding['verdict']} |" in card
    changed = json.dumps(findings).replace('"corroborated"', '"falsified"', 1)
    (bundle / "findings.json").write_text(changed)
    assert export(folders / "qwen3", tmp_path / "other", "hf", "--bundle", str(bundle)) == 2
    assert "expected a bundle that verifies, got mismatch" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("name", ["qwen2-tied", "llama3-tied"])
def test_a_head_of_its_own_beside_a_config_that_ties_it_is_exported(
    folders: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """What a merge of adapters into embedding or head leaves; transformers keeps the two apart, and so must a file."""
    folder = Path(shutil.copytree(folders / name, tmp_path / "model"))
    tensors = load_file(folder / "model.safetensors")
    head = tensors["model.embed_tokens.weight"].flip(0)
    save_file(tensors | {"lm_head.weight": head}, folder / "model.safetensors", metadata={"format": "pt"})
    assert read_json(folder / "config.json")["tie_word_embeddings"]
    own = logits(folder)
    assert np.abs(own - logits(folders / name)).max() > 0.1
    assert export(folder, tmp_path / "hf", "hf") == 0
    assert np.array_equal(logits(tmp_path / "hf"), own)
    assert read_json(tmp_path / "hf" / "config.json")["tie_word_embeddings"] is False
    assert export(folder, tmp_path / "f.gguf", "f32") == 0
    assert not open_model(tmp_path / "f.gguf").config.tied_head
    found = reference_logits(read_gguf(tmp_path / "f.gguf"), IDS)
    assert np.abs(found - own).max() <= 1e-3 * np.abs(own).max()
    np.save(tmp_path / "ids.npy", np.tile(IDS, 4))
    # The same folder, and the file of the same embedding under a tied head, which is another function.
    assert export(folders / name, tmp_path / "tied.gguf", "f32") == 0
    capsys.readouterr()
    for file, same in (("f.gguf", True), ("tied.gguf", False)):
        words = ["fidelity", str(tmp_path / file), str(folder), "--data", str(tmp_path / "ids.npy"), "--json"]
        assert main([*words, "--seq-len", "24"]) == 0
        assert (json.loads(capsys.readouterr().out)["kl"]["mean"] < 1e-6) is same
