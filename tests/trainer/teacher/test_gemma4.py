"""Gemma 4 as a teacher, dense and as a mixture: transformers' own model is what its file means."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
if not hasattr(transformers, "Gemma4ForCausalLM"):
    pytest.skip("this transformers does not know Gemma 4", allow_module_level=True)

from architecture_models import row_errors  # noqa: E402
from gemma4_models import GEMMA4, GEMMA4_MIXTURES, LENGTH, VOCAB, WINDOW, make_gemma4, write_gemma4  # noqa: E402
from teachers import load_quietly  # noqa: E402

from q4kd.harness.oracles.families import read_family  # noqa: E402
from q4kd.harness.oracles.gemma4 import gemma4_logits  # noqa: E402
from q4kd.trainer.formats.open import open_model  # noqa: E402
from q4kd.trainer.teacher.cpu import experts  # noqa: E402
from q4kd.trainer.teacher.cpu.experts import route  # noqa: E402

BOUND = 1e-5
CASES = GEMMA4 | GEMMA4_MIXTURES
IDS = np.random.default_rng(4).integers(0, VOCAB, (2, LENGTH))
STARTS = np.repeat([0, 40, 41], [40, 1, LENGTH - 41])


@dataclasses.dataclass(frozen=True)
class Made:
    """A case's file, its model, and transformers' logits, float64 ``[2, T, V]``."""

    path: Path
    model: Any
    logits: np.ndarray


@pytest.fixture(scope="module", params=CASES)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Made]:
    case = CASES[request.param]
    model = make_gemma4(case)
    path = write_gemma4(tmp_path_factory.mktemp("gemma4") / f"{request.param}.gguf", case, model)
    yield Made(path, model, theirs(model, IDS))


def theirs(model: Any, ids: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return np.asarray(model(torch.from_numpy(ids)).logits.numpy())


def test_the_teacher_is_the_model_that_transformers_runs(made: Made) -> None:
    for backend in ("q4k", "dense"):
        found = load_quietly(made.path, backend=backend).logits(torch.from_numpy(IDS)).numpy()
        assert row_errors(found, made.logits).max() <= BOUND


def test_the_oracle_is_the_model_that_transformers_runs(made: Made) -> None:
    model = read_family(made.path)
    for row in range(2):
        assert row_errors(gemma4_logits(model, IDS[row]), made.logits[row]).max() <= BOUND


def test_packed_documents_are_each_alone(made: Made) -> None:
    model, ids = read_family(made.path), IDS[0]
    alone = np.concatenate([gemma4_logits(model, part) for part in np.split(ids, [40, 41])])
    teacher = load_quietly(made.path)
    hidden = teacher.hidden(torch.from_numpy(ids[None]), torch.from_numpy(STARTS[None]))
    assert row_errors(teacher.head_logits(hidden[0]).numpy(), alone).max() <= BOUND


@pytest.mark.parametrize("length", [1, WINDOW - 1, WINDOW, WINDOW + 1])
def test_texts_around_the_length_of_a_window(made: Made, length: int) -> None:
    ids = IDS[:, :length]
    found = load_quietly(made.path).logits(torch.from_numpy(ids)).numpy()
    assert row_errors(found, theirs(made.model, ids)).max() <= BOUND


def test_every_weight_of_the_file_has_a_part_in_the_logits(made: Made) -> None:
    """A norm, scale or matrix that is changed changes what transformers computes, and what the teacher does alike."""
    every = [name for name, _ in [*made.model.named_parameters(), *made.model.named_buffers()]]
    # The first layer has a window, the third none; a scale of the last layer is undone by the norm behind it.
    chosen = [name for name in every if not name.startswith("model.layers.") or name.split(".")[2] in ("0", "2")]
    case = next(case for name, case in CASES.items() if name == made.path.stem)
    for name in chosen:
        if "inv_freq" in name or "embed_scale" in name:
            continue
        model = make_gemma4(case)
        with torch.no_grad():
            tensor = model.state_dict()[name]
            tensor.mul_(torch.linspace(0.5, 1.5, tensor.numel(), dtype=tensor.dtype).view_as(tensor) + 0.25)
        exact = theirs(model, IDS[:1])
        assert row_errors(exact, made.logits[:1]).max() > 1e-3, name
        path = write_gemma4(made.path.parent / "changed.gguf", case, model)
        found = load_quietly(path).logits(torch.from_numpy(IDS[:1])).numpy()
        assert row_errors(found, exact).max() <= BOUND, name


def test_bfloat16_products_stay_near_and_the_router_chooses_in_float32(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def watched(logits: torch.Tensor, per_token: int) -> tuple[torch.Tensor, torch.Tensor]:
        seen.append(logits.dtype)
        return route(logits, per_token)

    monkeypatch.setattr(experts, "route", watched)
    teacher = load_quietly(made.path, dtype="bfloat16")
    found = teacher.logits(torch.from_numpy(IDS)).numpy()
    assert np.isfinite(found).all()
    assert set(seen) == ({torch.float32} if teacher.config.num_experts else set())
    # Where some experts are chosen and others not, a rounded product moves tokens to other experts.
    if teacher.config.num_experts == teacher.config.experts_per_token:
        assert np.median(row_errors(found, made.logits)) <= 3e-2


def test_packed_weights_are_held_as_they_lie_in_the_file(made: Made) -> None:
    teacher = load_quietly(made.path, backend="q4k")
    before = teacher.residency()
    teacher.hidden(torch.from_numpy(IDS))
    held = teacher.residency()
    assert held == before and held.dense_bytes_of_quantised == 0
    assert sum(held.resident_bytes.values()) == held.tensor_bytes == teacher.model.tensor_bytes


def test_a_token_is_multiplied_by_its_own_experts_alone(made: Made) -> None:
    model = open_model(made.path)
    config = model.config
    expert = 3 * config.expert_ffn_size * config.hidden_size
    idle = config.num_layers * (config.num_experts - config.experts_per_token) * expert
    assert model.weights_per_token == model.num_weights - idle
