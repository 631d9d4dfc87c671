"""A run whose teacher's file is cut or written to ends in one line with a code of its own, and can be resumed."""

import json
import os
import shutil
from pathlib import Path

import pytest

from q4kd.harness.__main__ import main
from q4kd.harness.inputs.models.split_models import shards, write_split
from q4kd.trainer.demo import student_path, teacher_path
from q4kd.trainer.events import EventLog


def _words(teacher: Path, out: Path) -> list[str]:
    settings = {"steps": 4, "seq_len": 32, "batch_size": 2, "threads": 1, "eval_tokens": 64, "checkpoint_every": 1}
    words = ["distill", "--teacher", str(teacher), "--student", str(student_path()), "--from-scratch"]
    words += ["--data", str(json.__file__), "--out", str(out), "--dtype", "float32"]
    return words + [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]


def test_a_teacher_that_is_touched_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, emit = tmp_path / "t.gguf", EventLog.emit
    shutil.copyfile(teacher_path(), teacher)
    touched: list[int] = []

    def touching(log: EventLog, event: str, **fields: object) -> None:
        emit(log, event, **fields)
        if event == "step":
            touched.append(len(touched))
            os.utime(teacher, ns=(0, touched[-1]))

    monkeypatch.setattr(EventLog, "emit", touching)
    assert main(_words(teacher, tmp_path / "run")) == 0
    assert len(touched) == 4


def test_a_resumed_run_knows_all_shards_of_its_teacher(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_split(tmp_path / "split", teacher_path(), tensors=40)
    paths = shards(tmp_path / "split")
    assert main([*_words(paths[0], tmp_path / "run"), "--max-steps", "2"]) == 0
    record = json.loads((tmp_path / "run/run.json").read_text())["teacher"]
    assert record["file"] == paths[0].name and record["bytes"] == sum(path.stat().st_size for path in paths)
    data = bytearray(paths[-1].read_bytes())
    data[-2] ^= 1  # the last weight of a block, or a bit of a float32's fraction
    paths[-1].write_bytes(data)
    assert main([*_words(paths[0], tmp_path / "run"), "--resume"]) == 2
    assert "expected the teacher of that run, sha256" in capsys.readouterr().err
    data[-2] ^= 1
    paths[-1].write_bytes(data)
    assert main([*_words(paths[1], tmp_path / "run"), "--resume"]) == 0


@pytest.mark.parametrize("num_bytes", [0, 4096, None])
def test_the_run_ends_at_the_next_step_and_goes_on_with_the_file_restored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], num_bytes: int | None
) -> None:
    teacher, out, emit = tmp_path / "t.gguf", tmp_path / "run", EventLog.emit
    shutil.copyfile(teacher_path(), teacher)
    words = _words(teacher, out)

    def cutting(log: EventLog, event: str, **fields: object) -> None:
        emit(log, event, **fields)
        if event == "step" and fields["step"] == 2:
            if num_bytes is None:
                teacher.write_bytes(teacher.read_bytes()[::-1])
            else:
                os.truncate(teacher, num_bytes)

    def told(name: str) -> list[dict[str, object]]:
        lines = map(json.loads, (out / "events.jsonl").read_text().splitlines())
        return [event for event in lines if event["event"] == name]

    with monkeypatch.context() as changed:
        changed.setattr(EventLog, "emit", cutting)
        assert main(words) == 66
    line = capsys.readouterr().err.splitlines()[-1]
    got = "the same number, written since" if num_bytes is None else f"{num_bytes:,}"
    assert f"t.gguf: expected the {teacher_path().stat().st_size:,} bytes that were opened, got {got}" in line
    assert [event["step"] for event in told("step")] == [1, 2] and told("phase")[0]["phase"] == "open"
    shutil.copyfile(teacher_path(), teacher)
    assert main([*words, "--resume"]) == 0
    assert [event["step"] for event in told("step")][-1] == 4
