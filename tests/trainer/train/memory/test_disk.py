"""What a run is said to write is what it writes; where there is no room it is refused before it begins."""

import json
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest

from q4kd.harness.__main__ import main
from q4kd.trainer.config.settings import DistillConfig, make_config
from q4kd.trainer.demo import student_path, teacher_path
from q4kd.trainer.train.memory.planner import place_run_teacher, plan_run

Usage = namedtuple("Usage", "total used free")


def settings(folder: Path, **changes: Any) -> DistillConfig:
    values = {"teacher": teacher_path(), "student": student_path(), "data": folder / "data", "out": folder / "out"}
    return make_config(values | {"seq_len": 32, "batch_size": 2, "dtype": "float32"} | changes)


def disk(config: DistillConfig) -> Any:
    return plan_run(config, place_run_teacher(config)).disk


def run(folder: Path, *words: str) -> int:
    data = folder / "data"
    data.mkdir(exist_ok=True)
    for name in (json.__file__, shutil.__file__):
        shutil.copy(name, data / f"{len(name)}.py")
    files = ("--teacher", str(teacher_path()), "--student", str(student_path()), "--from-scratch", "--data", str(data))
    fixed = ("--seq-len", "32", "--batch-size", "2", "--dtype", "float32", "--eval-tokens", "64")
    return main(["distill", *files, "--out", str(folder / "out"), *fixed, *words])


def written(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*.safetensors"))


@pytest.mark.parametrize(
    "changes",
    [
        {"student_dtype": "float32"},
        {"student_dtype": "bfloat16"},
        {"student_dtype": "bfloat16", "lora_rank": 4},
    ],
)
def test_what_is_planned_is_what_is_written(tmp_path: Path, changes: dict[str, Any]) -> None:
    words = [word for key, value in changes.items() for word in ("--set", f"{key}={value}")]
    assert run(tmp_path, "--set", "steps=2", *words) == 0
    plan = disk(settings(tmp_path, steps=2, **changes))
    # Headers, counters and the states of generators are small beside real weights, and not beside adapters.
    assert written(tmp_path / "out" / "checkpoints") == pytest.approx(plan.checkpoint, rel=0.01, abs=40_000)
    models = written(tmp_path / "out" / "model") + written(tmp_path / "out" / "adapter")
    assert models == pytest.approx(plan.model, rel=0.01, abs=40_000)


@pytest.mark.parametrize(
    ("changes", "checkpoints"),
    [
        ({"steps": 10, "checkpoint_every": 0}, 1),
        ({"steps": 10, "checkpoint_every": 5}, 2),
        ({"steps": 11, "checkpoint_every": 5}, 3),
        ({"steps": 100, "checkpoint_every": 5, "keep": 1}, 2),
        ({"steps": 100, "checkpoint_every": 5, "max_steps": 5}, 1),
        ({"epochs": 1.0, "checkpoint_every": 5, "keep": 4}, 5),
    ],
)
def test_checkpoints_that_are_there_at_one_time(tmp_path: Path, changes: dict[str, Any], checkpoints: int) -> None:
    plan = disk(settings(tmp_path, **changes))
    assert plan.checkpoints == checkpoints
    assert (plan.model > 0) == ("max_steps" not in changes)
    assert plan.needed == checkpoints * plan.checkpoint + plan.model


def test_the_best_is_counted_twice_while_it_is_replaced(tmp_path: Path) -> None:
    assert disk(settings(tmp_path, steps=10)).best == 0
    plan = disk(settings(tmp_path, steps=10, eval_every=5))
    assert plan.best == 2 * plan.model
    assert disk(settings(tmp_path, steps=10, eval_every=5, best_resumable=True)).best == 2 * plan.checkpoint


@pytest.mark.parametrize(
    ("changes", "copied"),
    [
        ({"checkpoint_every": 0}, "nothing"),
        ({"checkpoint_every": 10}, "nothing"),
        ({"checkpoint_every": 9}, "everything"),
        ({"checkpoint_every": 9, "max_steps": 9}, "nothing"),
        ({"checkpoint_every": 0, "eval_every": 5}, "weights"),
        ({"checkpoint_every": 0, "eval_every": 5, "eval_tokens": 0}, "nothing"),
        ({"checkpoint_every": 0, "eval_every": 5, "best_resumable": True}, "everything"),
        ({"checkpoint_every": 5, "eval_every": 5}, "everything"),
    ],
)
def test_what_is_copied_is_what_steps_follow(tmp_path: Path, changes: dict[str, Any], copied: str) -> None:
    plan = disk(settings(tmp_path, steps=10, **changes))
    assert plan.copy == {"nothing": 0, "weights": 4 * 656_512, "everything": plan.checkpoint}[copied]


def test_of_epochs_a_copy_is_expected(tmp_path: Path) -> None:
    plan = disk(settings(tmp_path, steps=None, epochs=1.0, checkpoint_every=5))
    assert plan.copy == plan.checkpoint


def test_a_disk_without_room_is_refused_before_anything_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--set", "steps=12", "--set", "checkpoint_every=2")
    needed = disk(settings(tmp_path, steps=12, checkpoint_every=2)).needed
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: Usage(1 << 40, 0, needed - 1))
    assert run(tmp_path, *words) == 2
    said = capsys.readouterr().err
    assert (
        "expected at most 26.3 MB to write, got 26.3 MB of 26.3 MB free: 3 checkpoints of 7.9 MB, final model" in said
    )
    assert "set keep below 2 or set checkpoint_every to 0" in said
    assert not (tmp_path / "out" / "checkpoints").exists()
    # What an earlier leg has written is replaced, and what a smoke run does not write is not needed.
    assert run(tmp_path, *words, "--max-steps", "4") == 0
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: Usage(1 << 40, 0, needed - 2 * 7_878_000))
    assert run(tmp_path, *words, "--resume") == 0


def test_steps_wait_for_the_writing_where_memory_has_no_room_for_a_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import q4kd.trainer.train.memory.planner as planner
    from q4kd.trainer.train.saver import CheckpointSaver

    plan = plan_run(config := settings(tmp_path, steps=4), place_run_teacher(config))
    assert plan.copies_checkpoints
    monkeypatch.setattr(planner, "host_room", lambda: (plan.needed + plan.disk.checkpoint - 1, "a test"))
    copies = []
    original = CheckpointSaver.__init__

    def noted(self: CheckpointSaver, *arguments: Any, **options: Any) -> None:
        copies.append(options["copies"])
        original(self, *arguments, **options)

    monkeypatch.setattr(CheckpointSaver, "__init__", noted)
    assert run(tmp_path, "--set", "steps=4", "--set", "checkpoint_every=2") == 0
    assert copies == [False]
    events = [json.loads(line) for line in (tmp_path / "out" / "events.jsonl").read_text().splitlines()]
    kinds = [(event["event"], event.get("step")) for event in events if event["event"] in ("step", "checkpoint")]
    assert kinds == [("step", 1), ("step", 2), ("checkpoint", 2), ("step", 3), ("step", 4), ("checkpoint", 4)]
    words = ["--seq-len", "32", "--batch-size", "2", "--dtype", "float32", "--steps", "4"]
    files = [
        "--teacher",
        str(teacher_path()),
        "--student",
        str(student_path()),
        "--from-scratch",
        "--data",
        str(tmp_path / "data"),
    ]
    capsys.readouterr()
    assert main(["plan", *files, "--out", str(tmp_path / "out"), *words]) == 0
    assert "copy" not in capsys.readouterr().out  # no step follows the only checkpoint
    words += ["--set", "checkpoint_every=2"]
    assert main(["plan", *files, "--out", str(tmp_path / "out"), *words]) == 0
    assert "no memory for a copy" in " ".join(capsys.readouterr().out.split())
