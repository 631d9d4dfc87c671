"""A command reads the header of a model file once, whatever it does with the file."""

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import gguf
import numpy as np
import pytest

from q4kd.harness.__main__ import main
from q4kd.harness.inputs.models.apr_write import convert_gguf
from q4kd.trainer.demo import student_path, teacher_path
from q4kd.trainer.formats.apr import reader as apr_file
from q4kd.trainer.formats.gguf import split
from q4kd.trainer.teacher.teacher import Teacher

Parses = Callable[..., Counter[str]]


@pytest.fixture
def parses(monkeypatch: pytest.MonkeyPatch) -> Parses:
    """Return a function that runs a command, checks its exit code, and counts by file how often a header was walked.

    The reader of the gguf package must not be used: it makes an object of every token.
    """
    walked: Counter[str] = Counter()
    read: Counter[str] = Counter()

    def count(holder: Any, name: str, counts: Counter[str]) -> None:
        original = getattr(holder, name)

        def counted(path: Path, *rest: Any) -> Any:
            counts[str(path)] += 1
            return original(path, *rest)

        monkeypatch.setattr(holder, name, counted)

    count(split, "read_header", walked)
    count(gguf, "GGUFReader", read)
    count(apr_file, "read_header", walked)

    def run(*words: object, exit_code: int = 0) -> Counter[str]:
        walked.clear()
        read.clear()
        assert main([str(word) for word in words]) == exit_code
        assert not read
        return walked

    return run


@pytest.fixture
def settings(tmp_path: Path) -> list[object]:
    """Settings of a run of two steps with the demo teacher."""
    (tmp_path / "text").write_text(Path(json.encoder.__file__).read_text()[:6000])
    values = {"seq_len": 32, "batch_size": 2, "threads": 1, "dtype": "float32", "steps": 2, "eval_tokens": 64}
    files = ("--teacher", teacher_path(), "--student", student_path(), "--data", tmp_path / "text", "--from-scratch")
    return [*files, *[word for key, value in values.items() for word in ("--set", f"{key}={value}")]]


def once(*paths: Path) -> Counter[str]:
    return Counter(map(str, paths))


def test_a_teacher_is_described_and_computed_from_one_parse(parses: Parses, tmp_path: Path) -> None:
    np.save(tmp_path / "ids.npy", np.arange(8))
    convert_gguf(teacher_path(), tmp_path / "model.apr")
    for model in (teacher_path(), tmp_path / "model.apr"):
        assert parses("inspect", model) == once(model)
        assert parses("inspect", model, "--json", "--backend", "dense") == once(model)
        words = ("--ids", tmp_path / "ids.npy", "--out", tmp_path / "logits.npy")
        assert parses("logits", model, *words) == once(model)


def test_a_run_is_planned_and_trained_from_one_parse(parses: Parses, settings: list[object], tmp_path: Path) -> None:
    assert parses("plan", *settings, "--out", tmp_path / "run") == once(teacher_path())
    assert parses("distill", *settings, "--out", tmp_path / "run") == once(teacher_path())
    assert parses("export", tmp_path / "run", "--format", "gguf", "--out", tmp_path / "f.gguf").total() == 1


def test_what_other_settings_would_save_needs_no_second_parse(
    parses: Parses,
    settings: list[object],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def exhausted(*_arguments: object) -> NoReturn:
        raise MemoryError

    with monkeypatch.context() as broken:
        broken.setattr(Teacher, "signal", exhausted)
        assert parses("distill", *settings, "--out", tmp_path / "run", exit_code=75) == once(teacher_path())
    assert "what helps: batch_size 1 with accumulation 2" in capsys.readouterr().err
    monkeypatch.setattr("q4kd.trainer.train.memory.planner.host_room", lambda: (1_000_000, "a test's limit"))
    for command in ("plan", "distill"):
        assert parses(command, *settings, "--out", tmp_path / command, exit_code=2) == once(teacher_path())
        assert "batch_size 1 with accumulation 2 (the same batch) saves" in capsys.readouterr().err


def test_a_cache_is_made_from_one_parse_and_read_without(
    parses: Parses, settings: list[object], tmp_path: Path
) -> None:
    words = ("--out", tmp_path / "cache", "--sample-tokens", "64", "--k", "8")
    assert parses("cache", *settings, *words) == once(teacher_path())
    assert not parses("distill", *settings, "--teacher-cache", tmp_path / "cache", "--out", tmp_path / "run")


def test_two_models_are_compared_from_one_parse_of_each(parses: Parses, tmp_path: Path) -> None:
    other = tmp_path / "other.gguf"
    shutil.copy(teacher_path(), other)
    words = ("--seq-len", "8", "--tokens", "32")
    assert parses("fidelity", teacher_path(), other, *words) == once(teacher_path(), other)


def test_a_bench_parses_once_beside_its_workers(parses: Parses) -> None:
    words = ("--tokens", "8", "--pairs", "1", "--threads", "1", "--against", "dense")
    assert parses("bench", "teacher", "--model", teacher_path(), *words) == once(teacher_path())
