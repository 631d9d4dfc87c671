"""One date for a whole run: a run through a template that writes the date is resumed on the next day."""

import json
import shutil
from pathlib import Path

import pytest

from q4kd.harness.__main__ import main
from q4kd.trainer.config.settings import DistillConfig, make_config
from q4kd.trainer.demo import student_path, teacher_path
from q4kd.trainer.train.run import chat_date
from q4kd.trainer.train.run.chat_date import describe_date, keep_chat_date, with_chat_date

DATED = "{{ strftime_now('%d %b %Y') }}{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</>\n{% endfor %}"


@pytest.fixture
def student(tmp_path: Path) -> Path:
    shutil.copytree(student_path(), tmp_path / "student")
    (tmp_path / "student" / "chat_template.jinja").write_text(DATED)
    return tmp_path / "student"


def words(command: str, student: Path, out: Path, *extra: str) -> list[str]:
    data = student.parent / "chats.jsonl"
    chat = [{"role": "user", "content": "print(values)"}, {"role": "assistant", "content": "yes"}]
    data.write_text((json.dumps({"messages": chat}) + "\n") * 12)
    settings = {"batch_size": 1, "threads": 1, "eval_tokens": 0, "dtype": "float32", "seq_len": 16}
    given = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    return [command, "--student", str(student), "--data", str(data), "--out", str(out), *given, *extra]


def test_a_run_is_resumed_on_the_next_day(
    student: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, teacher = student.parent / "run", ("--teacher", str(teacher_path()), "--set", "steps=2")
    monkeypatch.setattr(chat_date, "_today", lambda: "2026-11-28")
    assert main(words("distill", student, out, "--from-scratch", *teacher, "--max-steps", "1")) == 0
    assert "it writes the date, 2026-11-28 for the whole run" in capsys.readouterr().out
    monkeypatch.setattr(chat_date, "_today", lambda: "2026-11-29")
    assert main(words("distill", student, out, "--from-scratch", *teacher, "--resume")) == 0
    assert "it writes the date, 2026-11-28 for the whole run" in capsys.readouterr().out
    assert json.loads((out / "run.json").read_text())["config"]["chat_date"] == "2026-11-28"
    other = words("distill", student, out, "--from-scratch", *teacher, "--resume", "--chat-date", "2026-11-29")
    assert main(other) == 2
    assert "chat_date: '2026-11-28' → '2026-11-29'" in capsys.readouterr().err


def test_a_cache_is_trained_on_on_the_next_day(
    student: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cache, teacher = student.parent / "cache", ("--teacher", str(teacher_path()))
    monkeypatch.setattr(chat_date, "_today", lambda: "2026-11-28")
    assert main(words("cache", student, cache, *teacher, "--k", "8", "--sample-tokens", "0")) == 0
    monkeypatch.setattr(chat_date, "_today", lambda: "2026-11-29")
    cached = words(
        "distill", student, student.parent / "run", "--from-scratch", "--teacher-cache", str(cache), "--max-steps", "1"
    )
    assert main(cached) == 0, capsys.readouterr().err


def config(out: Path, **settings: object) -> DistillConfig:
    return make_config({"teacher": "t", "student": "s", "data": "d", "out": out, **settings})


def test_the_date_is_the_one_that_is_given_or_kept_or_today(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_date, "_today", lambda: "2026-11-29")
    assert with_chat_date(config(tmp_path)).chat_date == "2026-11-29"
    keep_chat_date(config(tmp_path, chat_date="2026-11-27"))
    assert with_chat_date(config(tmp_path), cache=tmp_path).chat_date == "2026-11-27"
    assert with_chat_date(config(tmp_path, chat_date="2026-01-01"), cache=tmp_path).chat_date == "2026-01-01"
    for damaged in ("", "[]", '{"chat_date": 5}', '{"chat_date": "yesterday"}'):
        (tmp_path / "chat.json").write_text(damaged)
        assert with_chat_date(config(tmp_path), cache=tmp_path).chat_date == "2026-11-29"


def test_nothing_is_said_where_the_template_asks_for_no_date(tmp_path: Path) -> None:
    class Tokenizer:
        chat_template = "{{ messages }}"

    assert not describe_date(config(tmp_path), Tokenizer())
    assert not describe_date(config(tmp_path), object())
