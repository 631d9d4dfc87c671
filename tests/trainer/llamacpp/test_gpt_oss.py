"""gpt-oss, written by an independent writer, run by llama.cpp and by the teacher.

Run by ``nox -s parity``; skipped without llama.cpp. As in ``test_mixtures.py``, packed files are compared where the
choice of experts is decisive, and a random router's once llama.cpp has decoded the same weights to F32.

llama.cpp rounds the ends of YaRN's ramp to whole pairs, which gpt-oss does not. Here the ramp ends at a whole pair (but
for a millionth of one), so that both compute the same; ``test_what_rounding_the_ramp_costs`` says what it is otherwise.
"""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("llama_cpp", reason="the independent engine; nox -s parity builds it")

from family_models import LENGTH, MIXTURES, decide, exact_logits, make_family, write_family
from llamacpp_engine import decode, quantise, their_logits
from parity_rows import cosines, parity_row
from teachers import load_quietly

from q4kd.trainer.formats.open import open_model

COSINE, COSINE_F32 = 0.999, 0.99999
IDS = np.random.default_rng(8).integers(0, 320, LENGTH)
# Superblocks of 256 weights need rows of that length.
WIDE = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64}
WIDE_KEYS = {"attention.key_length": 64, "attention.value_length": 64, "expert_feed_forward_length": 256}
# The base at which the pair that turns once within the original 32 positions is the fifth, but for a millionth.
WHOLE_BASE = float(np.float32(math.exp(64 * math.log(32 / (2 * math.pi)) / (2 * (5 - 1e-6)))))
FORMS = ("MXFP4_MOE", "Q8_0", "Q4_K_M", "Q6_K", "IQ4_XS")
Record = Callable[[dict[str, Any]], None]


def write(path: Path, name: str, *, base: float = WHOLE_BASE, change: Callable[[Any], None] = lambda _: None) -> Path:
    """Write one of the models with wider matrices and another rotary base."""
    case = MIXTURES[name]
    config = case.config | WIDE
    if "rope_parameters" in config:
        config["rope_parameters"] = config["rope_parameters"] | {"rope_theta": base}
        case = dataclasses.replace(case, keys=case.keys | {"rope.freq_base": base})
    case = dataclasses.replace(case, config=config, keys=case.keys | WIDE_KEYS)
    model = make_family(case)
    change(model)
    return write_family(path, case, model, vocabulary=True)


def clearly(model: Any) -> None:
    """Make the routers choose by a wide margin."""
    decide(model, [layer.mlp.router.weight for layer in model.model.layers], weight_of_kind=4.0)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.router.bias.mul_(0.1)


def compare(path: Path, theirs: Path, name: str, record_parity: Record) -> dict[str, Any]:
    """Return the row of a file run by us and, from ``theirs`` of the same weights, by llama.cpp."""
    model = open_model(path)
    experts = {tensor.type for tensor in model.tensors.values() if len(tensor.shape) == 3}
    ours = load_quietly(model, backend="q4k", dtype="float32").logits(torch.from_numpy(IDS)[None])[0].numpy()
    row = parity_row(name, " ".join(sorted(experts)), ours, their_logits(theirs, IDS), exact_logits(path, IDS))
    record_parity(row)
    assert row["error"] <= 1e-5
    return row


@pytest.mark.parametrize("form", FORMS)
def test_packed_experts_of_a_decisive_router(tmp_path: Path, form: str, record_parity: Record) -> None:
    path = quantise(write(tmp_path / "m.gguf", "gpt-oss", change=clearly), tmp_path / f"{form}.gguf", form)
    if form == "MXFP4_MOE":
        assert {tensor.type for tensor in open_model(path).tensors.values()} == {"MXFP4", "Q8_0", "F32"}
    assert compare(path, path, f"gpt-oss, decisive {form}", record_parity)["cosine"] >= COSINE


@pytest.mark.parametrize("form", ["F32", "MXFP4_MOE", "Q4_K_M"])
@pytest.mark.parametrize("name", ["gpt-oss", "gpt-oss-all"])
def test_the_same_weights_decoded(tmp_path: Path, name: str, form: str, record_parity: Record) -> None:
    path = write(tmp_path / "m.gguf", name)
    theirs = path
    if form != "F32":
        path = quantise(path, tmp_path / f"{form}.gguf", form)
        theirs = decode(path, tmp_path / "decoded.gguf")
    assert compare(path, theirs, f"{name} {form}, decoded", record_parity)["cosine"] >= COSINE_F32


def test_what_rounding_the_ramp_costs(tmp_path: Path, record_parity: Record) -> None:
    """At a base where the ramp ends between pairs llama.cpp is elsewhere, as far as YaRN with rounded ends is."""
    path = write(tmp_path / "m.gguf", "gpt-oss", base=10_000.0)
    row = compare(path, path, "gpt-oss F32, a ramp between pairs", record_parity)
    assert row["cosine"] < COSINE_F32
    teacher = load_quietly(path, dtype="float32")
    scaling = dataclasses.replace(teacher.config.rope_scaling, is_rounded=True)
    model = open_model(path)
    rounded = dataclasses.replace(model, config=dataclasses.replace(model.config, rope_scaling=scaling))
    found = load_quietly(rounded, dtype="float32").logits(torch.from_numpy(IDS)[None])[0].numpy()
    assert cosines(found, their_logits(path, IDS)).min() >= COSINE_F32
