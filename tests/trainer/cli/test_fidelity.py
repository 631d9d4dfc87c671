"""``q4kd fidelity`` end to end, on a pair made by our quantiser from a small float32 model."""

import argparse
import json
import re
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("transformers")

from exported_models import write_folder

from q4kd.harness.__main__ import main
from q4kd.harness.oracles.reference import from_hugging_face, log_softmax, read_gguf, reference_logits
from q4kd.trainer.demo import teacher_path
from q4kd.trainer.errors import InputError
from q4kd.trainer.files import read_json, sha256_file

WINDOWS, LENGTH = 4, 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("fidelity")
    write_folder(root / "model", "qwen2-tied")
    for form in ("q4_k_m", "f32"):
        words = ["--format", "gguf", "--quantize", form, "--out", str(root / f"{form}.gguf")]
        assert main(["export", str(root / "model"), *words]) == 0
    (root / "empty").mkdir()
    np.save(root / "ids.npy", np.random.default_rng(6).integers(5, 600, WINDOWS * LENGTH))
    return root


def run(folder: Path, a: str, b: str, capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    capsys.readouterr()
    options = ["--data", str(folder / "ids.npy"), "--seq-len", str(LENGTH), "--json"]
    assert main(["fidelity", str(folder / a), str(folder / b), *options, *words]) == 0
    value: dict[str, Any] = json.loads(capsys.readouterr().out)
    return value


def test_figures_are_those_of_float64(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from safetensors.numpy import load_file

    report = run(folder, "q4_k_m.gguf", "model", capsys, "--out", str(tmp_path / "report.json"))
    original = from_hugging_face(load_file(folder / "model/model.safetensors"), read_json(folder / "model/config.json"))
    quantised = read_gguf(folder / "q4_k_m.gguf")
    kl = []
    for window in np.load(folder / "ids.npy").reshape(WINDOWS, LENGTH):
        log_q, log_p = (log_softmax(reference_logits(m, window)[LENGTH // 2 : -1]) for m in (quantised, original))
        kl.append((np.exp(log_p) * (log_p - log_q)).sum(-1))
    assert report["tokens"] == np.concatenate(kl).size == WINDOWS * 11
    assert report["kl"]["mean"] == pytest.approx(np.concatenate(kl).mean(), abs=1e-6)
    assert report["kl"]["max"] == pytest.approx(np.concatenate(kl).max(), abs=1e-6)
    assert report["kl"]["mean"] > 1e-5
    assert report["a"]["sha256"] == sha256_file(folder / "q4_k_m.gguf")
    assert report["b"]["bits_per_weight"] == 32
    assert report["b"]["file"] == "model"
    assert read_json(tmp_path / "report.json") == report


def test_a_folder_and_its_file_are_one_model(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    by_folder, by_file = (run(folder, "q4_k_m.gguf", b, capsys) for b in ("model", "f32.gguf"))
    assert by_folder["kl"] == by_file["kl"]
    assert run(folder, "f32.gguf", "model", capsys)["kl"]["max"] == 0
    itself = run(folder, "q4_k_m.gguf", "q4_k_m.gguf", capsys)
    assert itself["kl"]["max"] == itself["kl"]["min"] == 0


def test_text_is_cut_by_the_models_own_tokenizer(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.txt").write_text("def main(argv):\n    return argv  # 12345\n" * 20)
    words = ["--data", str(tmp_path / "text.txt"), "--seq-len", "16", "--tokens", "128"]
    pair = [str(folder / "q4_k_m.gguf"), str(folder / "f32.gguf")]
    digests = []
    for more in ([], ["--tokenizer", str(folder / "model")]):
        capsys.readouterr()
        assert main(["fidelity", *pair, *words, *more, "--json"]) == 0
        digests.append(json.loads(capsys.readouterr().out)["data"]["sha256"])
    assert digests[0] == digests[1]


def test_the_answer_is_a_sentence(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--data", str(folder / "ids.npy"), "--seq-len", str(LENGTH)]
    assert main(["fidelity", str(folder / "q4_k_m.gguf"), str(folder / "f32.gguf"), *options]) == 0
    said = capsys.readouterr()
    assert "top-1 agreement" in said.out
    assert "nats per token against B" in said.out
    assert main(["fidelity", str(folder / "f32.gguf"), str(folder / "q4_k_m.gguf"), *options]) == 0
    assert "is A really the quantised one?" in capsys.readouterr().err
    assert main(["fidelity", str(folder / "f32.gguf"), str(folder / "f32.gguf"), *options]) == 0
    assert "the same function" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["{f}/q4_k_m.gguf", str(teacher_path())], "the two models: expected"),
        (["{f}/none.gguf", "{f}/f32.gguf"], "No such file"),
        (["{f}/q4_k_m.gguf", "{f}/empty"], "neither config.json"),
        (["{f}/q4_k_m.gguf", "{f}/f32.gguf", "--seq-len", "3"], "--seq-len: expected at least 4"),
        (["{f}/q4_k_m.gguf", "{f}/f32.gguf", "--tokens", "0"], "--tokens: expected at least 4"),
        (["{f}/q4_k_m.gguf", "{f}/f32.gguf", "--tokens", "1000000", "--seq-len", "1024"], "at most 512 positions"),
        (["{f}/q4_k_m.gguf", "{f}/f32.gguf", "--data", "{f}/none.txt"], "No such file"),
        (["{f}/q4_k_m.gguf", "{f}/f32.gguf", "--device", "tpu"], "--device"),
        (["{f}/q4_k_m.gguf", "{f}/f32.gguf", "--out", "{f}/none/x.json"], "choose another"),
    ],
)
def test_bad_input_is_one_line(folder: Path, words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    words = [word.format(f=folder) for word in words]
    options = [] if "--data" in words else ["--data", str(folder / "ids.npy")]
    options = [*options, "--seq-len", "8"] if "--seq-len" not in words else options
    if "1024" in words:
        np.save(folder / "long.npy", np.full(2048, 7))
        options = ["--data", str(folder / "long.npy")]
    assert main(["fidelity", *words, *options]) == 2
    err = [line for line in capsys.readouterr().err.splitlines() if line.startswith("q4kd: ")]
    assert len(err) == 1
    assert said in err[0]


def test_a_tokenizer_with_a_token_more_than_the_models_is_refused_by_that_token(folder: Path) -> None:
    from q4kd.trainer.cli import fidelity
    from q4kd.trainer.student.model import load_tokenizer

    vocabulary = load_tokenizer(folder / "model").get_vocab()
    tokens = sorted(vocabulary, key=lambda token: vocabulary[token])
    assert [vocabulary[token] for token in tokens] == list(range(len(tokens)))
    args = argparse.Namespace(data=folder / "a.txt", tokenizer=folder / "model")
    fidelity._tokenizer(args, types.SimpleNamespace(metadata={}, tokens=tokens))
    with pytest.raises(InputError, match=re.escape(f"{tokens[-1]!r} as {len(tokens) - 1}")):
        fidelity._tokenizer(args, types.SimpleNamespace(metadata={}, tokens=tokens[:-1]))
