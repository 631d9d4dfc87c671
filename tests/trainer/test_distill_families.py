"""Students of the dense families from ``q4kd distill`` to a file: trained on packed documents, exported, the same."""

from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import shutil  # noqa: E402

import transformers  # noqa: E402
from architecture_models import row_errors  # noqa: E402
from family_models import CASES, SIZES  # noqa: E402
from teachers import load_quietly  # noqa: E402

from q4kd.harness.__main__ import main  # noqa: E402
from q4kd.harness.inputs.demo import VOCAB  # noqa: E402
from q4kd.trainer.demo import student_path, teacher_path  # noqa: E402
from q4kd.trainer.files import read_json  # noqa: E402

# One of each architecture.
TRAINED = ("gemma3", "gemma2", "llama-linear", "ministral3", "granite", "phi3-short", "smollm3", "olmo3", "glm4")
IDS = np.random.default_rng(2).integers(1, VOCAB, 24)
# Weights of such a size that every layer moves the logits.
FILE = {"vocab_size": VOCAB, "attn_implementation": "sdpa", "initializer_range": 0.2}


def write_student(folder: Path, name: str) -> Path:
    """Write a student without weights that has the demo's tokenizer."""
    case = CASES[name]
    folder.mkdir()
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(student_path() / file, folder / file)
    kind = getattr(transformers, case.name + ("TextConfig" if case.name == "Gemma3" else "Config"))
    ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    config = kind(**{**SIZES, **case.config, **ids, **FILE})
    config.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", TRAINED)
def test_a_trained_student_is_the_same_in_every_form(tmp_path: Path, name: str) -> None:
    student, run = write_student(tmp_path / "student", name), tmp_path / "run"
    data = tmp_path / "texts"
    data.mkdir()
    for index in range(8):
        (data / f"{index}.txt").write_text(f"def f{index}(x):\n    return x + {index}\n" * 3)
    settings = {"steps": 2, "batch_size": 1, "threads": 1, "eval_tokens": 64, "checkpoint_every": 0, "lr": 0.003}
    words = ["distill", "--teacher", str(teacher_path()), "--student", str(student), "--data", str(data)]
    words += ["--out", str(run), "--seq-len", "32", "--seed", "5", "--packing", "documents", "--from-scratch"]
    assert main([*words, *[word for key, value in settings.items() for word in ("--set", f"{key}={value}")]]) == 0
    for form, out in (("hf", "folder"), ("f32", "f32.gguf")):
        options = ["--format", "hf"] if form == "hf" else ["--format", "gguf", "--quantize", form]
        assert main(["export", str(run), *options, "--out", str(tmp_path / out)]) == 0
    ids = torch.from_numpy(IDS)[None]
    found = {}
    for folder in (run / "model", tmp_path / "folder"):
        # The plain attention: torch's fused one leaves out the cap of Gemma 2 in some releases of transformers.
        plain = {"use_safetensors": True, "attn_implementation": "eager"}
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, **plain).eval()
        with torch.no_grad():
            found[folder] = model(ids).logits[0].numpy()
    assert np.array_equal(*found.values())
    assert read_json(tmp_path / "folder/config.json")["model_type"] == read_json(student / "config.json")["model_type"]
    exact = found[run / "model"]
    assert row_errors(load_quietly(tmp_path / "f32.gguf").logits(ids)[0].numpy(), exact).max() <= 1e-5
