"""The parts of the float64 replay, each beside another program that computes the same."""

import math

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from q4kd.harness.inputs.small_pair import completion_documents, small_student, small_teacher  # noqa: E402
from q4kd.harness.oracles.adapters import keep_all, seeded_dropout  # noqa: E402
from q4kd.harness.oracles.reference import from_hugging_face, reference_logits, reference_loss  # noqa: E402
from q4kd.harness.oracles.training import (  # noqa: E402
    Recipe,
    _AdamW,
    divergences,
    logits_of,
    rate_of,
)
from q4kd.harness.oracles.windows import cut_windows  # noqa: E402
from q4kd.harness.runs.experiment import Inputs  # noqa: E402
from q4kd.trainer.files import read_json  # noqa: E402

RECIPE = Recipe(
    seed=1, lr=0.01, warmup_steps=2, schedule="cosine", alpha=0.3, temperature=2.0, divergence="jsd", beta=0.3,
    beta1=0.8, beta2=0.95, eps=1e-3, weight_decay=0.3, clip=1.0, batch_size=1, accumulation=1, eval_every=0,
    eval_tokens=0, epochs=1.0, steps=None, rounds_weights=False,
)  # fmt: skip


@pytest.fixture
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return Inputs(tmp_path_factory.mktemp("inputs"), "cpu")


def test_a_packed_window_has_the_logits_of_its_documents_alone(inputs: Inputs) -> None:
    from safetensors.numpy import load_file

    folder = small_student(inputs)
    tensors, config = load_file(folder / "model.safetensors"), read_json(folder / "config.json")
    window = cut_windows(completion_documents(0, 9, only_completions=True), 64, "documents").take(np.array([0]))
    weights = {name: torch.from_numpy(value).double() for name, value in tensors.items()}
    found = logits_of(weights, config, window, keep_all)[0].numpy()
    alone = from_hugging_face(tensors, config)
    borders = np.flatnonzero(np.diff(window.documents[0])) + 1
    assert len(borders) >= 2
    exact = np.concatenate([reference_logits(alone, part) for part in np.split(window.ids[0], borders)])
    assert np.abs(found - exact).max() <= 1e-10


def test_the_teacher_has_more_rows_than_the_student(inputs: Inputs) -> None:
    import gguf

    (embedding,) = (t for t in gguf.GGUFReader(small_teacher(inputs)).tensors if t.name == "token_embd.weight")
    rows = int(read_json(small_student(inputs) / "config.json")["vocab_size"])
    assert int(embedding.shape[1]) > rows


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
def test_divergences_and_their_gradients_are_those_of_the_written_equation(divergence: str) -> None:
    rng = np.random.default_rng(2)
    student, teacher = rng.normal(size=(2, 5, 30))
    options = {"alpha": 0.0, "temperature": 2.0, "divergence": divergence, "beta": 0.3}
    exact = reference_loss(student, teacher, np.zeros(5, np.int64), **options)
    leaf = torch.from_numpy(student).requires_grad_(True)
    recipe = Recipe(**{**vars(RECIPE), "divergence": divergence})
    mean = divergences(leaf, torch.from_numpy(teacher), recipe).mean()
    mean.backward()
    assert mean.item() == pytest.approx(exact.kd, rel=1e-12)
    assert leaf.grad is not None
    assert np.abs(leaf.grad.numpy() - exact.grad_logits).max() <= 1e-14


def test_the_update_is_adamw_with_decay_of_matrices_alone() -> None:
    torch.manual_seed(3)
    start = {"matrix": torch.randn(4, 3, dtype=torch.float64), "bias": torch.randn(3, dtype=torch.float64)}
    theirs = {name: value.clone().requires_grad_(True) for name, value in start.items()}
    groups = [
        {"params": [theirs["matrix"]], "weight_decay": RECIPE.weight_decay},
        {"params": [theirs["bias"]], "weight_decay": 0.0},
    ]
    peer = torch.optim.AdamW(groups, betas=(RECIPE.beta1, RECIPE.beta2), eps=RECIPE.eps)
    ours = _AdamW(dict(start), RECIPE)
    for step in range(5):
        gradients = {name: torch.randn_like(value) for name, value in start.items()}
        for name, value in theirs.items():
            value.grad = gradients[name].clone()
        for group in peer.param_groups:
            group["lr"] = rate_of(RECIPE, step, 5)
        peer.step()
        ours.update(gradients, rate_of(RECIPE, step, 5))
    for name, value in theirs.items():
        assert torch.allclose(ours.masters[name], value.detach(), rtol=1e-13, atol=0)


def test_rates_warm_up_and_fall() -> None:
    assert [rate_of(RECIPE, step, 6) for step in (0, 1, 2)] == [0.005, 0.01, 0.01]
    assert rate_of(RECIPE, 4, 6) == pytest.approx(0.01 * (1 + math.cos(math.pi / 2)) / 2)
    linear = Recipe(**{**vars(RECIPE), "schedule": "linear"})
    assert rate_of(linear, 5, 6) == pytest.approx(0.0025)


def test_masks_are_those_that_torch_draws_from_the_seed() -> None:
    drop = seeded_dropout(0.25, seed=4)
    torch.manual_seed(4)
    for _ in range(2):
        ours = drop((2, 3, 5, 5))
        theirs = torch.nn.functional.dropout(torch.ones(2, 3, 5, 5), 0.25)
        assert torch.allclose(ours.float(), theirs)
        assert 0 < int((ours == 0).sum()) < ours.numel()
