"""The experiments on runs and guards: their texts, what they collect, and the probe that starts runs and stops them."""

import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from q4kd.harness.inputs.command_lines import distill_words
from q4kd.harness.inputs.demo import BATCH, SEQ_LEN, training_text
from q4kd.harness.runs.experiment import Inputs, get_experiment
from q4kd.harness.runs.probes import PROBES
from q4kd.harness.subjects.runs.experiments import STEPS
from q4kd.trainer.data.corpus import load_corpus
from q4kd.trainer.data.documents import SourceSettings
from q4kd.trainer.data.encoding import DocumentEncoder
from q4kd.trainer.demo import student_path, teacher_path
from q4kd.trainer.files import write_json


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return Inputs(tmp_path_factory.mktemp("inputs"), "cpu")


@pytest.mark.parametrize("batches", [1, 10])
def test_an_epoch_of_the_text_is_exactly_its_batches(inputs: Inputs, batches: int) -> None:
    from q4kd.trainer.student.model import encoder, load_tokenizer

    tokenizer = load_tokenizer(student_path())
    text = training_text(inputs, batches)
    corpus = load_corpus(text, DocumentEncoder(encoder(tokenizer), tokenizer.eos_token_id), SourceSettings())
    assert len(corpus.train.ids) == batches * BATCH * SEQ_LEN + 1


def smoke_folder(root: Path, arm: str, losses: list[float], seconds: float, projected: float) -> Path:
    folder = root / f"smoke-run.{arm}"
    (folder / "arrays").mkdir(parents=True)
    (folder / "run").mkdir()
    steps = [
        {
            "event": "step",
            "t": 100 + seconds * n,
            "seconds": seconds,
            "data_s": 0.0,
            "loss": loss,
            "ce": loss,
            "kd": 1.0,
        }
        for n, loss in enumerate(losses, 1)
    ]
    (folder / "events.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    summary = {"projected_seconds_of_full_run": projected, "tokens_per_second": BATCH * SEQ_LEN / seconds}
    write_json(folder / "run" / "summary.json", summary)
    return folder


def test_the_smoke_runs_facts_are_counted_from_its_files(tmp_path: Path, inputs: Inputs) -> None:
    collect = get_experiment("smoke-run").collect
    smoke = smoke_folder(tmp_path, "smoke", [3.0, 2.0], 0.5, 0.5 * STEPS)
    facts = collect(smoke, inputs)
    assert facts["tables"]["steps"]["step events"] == 2
    assert facts["tables"]["steps"]["step of the checkpoint"] == 0
    assert facts["tables"]["outputs"] == {"folder model": False, "weights outside the checkpoints": 0, "checkpoints": 0}
    with np.load(smoke / "arrays" / "projection.npz") as arrays:
        np.testing.assert_allclose(arrays["subject"], arrays["reference"])
        assert arrays["reference"][0] == 0.5 * STEPS
    full = smoke_folder(tmp_path, "full", [3.0, 2.5, 1.0], 0.5, 1.0)
    (full / "run" / "model").mkdir()
    (full / "run" / "model" / "model.safetensors").write_bytes(b"")
    facts = collect(full, inputs)
    assert facts["tables"]["outputs"] == {"folder model": True, "weights outside the checkpoints": 1, "checkpoints": 0}
    with np.load(full / "arrays" / "first-steps.npz") as arrays:
        assert arrays["subject"][1, 0] == 2.5
        assert arrays["reference"][1, 0] == 2.0


def test_the_wall_is_compared_with_the_supervisors_and_the_steps(tmp_path: Path, inputs: Inputs) -> None:
    folders = {name: smoke_folder(tmp_path, name, [3.0, 2.5, 1.0], 0.5, 1.0) for name in ("smoke", "full")}
    collect = get_experiment("smoke-run").collect
    for number, folder in enumerate(folders.values()):
        assert "wall" not in collect(folders["full"], inputs)["comparators"]
        write_json(folder / "exit.json", {"start_t": 100.0})
        with (folder / "events.jsonl").open("a") as events:
            events.write(json.dumps({"event": "done", "t": 104.0 + number}) + "\n")
        write_json(folder / "run" / "summary.json", {"wall": {"train": 1.4 + number, "save": 0.5, "other": 2.0}})
    assert {"wall", "training"} < set(collect(folders["full"], inputs)["comparators"])
    for name, subject, reference in (("wall", [4.9, 3.9], [5.0, 4.0]), ("training", [2.4, 1.4], [1.5, 1.5])):
        with np.load(folders["full"] / "arrays" / f"{name}.npz") as arrays:
            np.testing.assert_allclose(arrays["subject"][:, 0], subject)
            np.testing.assert_allclose(arrays["reference"][:, 0], reference)


def test_a_summary_without_projection_is_collected_as_not_a_number(tmp_path: Path, inputs: Inputs) -> None:
    smoke = smoke_folder(tmp_path, "smoke", [3.0, 2.0], 0.5, 1.0)
    write_json(smoke / "run" / "summary.json", {"tokens_per_second": 256.0})
    get_experiment("smoke-run").collect(smoke, inputs)
    with np.load(smoke / "arrays" / "projection.npz") as arrays:
        assert np.isnan(arrays["subject"][0, 0])
        assert arrays["subject"][1, 0] == 256.0


def test_start_runs_tells_a_refusal_from_a_run_that_would_begin(
    tmp_path: Path, inputs: Inputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop: Any = importlib.import_module("q4kd.trainer.train.loop")
    monkeypatch.setattr(loop, "train_step", loop.train_step)  # the probe replaces it for good
    monkeypatch.chdir(tmp_path)
    data = training_text(inputs, 1)

    def words(out: str, *options: str) -> list[str]:
        return distill_words(teacher_path(), student_path(), data, *options, out=out)

    cases = [
        {"case": "a", "argv": words("a", "--max-steps", "0"), "twin": "b", "twin_argv": words("b")},
        {"case": "c", "argv": words("c"), "twin": "d", "twin_argv": words("d", "--set", "nonsense=1")},
    ]
    write_json(tmp_path / "cases.json", {"cases": cases})
    assert PROBES["start-runs"](["--cases", "cases.json", "--out", "probe.json"]) == 0
    first, second = json.loads((tmp_path / "probe.json").read_text())["cases"]
    assert (first["error"], first["twin_error"]) == ("exit 2: setting max_steps", None)
    assert (second["error"], second["twin_error"]) == (None, "exit 2: setting nonsense")
    assert "max_steps" in first["message"]
    assert not list(tmp_path.glob("b/checkpoints/*"))
