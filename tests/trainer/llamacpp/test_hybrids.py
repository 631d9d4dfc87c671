"""Hybrid decoders, written by an independent writer, run by llama.cpp and by the teacher.

Run by ``nox -s parity``; skipped without llama.cpp. It takes a text in chunks of 64 tokens too; the text here is longer
than two. Quantised files have rows of 256 weights. llama.cpp decodes them to F32 for itself, since its activations of 8
bits cost more than a hundredth of the logits in a random model, and lead tokens to other experts.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("llama_cpp", reason="the independent engine; nox -s parity builds it")

from hybrid_models import HYBRIDS, make_hybrid, write_hybrid
from llamacpp_engine import decode, quantise, their_logits
from parity_rows import parity_row
from teachers import load_quietly

from q4kd.harness.oracles.families import family_logits, read_family
from q4kd.trainer.formats.open import open_model

COSINE, COSINE_F32 = 0.999, 0.99999
IDS = np.random.default_rng(8).integers(0, 320, 150)
WIDE = {"hidden_size": 256, "intermediate_size": 256, "linear_key_head_dim": 128, "linear_value_head_dim": 128}
WIDE |= {"head_dim": 64, "partial_rotary_factor": 0.5, "moe_intermediate_size": 256}
WIDE |= {"shared_expert_intermediate_size": 256}
WIDE_KEYS = {"attention.key_length": 64, "attention.value_length": 64, "rope.dimension_count": 32}
WIDE_KEYS |= {"rope.dimension_sections": [6, 5, 5, 0], "ssm.state_size": 128, "ssm.inner_size": 768}


def write(path: Path, name: str, *, wide: bool, predictors: int = 0) -> Path:
    """Write one of the hybrids, with rows of 256 weights where it shall be quantised."""
    case = HYBRIDS[name]
    if wide:
        keys = case.keys | WIDE_KEYS | {key: 256 for key in case.keys if key.endswith("feed_forward_length")}
        config = case.config | {key: value for key, value in WIDE.items() if key in case.config or key in SIZES}
        config["rope_parameters"] = config["rope_parameters"] | {"mrope_section": [6, 5, 5]}
        case = dataclasses.replace(case, config=config, keys=keys)
    return write_hybrid(path, case, make_hybrid(case), vocabulary=True, predictors=predictors)


SIZES = ("hidden_size", "intermediate_size")


def compare(path: Path, theirs: Path, name: str, record_parity: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Return the row of a file run by us and, from ``theirs`` of the same weights, by llama.cpp."""
    model = open_model(path)
    types = " ".join(sorted({tensor.type for tensor in model.tensors.values()} - {"F32"}) or ["F32"])
    ours = load_quietly(model, backend="q4k").logits(torch.from_numpy(IDS)[None])[0].numpy()
    row = parity_row(name, types, ours, their_logits(theirs, IDS), family_logits(read_family(path), IDS))
    record_parity(row)
    assert row["error"] <= 1e-5
    return row


@pytest.mark.parametrize("name", HYBRIDS)
def test_llama_cpp_gives_the_same_logits(
    tmp_path: Path, name: str, record_parity: Callable[[dict[str, Any]], None]
) -> None:
    path = write(tmp_path / "m.gguf", name, wide=False)
    assert compare(path, path, f"{name} F32", record_parity)["cosine"] >= COSINE_F32


@pytest.mark.parametrize("form", ["Q8_0", "Q4_K_M", "Q6_K", "IQ4_XS"])
@pytest.mark.parametrize("name", ["qwen35", "qwen35moe"])
def test_packed_weights_that_llama_cpp_decoded(
    tmp_path: Path, name: str, form: str, record_parity: Callable[[dict[str, Any]], None]
) -> None:
    path = quantise(write(tmp_path / "m.gguf", name, wide=True), tmp_path / f"{form}.gguf", form)
    theirs = decode(path, tmp_path / "decoded.gguf")
    assert compare(path, theirs, f"{name} {form}, decoded", record_parity)["cosine"] >= COSINE_F32


def test_packed_weights_beside_activations_of_8_bits(
    tmp_path: Path, record_parity: Callable[[dict[str, Any]], None]
) -> None:
    path = quantise(write(tmp_path / "m.gguf", "qwen35", wide=True), tmp_path / "q8_0.gguf", "Q8_0")
    assert compare(path, path, "qwen35 Q8_0", record_parity)["cosine"] >= COSINE
