"""Hybrid decoders as teachers: transformers' own model is what a file means, and documents are apart."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from architecture_models import row_errors  # noqa: E402
from hybrid_models import HYBRIDS, make_hybrid, write_hybrid  # noqa: E402
from teachers import load_quietly  # noqa: E402

from q4kd.harness.oracles.families import family_logits, read_family  # noqa: E402

BOUND = 1e-5
# Longer than two chunks; documents begin within a chunk, at its last position, at its edge, and one has one position.
LENGTH, EDGES = 150, (40, 41, 63, 64, 100, 149)
IDS = np.random.default_rng(4).integers(0, 320, (2, LENGTH))
STARTS = np.repeat([0, *EDGES], np.diff([0, *EDGES, LENGTH]))


@dataclasses.dataclass(frozen=True)
class Made:
    """A case's file, its model, and transformers' logits, float64 ``[2, T, V]``."""

    path: Path
    model: Any
    logits: np.ndarray


@pytest.fixture(scope="module", params=HYBRIDS)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Made]:
    case = HYBRIDS[request.param]
    model = make_hybrid(case)
    folder = tmp_path_factory.mktemp("hybrids")
    path = write_hybrid(folder / f"{request.param}.gguf", case, model, predictors=1)
    yield Made(path, model, theirs(model, IDS))


def theirs(model: Any, ids: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return np.asarray(model(torch.from_numpy(ids)).logits.numpy())


def ours(path: Path, ids: np.ndarray, **options: Any) -> np.ndarray:
    return np.asarray(load_quietly(path, **options).logits(torch.from_numpy(ids)).numpy())


def test_the_teacher_is_the_model_that_transformers_runs(made: Made) -> None:
    for backend in ("q4k", "dense"):
        assert row_errors(ours(made.path, IDS, backend=backend), made.logits).max() <= BOUND


@pytest.mark.parametrize("length", [1, 2, 3, 63, 64, 65, 128])
def test_every_length_gives_the_same_logits(made: Made, length: int) -> None:
    assert row_errors(ours(made.path, IDS[:, :length]), made.logits[:, :length]).max() <= BOUND


def test_the_oracle_is_the_model_that_transformers_runs(made: Made) -> None:
    model = read_family(made.path)
    for row in range(2):
        assert row_errors(family_logits(model, IDS[row]), made.logits[row]).max() <= BOUND


def test_packed_documents_are_each_alone(made: Made) -> None:
    model = read_family(made.path)
    alone = np.stack([np.concatenate([family_logits(model, part) for part in np.split(row, EDGES)]) for row in IDS])
    teacher = load_quietly(made.path)
    starts = torch.from_numpy(np.stack([STARTS, STARTS]))
    hidden = teacher.hidden(torch.from_numpy(IDS), starts)
    found = teacher.head_logits(hidden.flatten(0, 1)).view(2, LENGTH, -1).numpy()
    assert row_errors(found, alone).max() <= BOUND


def test_a_document_does_not_feel_what_lies_beside_it(made: Made) -> None:
    teacher = load_quietly(made.path)
    starts = torch.from_numpy(STARTS[None])
    others = IDS[:1].copy()
    others[:, :64] = (others[:, :64] + 7) % 320
    others[:, 100:] = (others[:, 100:] + 9) % 320
    before, after = (teacher.hidden(torch.from_numpy(ids), starts)[0, 64:100] for ids in (IDS[:1], others))
    assert torch.equal(before, after)


def test_bfloat16_is_near(made: Made) -> None:
    for backend in ("q4k", "dense"):
        found = ours(made.path, IDS, backend=backend, dtype="bfloat16")
        assert np.isfinite(found).all()
        assert 1e-5 < np.median(row_errors(found, made.logits)) <= 3e-2


def test_weights_are_held_as_they_lie_in_the_file(made: Made) -> None:
    teacher = load_quietly(made.path, backend="q4k")
    before = teacher.residency()
    teacher.hidden(torch.from_numpy(IDS))
    held = teacher.residency()
    assert held == before
    assert sum(held.resident_bytes.values()) == held.tensor_bytes == teacher.model.tensor_bytes


def test_long_sums_of_decays_do_not_lose_the_small_ones(tmp_path: Path) -> None:
    """A token that forgets everything must not blur what later ones keep: float32 sums of a chunk would."""
    from q4kd.harness.oracles.delta_net import recurrence
    from q4kd.trainer.teacher.delta_rule import delta_rule, unit_heads

    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(0, 1, (1, 64, 1, 16)) for _ in range(3))
    decay = np.full((1, 64, 1), -1e-3)
    decay[0, 3] = -3e4
    strength = rng.uniform(0.2, 1.0, (1, 64, 1))
    exact = recurrence(q[0, :, 0], k[0, :, 0], v[0, :, 0], np.exp(decay[0, :, 0]), strength[0, :, 0])
    given = [torch.from_numpy(x).float() for x in (q, k, v, decay, strength)]
    found = delta_rule(unit_heads(given[0]), unit_heads(given[1]), *given[2:])[0, :, 0].numpy()
    assert row_errors(found, exact).max() <= BOUND
