"""The dense families, written by an independent writer and run by llama.cpp and by the teacher.

Run by ``nox -s parity``; skipped without llama.cpp. Weights are float32, and its cache of keys and values is float16.
llama.cpp chooses the divisors for long texts by the context that it is made ready for (256), not by the text. Not
compared are files that it reads otherwise than their models are defined: it leaves out the windows of Mistral and of
Phi-3.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("llama_cpp", reason="the independent engine; nox -s parity builds it")

from architecture_models import row_errors
from family_models import CASES, LENGTH, make_family, write_family
from llamacpp_engine import their_logits
from teachers import load_quietly

from q4kd.harness.oracles.families import family_logits, read_family
from q4kd.harness.oracles.reference import log_softmax

COSINE = 0.99999
OTHERWISE = ("mistral-window", "phi3-short")
IDS = np.random.default_rng(8).integers(0, 320, LENGTH)


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    a, b = a.astype(np.float64), b.astype(np.float64)
    return (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)


@pytest.mark.parametrize("name", [name for name in CASES if name not in OTHERWISE])
def test_llama_cpp_gives_the_same_logits(
    tmp_path: Path, name: str, record_parity: Callable[[dict[str, Any]], None]
) -> None:
    case = CASES[name]
    path = write_family(tmp_path / f"{name}.gguf", case, make_family(case), vocabulary=True)
    ours = load_quietly(path).logits(torch.from_numpy(IDS)[None])[0].numpy()
    theirs = their_logits(path, IDS)
    exact = family_logits(read_family(path), IDS)
    log_p, log_q = log_softmax(theirs.astype(np.float64)), log_softmax(ours.astype(np.float64))
    record_parity(
        {
            "file": f"{name} F32",
            "types": "F32",
            "positions": len(IDS),
            "cosine": float(cosines(ours, theirs).min()),
            "error": float(row_errors(ours, exact).max()),
            "their_error": float(row_errors(theirs, exact).max()),
            "top1": float((ours.argmax(-1) == theirs.argmax(-1)).mean()),
            "kl": float((np.exp(log_p) * (log_p - log_q)).sum(-1).mean()),
        }
    )
    assert cosines(ours, theirs).min() >= COSINE
    assert row_errors(ours, exact).max() <= 1e-5
