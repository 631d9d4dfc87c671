"""Mixtures of experts as teachers: transformers' own model is what a file means, at any load of the experts."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from architecture_models import row_errors  # noqa: E402
from family_models import (  # noqa: E402
    LENGTH,
    MIXTURES,
    MadeFamily,
    exact_logits,
    made_family,
    make_family,
    their_logits,
    write_family,
)
from teachers import load_quietly  # noqa: E402

import q4kd.trainer.teacher.cpu.weights as weights_module  # noqa: E402
from q4kd.trainer.formats.open import open_model  # noqa: E402
from q4kd.trainer.teacher.cpu import experts as experts_module  # noqa: E402

BOUND = 1e-5
IDS = np.random.default_rng(4).integers(0, 320, (2, LENGTH))
STARTS = np.repeat([0, 40, 41], [40, 1, LENGTH - 41])


@pytest.fixture(scope="module", params=MIXTURES)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> MadeFamily:
    return made_family(tmp_path_factory.mktemp("mixtures"), request.param, MIXTURES[request.param], IDS)


def ours(path: Path, ids: np.ndarray, **options: Any) -> np.ndarray:
    return np.asarray(load_quietly(path, dtype="float32", **options).logits(torch.from_numpy(ids)).numpy())


def test_the_teacher_is_the_model_that_transformers_runs(made: MadeFamily) -> None:
    for backend in ("q4k", "dense"):
        assert row_errors(ours(made.path, IDS, backend=backend), made.logits).max() <= BOUND


def test_the_oracle_is_the_model_that_transformers_runs(made: MadeFamily) -> None:
    for row in range(2):
        assert row_errors(exact_logits(made.path, IDS[row]), made.logits[row]).max() <= 1e-5


def test_packed_documents_are_each_alone(made: MadeFamily) -> None:
    ids = IDS[0]
    alone = np.concatenate([exact_logits(made.path, part) for part in np.split(ids, [40, 41])])
    teacher = load_quietly(made.path, dtype="float32")
    hidden = teacher.hidden(torch.from_numpy(ids[None]), torch.from_numpy(STARTS[None]))
    assert row_errors(teacher.head_logits(hidden[0]).numpy(), alone).max() <= BOUND


def repeated(token: int, length: int = LENGTH) -> np.ndarray:
    return np.full((1, length), token)


@pytest.mark.parametrize("ids", [IDS[:1], repeated(7), repeated(9, 1), np.stack([IDS[0], repeated(7)[0]])])
def test_no_token_is_left_out_at_any_load(made: MadeFamily, ids: np.ndarray) -> None:
    assert row_errors(ours(made.path, ids), their_logits(made.model, ids)).max() <= BOUND


def test_experts_that_no_token_chose_are_not_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_family(tmp_path / "m.gguf", MIXTURES["qwen3moe"], make_family(MIXTURES["qwen3moe"]))
    teacher = load_quietly(path, backend="q4k", dtype="float32")
    config, rows = teacher.config, []
    original = weights_module.decode_rows

    def counted(kind: str, packed: torch.Tensor, out: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        rows.append(tuple(out.shape))
        return original(kind, packed, out, scale)

    monkeypatch.setattr(weights_module, "decode_rows", counted)
    teacher.hidden(torch.from_numpy(repeated(7, 1)))
    expert = (config.expert_ffn_size, config.hidden_size)
    assert rows.count(expert) == 2 * config.experts_per_token * config.num_layers
    assert rows.count(expert[::-1]) == config.experts_per_token * config.num_layers
    rows.clear()
    teacher.hidden(torch.from_numpy(IDS))
    # Of two sequences of random tokens every layer's experts all have some, and each is decoded once.
    assert rows.count(expert[::-1]) == config.num_experts * config.num_layers


def test_packed_experts_are_held_as_they_lie_in_the_file(made: MadeFamily) -> None:
    teacher = load_quietly(made.path, backend="q4k")
    before = teacher.residency()
    teacher.hidden(torch.from_numpy(IDS))
    held = teacher.residency()
    assert held == before and held.dense_bytes_of_quantised == 0
    assert sum(held.resident_bytes.values()) == held.tensor_bytes == teacher.model.tensor_bytes


@pytest.mark.parametrize("name", ["qwen3moe", "gpt-oss"])
def test_the_router_chooses_in_float32_where_products_are_bfloat16(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    path = write_family(tmp_path / "m.gguf", MIXTURES[name], make_family(MIXTURES[name]))
    seen = []
    original = experts_module.route

    def watched(logits: torch.Tensor, per_token: int) -> tuple[torch.Tensor, torch.Tensor]:
        seen.append(logits.dtype)
        return original(logits, per_token)

    monkeypatch.setattr("q4kd.trainer.teacher.cpu.experts.route", watched)
    for backend in ("q4k", "dense"):
        found = load_quietly(path, backend=backend, dtype="bfloat16").logits(torch.from_numpy(IDS)).numpy()
        assert np.isfinite(found).all()
        # Rounded products move a few tokens to other experts, and most not.
        assert np.median(row_errors(found, ours(path, IDS))) <= 2e-2
    assert set(seen) == {torch.float32} and len(seen) == 2 * 4 + 2 * 4


def test_weights_of_the_chosen_sum_to_one_and_are_those_of_the_largest() -> None:
    logits = torch.from_numpy(np.random.default_rng(0).normal(0, 3, (50, 12))).float()
    chosen, weights = experts_module.route(logits, 4)
    assert torch.allclose(weights.sum(-1), torch.ones(50))
    assert torch.equal(chosen.sort(-1).values, logits.argsort(-1, descending=True)[:, :4].sort(-1).values)
    assert torch.allclose(weights.log().diff(dim=-1), logits.gather(1, chosen).diff(dim=-1), atol=1e-5)


def test_a_token_is_multiplied_by_its_own_experts_alone(made: MadeFamily) -> None:
    model = open_model(made.path)
    config = model.config
    expert = 3 * config.expert_ffn_size * config.hidden_size
    idle = config.num_layers * (config.num_experts - config.experts_per_token) * expert
    assert model.weights_per_token == model.num_weights - idle
    embedding = 0 if config.tied_head else config.vocab_size * config.hidden_size
    assert model.products_per_token == model.num_weights - idle - embedding
