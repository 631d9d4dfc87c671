"""Gemma 4, written by an independent writer, run by llama.cpp and by the teacher. Run by ``nox -s parity``.

Files are F32, of which both multiply the same weights by the same float32 activations. llama.cpp looks its GELU up in a
table of float16, which is most of what is left; a random router is then led to other experts now and then.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("llama_cpp", reason="the independent engine; nox -s parity builds it")
transformers = pytest.importorskip("transformers")
if not hasattr(transformers, "Gemma4ForCausalLM"):
    pytest.skip("this transformers does not know Gemma 4", allow_module_level=True)

from gemma4_models import GEMMA4, GEMMA4_MIXTURES, LENGTH, VOCAB, make_gemma4, write_gemma4  # noqa: E402
from llamacpp_engine import their_logits  # noqa: E402
from parity_rows import parity_row  # noqa: E402
from teachers import load_quietly  # noqa: E402

from q4kd.harness.oracles.families import read_family  # noqa: E402
from q4kd.harness.oracles.gemma4 import gemma4_logits  # noqa: E402

COSINE_F32 = 0.99999
IDS = np.random.default_rng(8).integers(0, VOCAB, LENGTH)
CASES = GEMMA4 | GEMMA4_MIXTURES


@pytest.mark.parametrize("name", CASES)
def test_the_same_logits(tmp_path: Path, name: str, record_parity: Callable[[dict[str, Any]], None]) -> None:
    case = CASES[name]
    path = write_gemma4(tmp_path / "m.gguf", case, make_gemma4(case), vocabulary=True)
    ours = load_quietly(path, dtype="float32").logits(torch.from_numpy(IDS)[None])[0].numpy()
    row = parity_row(name, "F32", ours, their_logits(path, IDS), gemma4_logits(read_family(path), IDS))
    record_parity(row)
    assert row["error"] <= 1e-5
    assert row["cosine"] >= COSINE_F32
