"""The experiments at the size of 7B, as far as they can be seen without a GPU: arguments, and what they collect."""

import json
from pathlib import Path

import numpy as np
import pytest

from q4kd.harness.inputs.synthetic_students import read_tokens
from q4kd.harness.runs.experiment import Inputs, get_experiment
from q4kd.harness.subjects.cuda import accelerator
from q4kd.trainer.bench.synthetic import write_large_teacher
from q4kd.trainer.demo import teacher_path


@pytest.fixture
def inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Inputs:
    """Inputs whose 7B teacher has one small layer."""

    def small(inputs: Inputs) -> Path:
        def make(path: Path) -> None:
            write_large_teacher(path, layers=1, hidden=256, ffn=256, vocab=4096)

        return inputs.file("small.gguf", make)

    monkeypatch.setattr(accelerator, "teacher_7b", small)
    monkeypatch.setattr(accelerator, "TEACHER_VOCAB", 4096)
    return Inputs(tmp_path / "inputs", "h200")


@pytest.mark.parametrize(("name", "steps"), [("distill-7b", 31), ("distill-7b-long", 500)])
def test_a_step_has_8192_tokens_in_four_micro_batches(inputs: Inputs, name: str, steps: int) -> None:
    experiment = get_experiment(name)
    words = experiment.arms[0].argv(inputs)
    option = {word.removeprefix("--"): words[at + 1] for at, word in enumerate(words[:-1]) if word.startswith("--")}
    settings = dict(word.split("=") for at, word in enumerate(words) if words[at - 1] == "--set")
    assert int(settings["batch_size"]) * int(settings["accumulation"]) * int(option["seq-len"]) == 8192
    assert int(settings["steps"]) == steps
    assert (option["device"], experiment.exclusive, "cuda" in experiment.needs) == ("cuda", True, True)
    demo = read_tokens(teacher_path())
    assert read_tokens(Path(option["teacher"]))[: len(demo)] == demo


def test_the_student_has_the_shapes_of_half_a_billion_weights(inputs: Inputs) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    words = get_experiment("distill-7b").arms[0].argv(inputs)
    config = AutoConfig.from_pretrained(words[words.index("--student") + 1])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert sum(weight.numel() for weight in model.parameters()) == pytest.approx(4.94e8, rel=1e-3)


def test_steps_are_timed_from_one_event_to_the_next(tmp_path: Path, inputs: Inputs) -> None:
    folder = tmp_path / "distill-7b"
    (folder / "arrays").mkdir(parents=True)
    events = [{"event": "step", "t": t} for t in (10.0, 12.0, 15.0)]
    (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    assert get_experiment("distill-7b").collect(folder, inputs) == {"checkpoint": None}
    with np.load(folder / "arrays" / "steps.npz") as arrays:
        assert arrays["start"].tolist() == [10.0, 12.0]
        assert arrays["seconds"].tolist() == [2.0, 3.0]
