"""Mixtures of experts, written by an independent writer, run by llama.cpp and by the teacher.

Run by ``nox -s parity``; skipped without llama.cpp. For quantised weights llama.cpp rounds activations to 8 bits, and
with them what the router reads: in a random model some positions are then given to other experts, and their logits are
of another function. So packed files are compared where the choice is decisive, or where there is none; a random
router's are compared once llama.cpp has decoded the same weights to F32.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("llama_cpp", reason="the independent engine; nox -s parity builds it")

from family_models import LENGTH, MIXTURES, decide, make_family, write_family
from llamacpp_engine import decode, quantise, their_logits
from parity_rows import parity_row
from teachers import load_quietly

from q4kd.harness.oracles.families import family_logits, read_family
from q4kd.trainer.formats.open import open_model

COSINE, COSINE_F32 = 0.999, 0.99999
IDS = np.random.default_rng(8).integers(0, 320, LENGTH)
# Superblocks of 256 weights need rows of that length.
WIDE = {"hidden_size": 256, "moe_intermediate_size": 256, "head_dim": 64}
WIDE_KEYS = {"attention.key_length": 64, "attention.value_length": 64, "expert_feed_forward_length": 256}
FORMS = ("Q8_0", "Q4_K_M", "Q6_K", "Q5_K_M", "Q3_K_M", "Q2_K", "IQ4_XS")


def write(path: Path, name: str, change: Callable[[Any], None] = lambda _model: None) -> Path:
    """Write one of the mixtures with wider matrices."""
    case = MIXTURES[name]
    case = dataclasses.replace(case, config=case.config | WIDE, keys=case.keys | WIDE_KEYS)
    model = make_family(case)
    change(model)
    return write_family(path, case, model, vocabulary=True)


def clearly(model: Any) -> None:
    """Make the routers choose by a wide margin."""
    decide(model, [layer.mlp.gate.weight for layer in model.model.layers], weight_of_kind=1.0)


def compare(path: Path, theirs: Path, name: str, record_parity: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Return the row of a file run by us and, from ``theirs`` of the same weights, by llama.cpp."""
    model = open_model(path)
    experts = {tensor.type for tensor in model.tensors.values() if len(tensor.shape) == 3}
    ours = load_quietly(model, backend="q4k", dtype="float32").logits(torch.from_numpy(IDS)[None])[0].numpy()
    exact = family_logits(read_family(path), IDS)
    row = parity_row(name, " ".join(sorted(experts)), ours, their_logits(theirs, IDS), exact)
    record_parity(row)
    assert row["error"] <= 1e-5
    return row


@pytest.mark.parametrize("form", FORMS)
def test_packed_experts_of_a_decisive_router(
    tmp_path: Path, form: str, record_parity: Callable[[dict[str, Any]], None]
) -> None:
    path = quantise(write(tmp_path / "m.gguf", "qwen3moe", clearly), tmp_path / f"{form}.gguf", form)
    assert compare(path, path, f"qwen3moe, decisive {form}", record_parity)["cosine"] >= COSINE


@pytest.mark.parametrize("form", ["Q8_0", "Q4_K_M"])
def test_packed_experts_that_are_all_chosen(
    tmp_path: Path, form: str, record_parity: Callable[[dict[str, Any]], None]
) -> None:
    path = quantise(write(tmp_path / "m.gguf", "qwen3moe-all"), tmp_path / f"{form}.gguf", form)
    assert compare(path, path, f"qwen3moe-all {form}", record_parity)["cosine"] >= COSINE


@pytest.mark.parametrize("form", ["F32", "Q4_K_M"])
def test_a_random_router(tmp_path: Path, form: str, record_parity: Callable[[dict[str, Any]], None]) -> None:
    path = write(tmp_path / "m.gguf", "qwen3moe")
    theirs = path
    if form != "F32":
        path = quantise(path, tmp_path / f"{form}.gguf", form)
        theirs = decode(path, tmp_path / "decoded.gguf")
    assert compare(path, theirs, f"qwen3moe {form}, decoded", record_parity)["cosine"] >= COSINE_F32
