"""The experiments on rounding, as far as they can be seen without a GPU: the dense peer, what is kept, the passes."""

from pathlib import Path

import numpy as np
import pytest
import torch

from q4kd.harness.inputs.arrays import read_arrays, save_arrays
from q4kd.harness.inputs.demo import GOLDEN_TEACHER
from q4kd.harness.oracles.reference import read_gguf, reference_logits
from q4kd.harness.runs.experiment import Inputs, get_experiment
from q4kd.harness.subjects.precision import experiments as precision
from q4kd.harness.subjects.precision.probes import ALL, HEAD, TOGETHER, WAYS, build_dense
from q4kd.trainer.demo import teacher_path


@pytest.mark.parametrize("path", [teacher_path(), GOLDEN_TEACHER], ids=["tied", "untied"])
def test_the_dense_peer_is_the_same_model_rounded_once(path: Path) -> None:
    pytest.importorskip("transformers")
    model = build_dense(path)
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    ids = np.random.default_rng(3).integers(0, 512, (2, 24))
    with torch.no_grad():
        found = model(input_ids=torch.from_numpy(ids)).logits.float().numpy()
    reference = read_gguf(path)
    exact = np.stack([reference_logits(reference, row) for row in ids])
    errors = np.linalg.norm(found - exact, axis=-1) / np.linalg.norm(exact, axis=-1)
    assert 1e-4 < errors.max() < 2e-2  # bfloat16's 8 bits, and no more than that


def test_what_is_kept_of_the_logits_is_what_is_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "SEQUENCES", 2)
    inputs = Inputs(tmp_path / "inputs", "cpu")
    experiment = get_experiment("bfloat16-errors")
    experiment.prepare(inputs)
    ids = np.load(precision._ids(inputs))
    exact = reference_logits(read_gguf(precision.demo_teacher(inputs)), ids[1])
    facts = {}
    for arm in ("packed", "dense"):
        folder = tmp_path / f"bfloat16-errors.{arm}"
        (folder / "arrays").mkdir(parents=True)
        assert experiment.collect(folder, inputs) == {"comparators": {}}
        np.save(folder / "logits.npy", np.stack([exact, exact]).astype(np.float32))
        facts[arm] = experiment.collect(folder, inputs)["comparators"]["float64"]
        with np.load(folder / "arrays" / "float64.npz") as arrays:
            assert arrays["subject"].shape == (2, 16, 32)
            assert np.array_equal(arrays["subject"][1], arrays["reference"][1])
            assert not np.array_equal(arrays["subject"][0], arrays["reference"][0])
            assert (arrays["reference"][1, 0] == exact[3].astype(np.float32)[:, None]).any(0).sum() == 32
    assert facts["packed"]["subject"] != facts["dense"]["subject"]
    assert facts["packed"]["reference"] == facts["dense"]["reference"]


def test_both_devices_run_the_same_two_programs(tmp_path: Path) -> None:
    inputs = Inputs(tmp_path, "cpu")
    on_cpu, on_cuda = get_experiment("bfloat16-errors"), get_experiment("cuda-bfloat16-errors")
    for ours, theirs in zip(on_cpu.arms, on_cuda.arms, strict=True):
        assert ours.name == theirs.name
        assert [word.replace("cpu", "cuda") for word in ours.argv(inputs)] == theirs.argv(inputs)
        assert "bfloat16" in ours.argv(inputs) or ours.name == "dense"
    assert (on_cuda.exclusive, on_cuda.needs) == (False, ("cuda",))


def test_every_row_of_every_pass_is_held_against_the_first_way(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    alone = rng.standard_normal((TOGETHER, ALL, 8)).astype(np.float32)
    logits = {
        f"{dtype}-{way}": alone[:, :positions].copy()
        for dtype in ("float32", "bfloat16")
        for way, (_, positions, _) in WAYS.items()
    }
    logits["bfloat16-first-of-many"][TOGETHER - 1, HEAD - 1] *= 1.5  # the last row of the last way
    save_arrays(tmp_path / "passes.npz", logits)
    (tmp_path / "arrays").mkdir()
    facts = precision._collect_passes(tmp_path, Inputs(tmp_path / "inputs", "cpu"))
    assert set(facts["comparators"]) == {"float32", "bfloat16"}  # type: ignore[arg-type]
    found = {name: read_arrays(tmp_path / "arrays" / f"{name}.npz")["subject"] for name in ("float32", "bfloat16")}
    assert not found["float32"].any()
    assert np.flatnonzero(found["bfloat16"]).tolist() == [len(found["bfloat16"]) - 1]
    assert found["bfloat16"].max() == pytest.approx(0.5)
    assert len(found["float32"]) == sum(TOGETHER * positions for _, positions, _ in WAYS.values()) - TOGETHER * ALL


def test_a_run_without_passes_leaves_nothing_to_judge(tmp_path: Path) -> None:
    assert precision._collect_passes(tmp_path, Inputs(tmp_path / "inputs", "cpu")) == {"comparators": {}}
