"""Random models of every architecture, quantised by llama.cpp and by us, run by both; float64 says who is right.

Run by ``nox -s parity``, which builds llama.cpp; skipped without it. llama.cpp rounds activations to 8 bits for
quantised weights, so its own error is 1 to 2 %; the bound on the cosine leaves room for that and for nothing else.
"""

import dataclasses
import itertools
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("llama_cpp", reason="the independent engine; nox -s parity builds it")

from architecture_models import CASES, Case, make_model, make_tokenizer
from llamacpp_engine import FILE_TYPES, quantise, their_logits
from parity_rows import cosines, parity_row
from teachers import load_quietly

from q4kd.harness.oracles.reference import read_gguf, reference_logits
from q4kd.trainer.formats.gguf.writer import write_gguf
from q4kd.trainer.formats.model_file import ModelFile
from q4kd.trainer.formats.open import open_model
from q4kd.trainer.formats.tensor_shapes import ROPE_FACTORS

COSINE, COSINE_F16, ERROR = 0.999, 0.99999, 1e-5
IDS = np.random.default_rng(3).integers(0, 320, 96)
SIZES = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 3, "num_attention_heads": 8}
SIZES["num_key_value_heads"] = 4
MODELS = {name: (CASES[name], SIZES) for name in ("qwen2", "qwen3", "llama", "llama3-tied", "mistral")}
# Rows of 320 and 864 weights hold no superblocks: llama.cpp falls back to types of 32 weights.
MODELS["qwen2-odd"] = (
    Case("qwen2"),
    {"hidden_size": 320, "intermediate_size": 864, "num_attention_heads": 5, "num_key_value_heads": 1},
)
OUR_RECIPES = ("q4_k_m", "q6_k", "q8_0", "q5_k_m", "q3_k_m", "q2_k", "iq4_xs", "iq4_nl", "q5_0", "q4_0")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("parity")


def write(path: Path, name: str, recipe: str) -> Path:
    """Write a model as our writer does; one that is there is kept."""
    if not path.exists():
        case, sizes = MODELS[name]
        model = make_model(case, **sizes)
        write_gguf(
            path, config=model.config, state=model.state_dict(), tokenizer=make_tokenizer(), recipe=recipe, name=name
        )
    return path


def our_logits(model: ModelFile) -> np.ndarray:
    teacher = load_quietly(model, backend="q4k", dtype="float32")
    return teacher.logits(torch.from_numpy(IDS)[None])[0].numpy().astype(np.float64)


def measure(path: Path, file: str) -> dict[str, Any]:
    """Run a file three times: llama.cpp, ours, float64."""
    model = open_model(path)
    ours, theirs, exact = our_logits(model), their_logits(path, IDS), reference_logits(read_gguf(path), IDS)
    types = Counter(tensor.type for tensor in model.tensors.values() if len(tensor.shape) == 2)
    words = " ".join(f"{count}x{name}" for name, count in sorted(types.items()))
    return parity_row(file, words, ours, theirs, exact)


@pytest.mark.parametrize(
    ("name", "file_type"),
    list(itertools.product(MODELS, ("F16", *FILE_TYPES))),
)
def test_a_file_that_llama_cpp_quantised(
    folder: Path, name: str, file_type: str, record_parity: Callable[[dict[str, Any]], None]
) -> None:
    path = write(folder / f"{name}.gguf", name, "f16")
    if file_type != "F16":
        path = quantise(path, folder / f"{name}-{file_type}.gguf", file_type)
    row = measure(path, f"{name} {file_type}")
    record_parity(row)
    assert row["error"] <= ERROR
    assert row["cosine"] >= (COSINE_F16 if file_type == "F16" else COSINE)


def test_the_odd_model_holds_the_types_llama_cpp_falls_back_to(folder: Path) -> None:
    path = quantise(write(folder / "qwen2-odd.gguf", "qwen2-odd", "f16"), folder / "odd.gguf", "Q4_K_M")
    assert {tensor.type for tensor in open_model(path).tensors.values()} == {"F32", "Q5_0", "Q8_0"}


@pytest.mark.parametrize("recipe", OUR_RECIPES)
@pytest.mark.parametrize("name", MODELS)
def test_a_file_that_we_quantised(
    folder: Path, name: str, recipe: str, record_parity: Callable[[dict[str, Any]], None]
) -> None:
    row = measure(write(folder / f"{name}-{recipe}.gguf", name, recipe), f"{name} our {recipe}")
    record_parity(row)
    assert row["error"] <= ERROR
    assert row["cosine"] >= COSINE


def _swap_layout(model: ModelFile) -> ModelFile:
    other = "interleaved" if model.config.rope_layout == "split_halves" else "split_halves"
    return dataclasses.replace(model, config=dataclasses.replace(model.config, rope_layout=other))


def _drop(part: str) -> Callable[[ModelFile], ModelFile]:
    def broken(model: ModelFile) -> ModelFile:
        kept = {name: tensor for name, tensor in model.tensors.items() if part not in name}
        return dataclasses.replace(model, tensors=kept)

    return broken


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("qwen2", _swap_layout),
        ("qwen2", _drop("attn_k.bias")),
        ("qwen2", _drop("attn_v.bias")),
        ("qwen3", _swap_layout),
        ("qwen3", _drop("q_norm")),
        ("llama", _swap_layout),
        ("llama3-tied", _drop(ROPE_FACTORS)),
    ],
)
def test_a_planted_fault_is_beyond_the_bound(folder: Path, name: str, fault: Callable[[ModelFile], ModelFile]) -> None:
    path = write(folder / f"{name}.gguf", name, "f16")
    theirs = their_logits(path, IDS).astype(np.float64)
    assert cosines(our_logits(open_model(path)), theirs).min() >= COSINE_F16
    assert cosines(our_logits(fault(open_model(path))), theirs).min() < COSINE
