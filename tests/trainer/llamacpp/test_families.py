"""The dense families, written by an independent writer and run by llama.cpp and by the teacher.

Run by ``nox -s parity``; skipped without llama.cpp, whose cache of keys and values is float16. Weights are float32, and
once more Q8_0: rows of 64 and 96 weights hold no larger blocks.
llama.cpp chooses the divisors for long texts by the context that it is made ready for (256), not by the text. Not
compared are files that it reads otherwise than their models are defined: it leaves out the windows of Mistral and of
Phi-3.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("llama_cpp", reason="the independent engine; nox -s parity builds it")

from family_models import CASES, LENGTH, MIXTURES, FamilyCase, make_family, write_family
from hybrid_models import HYBRIDS
from llamacpp_engine import quantise, their_logits
from parity_rows import parity_row
from teachers import load_quietly

from q4kd.harness.oracles.families import family_logits, read_family
from q4kd.trainer.formats.families import FAMILIES, Family
from q4kd.trainer.formats.open import open_model

COSINE = {"F32": 0.99999, "Q8_0": 0.999}
OTHERWISE = ("mistral-window", "phi3-short")
IDS = np.random.default_rng(8).integers(0, 320, LENGTH)


@pytest.mark.parametrize("form", COSINE)
@pytest.mark.parametrize("name", [name for name in CASES if name not in OTHERWISE])
def test_llama_cpp_gives_the_same_logits(
    tmp_path: Path, name: str, form: str, record_parity: Callable[[dict[str, Any]], None]
) -> None:
    case = CASES[name]
    path = write_family(tmp_path / f"{name}.gguf", case, make_family(case), vocabulary=True)
    if form != "F32":
        path = quantise(path, tmp_path / f"{name}-{form}.gguf", form)
    model = open_model(path)
    assert {tensor.type for tensor in model.tensors.values()} == {"F32", form}
    ours = load_quietly(model, dtype="float32").logits(torch.from_numpy(IDS)[None])[0].numpy()
    exact = family_logits(read_family(path), IDS)
    row = parity_row(f"{name} {form}", form, ours, their_logits(path, IDS), exact)
    record_parity(row | {"particulars": particulars(case)})
    assert row["cosine"] >= COSINE[form]
    assert row["error"] <= 1e-5


def particulars(case: FamilyCase) -> str:
    """Return what distinguishes the case: fields of its family that are not the default, and keys of its file."""
    family = FAMILIES[case.architecture]
    own = [field.name for field in dataclasses.fields(Family) if getattr(family, field.name) != field.default]
    return ", ".join([name for name in own if name not in ("keys", "scalings")] + list(case.keys) + list(case.tensors))


def test_every_family_is_among_them() -> None:
    cases = {case.architecture for name, case in (CASES | MIXTURES | HYBRIDS).items() if name not in OTHERWISE}
    assert cases | {"gemma4"} == set(FAMILIES)  # test_gemma4.py compares it
