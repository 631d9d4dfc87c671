"""Students of the dense families, exported as GGUF and run by llama.cpp: run by ``nox -s parity``.

Not compared is a file that llama.cpp reads otherwise than its model is defined: it leaves out the window of Phi-3.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("llama_cpp", reason="the independent engine; nox -s parity builds it")

from architecture_models import make_tokenizer, row_errors
from family_models import CASES, LENGTH, make_family
from llamacpp_engine import their_logits
from teachers import load_quietly

from q4kd.harness.oracles.reference import log_softmax
from q4kd.trainer.export.llama_cpp import differences
from q4kd.trainer.formats.gguf.writer import write_gguf
from q4kd.trainer.formats.open import open_model

COSINE = {"f32": 0.9999, "q8_0": 0.999}
OTHERWISE = ("mistral-window", "phi3-short")
IDS = np.random.default_rng(8).integers(0, 320, LENGTH)
STUDENTS = {name: case for name, case in CASES.items() if name not in OTHERWISE}
STUDENTS["mistral"] = dataclasses.replace(CASES["mistral-window"], config={"sliding_window": None})


@pytest.mark.parametrize("recipe", COSINE)
@pytest.mark.parametrize("name", STUDENTS)
def test_llama_cpp_has_the_logits_of_an_exported_student(
    tmp_path: Path, name: str, recipe: str, record_parity: Callable[[dict[str, Any]], None]
) -> None:
    model, path = make_family(STUDENTS[name]), tmp_path / "student.gguf"
    config = model.config.to_dict() | {"eos_token_id": None}
    state, tokenizer = model.state_dict(), make_tokenizer()
    # llama.cpp looks for tokens of Phi-3 in the vocabulary of a model that is named so.
    write_gguf(path, config=config, state=state, tokenizer=tokenizer, recipe=recipe, name="student")
    theirs = their_logits(path, IDS).astype(np.float64)
    ours = load_quietly(path).logits(torch.from_numpy(IDS)[None])[0].numpy().astype(np.float64)
    with torch.no_grad():
        exact = model(torch.from_numpy(IDS)[None]).logits[0].numpy()
    # What 8 bits cost a model of white noise is no difference between the engines.
    compared = exact if recipe == "f32" else ours
    log_p, log_q = log_softmax(theirs), log_softmax(ours)
    cosines = (compared * theirs).sum(-1) / np.linalg.norm(compared, axis=-1) / np.linalg.norm(theirs, axis=-1)
    record_parity(
        {
            "file": f"{name} {recipe} student",
            "types": recipe.upper(),
            "positions": len(IDS),
            "cosine": float(cosines.min()),
            "error": float(row_errors(ours, exact).max()),
            "their_error": float(row_errors(theirs, exact).max()),
            "top1": float((ours.argmax(-1) == theirs.argmax(-1)).mean()),
            "kl": float((np.exp(log_p) * (log_p - log_q)).sum(-1).mean()),
        }
    )
    assert cosines.min() >= COSINE[recipe]


def test_llama_cpp_leaves_out_the_window_of_phi3(tmp_path: Path) -> None:
    """``q4kd export`` says so by name (trainer/export/llama_cpp.py): up to the window the logits are alike."""
    model, path = make_family(CASES["phi3-short"]), tmp_path / "student.gguf"
    config = model.config.to_dict() | {"eos_token_id": None}
    tokenizer = make_tokenizer()
    write_gguf(path, config=config, state=model.state_dict(), tokenizer=tokenizer, recipe="f32", name="student")
    theirs = their_logits(path, IDS).astype(np.float64)
    with torch.no_grad():
        exact = model(torch.from_numpy(IDS)[None]).logits[0].numpy()
    errors = row_errors(theirs, exact)
    window = max(open_model(path).config.windows)
    (sentence,) = differences(open_model(path).config, tokenizer)
    assert f"from position {window} on" in sentence
    assert errors[:window].max() < 1e-2 < 0.05 < errors[window:].min()
