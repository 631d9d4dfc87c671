"""Experiments on the forms of the fused loss: their reference, their cases, and a recorder that must see something."""

import json
from pathlib import Path

import numpy as np
import pytest

from q4kd.harness.oracles.events import exact_topk
from q4kd.harness.oracles.reference import reference_loss
from q4kd.harness.runs.experiment import Inputs, get_experiment
from q4kd.harness.runs.probes import PROBES
from q4kd.harness.subjects.loss import fused
from q4kd.harness.subjects.loss import probes as probes_loss


def test_reference_over_events_is_the_numerical_derivative_and_a_lower_bound() -> None:
    rng = np.random.default_rng(1)
    student, teacher, labels = rng.normal(size=(3, 7)), rng.normal(size=(3, 7)), np.array([1, 0, 6])
    for divergence in ("forward_kl", "reverse_kl", "jsd"):
        settings = {"divergence": divergence, "beta": 0.3, "alpha": 0.2}
        whole = reference_loss(student, teacher, labels, temperature=1.0, **settings)  # type: ignore[arg-type]
        every = np.tile(np.arange(7), (3, 1))
        loss, grad, _ = exact_topk(student, teacher, labels, every, settings)
        assert loss == pytest.approx(whole.loss, rel=1e-12)
        assert grad == pytest.approx(whole.grad_logits, abs=1e-12)
        ids = np.array([[0, 3], [6, 1], [2, 4]])
        _, grad, kd = exact_topk(student, teacher, labels, ids, settings)
        assert 0 < kd < whole.kd
        for index in np.ndindex(student.shape):
            step = np.zeros_like(student)
            step[index] = 1e-6
            up, *_ = exact_topk(student + step, teacher, labels, ids, settings)
            down, *_ = exact_topk(student - step, teacher, labels, ids, settings)
            assert abs((up - down) / 2e-6 - grad[index]) < 1e-8


def test_arithmetic_of_low_is_the_one_stated() -> None:
    # The claim's text: 83.9 + 176.2 + 176.2 + 0.7 MB, under 512.
    assert fused.low_bytes(fused.FULL, 256, 8192) == 83_886_080 + 176_160_768 + 176_160_768 + 655_360 < 512e6
    assert fused.SCALED["vocab"] * 16 == 151_936


def test_every_array_of_the_experiment_is_within_its_claim(tmp_path: Path) -> None:
    inputs = Inputs(tmp_path / "inputs", "cpu")
    experiment = get_experiment("fused-losses")
    (argv,) = [arm.argv(inputs) for arm in experiment.arms]
    (tmp_path / "arrays").mkdir()
    words = [str(tmp_path / word) if word == "losses.npz" else word for word in argv[2:]]
    assert PROBES["fused-losses"](words) == 0
    facts = experiment.collect(tmp_path, inputs)
    bounds = {"loss": 1e-6, "grad-hidden": 1e-5, "grad-weight": 1e-5}
    rows = {"fast": 6, "low": 6, "topk": 9, "unset": 3}
    wanted = {f"{form}-{name}" for form in rows for name in bounds}
    assert set(facts["comparators"]) == wanted | {"topk-excess", "topk-whole"}
    for name in wanted:
        with np.load(tmp_path / "arrays" / f"{name}.npz") as pair:
            subject, reference = pair["subject"], pair["reference"]
        form, _, part = name.partition("-")
        assert len(subject) == rows[form]
        errors = np.linalg.norm(subject - reference, axis=1) / np.linalg.norm(reference, axis=1)
        assert 0 < errors.max() <= bounds[part]


def test_a_recorder_that_saw_no_logits_proves_nothing(tmp_path: Path) -> None:
    experiment = get_experiment("loss-allocations")
    inputs = Inputs(tmp_path / "inputs", "cpu")
    assert experiment.collect(tmp_path, inputs) == {"comparators": {}}
    records = {name: _record_of(case) for name, case in fused.allocation_cases().items()}
    (tmp_path / "allocations.json").write_text(json.dumps(records))
    assert set(experiment.collect(tmp_path, inputs)["tables"]) == {"fast", "low", "low-bytes"}
    records["low-jsd"]["largest"] = [[8, 8]]
    (tmp_path / "allocations.json").write_text(json.dumps(records))
    found = experiment.collect(tmp_path, inputs)
    assert found["unseen"] == "low-jsd"
    assert "tables" not in found


def _record_of(case: dict) -> dict:  # type: ignore[type-arg]
    width = case["vocab"] if case["config"]["mode"] == "fast" else fused.TILE
    gradients = 2 * case["hidden"] * (case["tokens"] + case["vocab"])
    return {"made": 5, "largest": [[fused.CHUNK, width]], "peak_bytes": gradients + 1000}


def test_recorder_counts_what_lives_and_what_is_largest() -> None:
    case = {"tokens": 32, "vocab": 640, "hidden": 4, "teacher_hidden": 4, "padding": 8}
    small = probes_loss._record({**case, "config": {"chunk_tokens": 8}})
    whole = probes_loss._record({**case, "config": {"chunk_tokens": 32}})
    assert small["largest"][0] == [8, 640]
    # A head that is read once is not held: its padding rows are dropped from the logits.
    assert whole["largest"][0] == [32, 648]
    # Three more chunks' worth of at least three float32 tensors.
    assert whole["peak_bytes"] - small["peak_bytes"] > 3 * 24 * 640 * 4
