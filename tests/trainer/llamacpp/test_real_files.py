"""Files that people download, as they are and decoded to F32 by llama.cpp: why it is further off than its bound.

``nox -s parity -- --parity-file FILE.gguf``; skipped without files or without llama.cpp. Random models keep a cosine of
0.999; trained ones fall below it, for llama.cpp rounds activations to 8 bits. Three measurements say that this is all:
the same weights without blocks, which are multiplied with float32 activations, give our logits; float64 is where we
are; and float64 with llama.cpp's rounding is as far off as llama.cpp.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("llama_cpp", reason="the independent engine; nox -s parity builds it")

from architecture_models import row_errors
from llamacpp_engine import decode, their_logits, tokenise
from parity_rows import cosines, parity_row
from rounded_activations import open_in_float64
from teachers import load_quietly

from q4kd.harness.oracles.families import family_logits
from q4kd.trainer.demo import data_path

POSITIONS = 64


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    files = metafunc.config.getoption("--parity-file")
    metafunc.parametrize("file", files, ids=[path.name for path in files])


def test_only_rounded_activations_lie_between_us(
    file: Path, tmp_path: Path, record_parity: Callable[[dict[str, Any]], None]
) -> None:
    ids = tokenise(file, (data_path() / "textwrap.py").read_text())[:POSITIONS]
    ours = load_quietly(file, dtype="float32").logits(torch.from_numpy(ids)[None])[0].numpy()
    exact = family_logits(open_in_float64(file), ids)
    rounded = family_logits(open_in_float64(file, rounded=True), ids)
    packed = their_logits(file, ids, exact_cache=True)
    decoded = their_logits(decode(file, tmp_path / "decoded.gguf"), ids, exact_cache=True)
    (tmp_path / "decoded.gguf").unlink()
    rows = [
        parity_row(f"{file.name[:25]} {how}", types, ours, theirs, exact)
        for how, types, theirs in (("", "as it is", packed), ("F32", "decoded by llama.cpp", decoded))
    ]
    rows.append(parity_row(f"{file.name[:25]} rounded", "float64, 8-bit inputs", ours, rounded, exact))
    for row in rows:
        record_parity(row)
    assert row_errors(ours, exact).max() <= 2e-5
    assert cosines(ours, decoded).min() >= 0.99999
    # What rounding costs varies from position to position with chance, as a last bit decides what a softmax follows.
    assert 0.5 <= np.median(row_errors(packed, exact)) / np.median(row_errors(rounded, exact)) <= 2
