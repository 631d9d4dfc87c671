"""Every architecture and type, written as a GGUF and run by the teacher: against float64 and against transformers.

The error is relative Frobenius, at each position; the bound is 1e-5 in float32.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from architecture_models import CASES, make_model, make_tokenizer, row_errors, state_arrays  # noqa: E402
from model_files import retype  # noqa: E402
from teachers import load_quietly  # noqa: E402

from q4kd.harness.inputs.models.code_blocks import CODE_TYPES  # noqa: E402
from q4kd.harness.oracles.reference import from_hugging_face, read_gguf, reference_logits  # noqa: E402
from q4kd.trainer.formats.gguf.writer import write_gguf  # noqa: E402
from q4kd.trainer.formats.model_file import ModelFile, PackedTensor  # noqa: E402
from q4kd.trainer.formats.open import open_model  # noqa: E402
from q4kd.trainer.formats.tensor_shapes import ROPE_FACTORS  # noqa: E402

BOUND = 1e-5
IDS = np.random.default_rng(2).integers(0, 320, 24)


def write(path: Path, case: str, recipe: str, layers: int = 2) -> Path:
    model = make_model(CASES[case], intermediate_size=256, num_hidden_layers=layers)
    write_gguf(
        path, config=model.config, state=model.state_dict(), tokenizer=make_tokenizer(), recipe=recipe, name=case
    )
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """F32 files of every case, written once."""
    folder = tmp_path_factory.mktemp("models")
    for case in CASES:
        write(folder / f"{case}.gguf", case, "f32")
    yield folder


def logits(model: ModelFile, backend: str = "q4k") -> np.ndarray:
    teacher = load_quietly(model, backend=backend, dtype="float32")
    return teacher.logits(torch.from_numpy(IDS)[None])[0].numpy()


@pytest.mark.parametrize("recipe", ["f16", "q8_0", "q4_k_m"])
@pytest.mark.parametrize("case", CASES)
def test_every_position_is_within_1e_5_of_float64(tmp_path: Path, case: str, recipe: str) -> None:
    path = write(tmp_path / "m.gguf", case, recipe, layers=1)
    exact = reference_logits(read_gguf(path), IDS)
    for backend in ("q4k", "dense"):
        assert row_errors(logits(open_model(path), backend), exact).max() <= BOUND


@pytest.mark.parametrize("case", CASES)
def test_the_teacher_is_the_model_that_transformers_runs(folder: Path, case: str) -> None:
    model = make_model(CASES[case], intermediate_size=256)
    with torch.no_grad():
        theirs = model.double()(torch.from_numpy(IDS)[None]).logits[0].numpy()
    assert row_errors(logits(open_model(folder / f"{case}.gguf")), theirs).max() <= BOUND


@pytest.mark.parametrize(
    ("case", "kind"),
    [
        *(("llama", kind) for kind in ("Q8_0", "Q5_K", "Q5_0", "Q4_0", "BF16", "F16", *CODE_TYPES)),
        ("qwen3-tied", "mixed"),
    ],
)
def test_every_type_is_within_1e_5_of_float64(tmp_path: Path, folder: Path, case: str, kind: str) -> None:
    cycle = iter(["Q8_0", "Q5_K", "Q5_0", "Q4_0", "BF16", "F16"] * 20)

    def types(name: str) -> str | None:
        if "norm" in name or name == ROPE_FACTORS:
            return "BF16" if kind == "BF16" else None
        return next(cycle) if kind == "mixed" else kind

    path = retype(folder / f"{case}.gguf", tmp_path / "m.gguf", types)
    model = open_model(path)
    stored = {tensor.type for tensor in model.tensors.values()}
    assert stored == ({"F32"} if kind != "BF16" else set()) | (
        {"Q8_0", "Q5_K", "Q5_0", "Q4_0", "BF16", "F16"} if kind == "mixed" else {kind}
    )
    exact = reference_logits(read_gguf(path), IDS)
    assert exact.std() > 0.1
    for backend in ("q4k", "dense"):
        assert row_errors(logits(model, backend), exact).max() <= BOUND


def without(tensors: Mapping[str, PackedTensor], *parts: str) -> dict[str, PackedTensor]:
    return {name: tensor for name, tensor in tensors.items() if not any(part in name for part in parts)}


@pytest.mark.parametrize(
    ("case", "parts"),
    [
        ("qwen2", ["attn_q.bias"]),
        ("qwen2", ["attn_k.bias"]),
        ("qwen2", ["attn_v.bias"]),
        ("qwen3", ["q_norm"]),
        ("qwen3", ["k_norm"]),
        ("llama3-tied", [ROPE_FACTORS]),
    ],
)
def test_a_tensor_that_were_skipped_would_show(folder: Path, case: str, parts: list[str]) -> None:
    model = open_model(folder / f"{case}.gguf")
    exact = reference_logits(read_gguf(folder / f"{case}.gguf"), IDS)
    assert row_errors(logits(model), exact).max() <= BOUND
    broken = dataclasses.replace(model, tensors=without(model.tensors, *parts))
    assert row_errors(logits(broken), exact).max() > 100 * BOUND


@pytest.mark.parametrize("case", ["qwen2", "qwen3", "llama", "mistral"])
def test_the_other_rotary_layout_would_show(folder: Path, case: str) -> None:
    model = open_model(folder / f"{case}.gguf")
    exact = reference_logits(read_gguf(folder / f"{case}.gguf"), IDS)
    other = "interleaved" if model.config.rope_layout == "split_halves" else "split_halves"
    broken = dataclasses.replace(model, config=dataclasses.replace(model.config, rope_layout=other))
    assert row_errors(logits(broken), exact)[1:].min() > 100 * BOUND


def test_an_untied_head_that_were_taken_for_the_embedding_would_show(folder: Path) -> None:
    model = make_model(CASES["llama"], intermediate_size=256)
    state = state_arrays(model)
    exact = reference_logits(from_hugging_face(state, model.config.to_dict()), IDS)
    path = folder / "llama.gguf"
    assert row_errors(logits(open_model(path)), exact).max() <= BOUND
    opened = open_model(path)
    tied = dataclasses.replace(opened, config=dataclasses.replace(opened.config, tied_head=True))
    assert row_errors(logits(tied), exact).min() > 0.1
