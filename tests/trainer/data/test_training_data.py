"""The data of a run from its settings, its guards, and whole runs on chats, on streams, and resumed within an epoch."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from q4kd.harness.__main__ import main
from q4kd.harness.inputs.command_lines import scratch_words
from q4kd.trainer.config.settings import make_config
from q4kd.trainer.data.training_data import TrainingData, make_encoder, open_data
from q4kd.trainer.demo import student_path, teacher_path
from q4kd.trainer.errors import InputError
from q4kd.trainer.loss.config import KDLossConfig
from q4kd.trainer.student.model import DistillationModel, encoder, load_student, load_tokenizer
from q4kd.trainer.train.guards import check_isolation, check_labels

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(student_path())


def opened(tokenizer: Any, data: Path, sequences: int = 2, **changes: object) -> TrainingData:
    values = {"teacher": "t", "student": "s", "data": data, "out": "o", "seq_len": 16, "steps": 5, **changes}
    config = make_config(values)
    return open_data(config, make_encoder(config, tokenizer, encoder(tokenizer), 2048), sequences, None)


def write_texts(path: Path, count: int) -> Path:
    lines = [
        json.dumps({"text": f"def function_{n}(a, b):\n    return a + b * {n}\n" * (1 + n % 3)}) for n in range(count)
    ]
    path.write_text("\n".join(lines) + "\n")
    return path


def test_held_out_is_its_own_file_or_chosen_by_name(tokenizer: Any, tmp_path: Path) -> None:
    data, other = write_texts(tmp_path / "a.jsonl", 60), write_texts(tmp_path / "b.jsonl", 4)
    by_name, own = opened(tokenizer, data), opened(tokenizer, data, held_out=other)
    assert own.held_out.tokens.num_documents == 4
    assert 0 < by_name.held_out.tokens.num_documents < 20
    assert by_name.train_tokens is not None
    assert own.train_tokens is not None
    assert by_name.train_tokens + len(by_name.held_out.tokens.ids) == own.train_tokens
    assert by_name.sha256 != own.sha256
    streamed = opened(tokenizer, data, streaming=True, held_out=other)
    assert streamed.held_out.tokens.sha256 == own.held_out.tokens.sha256
    assert streamed.train_tokens is None


@pytest.mark.parametrize("command", ["plan", "distill"])
def test_data_that_is_not_there_is_refused_before_anything_is_loaded(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = [command, "--teacher", str(teacher_path()), "--student", str(student_path()), "--out", "run"]
    assert main([*words, "--data", "org/texts"]) == 2
    said = capsys.readouterr()
    assert "--data org/texts: expected a readable file or folder" in said.err
    assert "hf download org/texts --repo-type dataset --local-dir DIR" in said.err
    assert main([*words, "--data", str(student_path()), "--held-out", "none.txt"]) == 2
    assert "--held-out none.txt: " in (err := capsys.readouterr().err)
    assert "name one that is there" in err
    assert said.out == ""


def test_what_is_trained_on_and_evaluated_is_said(tokenizer: Any, tmp_path: Path) -> None:
    def said(data: Path, **changes: object) -> str:
        config = make_config({"teacher": "t", "student": "s", "data": data, "out": "o", "seq_len": 16, **changes})
        return opened(tokenizer, data, **changes).describe(config)

    data, alone = write_texts(tmp_path / "a.jsonl", 60), tmp_path / "a.txt"
    alone.write_text("def f():\n    return 1\n" * 40)
    found = opened(tokenizer, data)
    windows, steps = len(found.held_out), found.order.steps_per_epoch
    trained = f"{found.train_tokens:,} tokens, {steps:,} steps an epoch"
    assert said(data) == f"{trained}; held out: {windows} of {windows} windows evaluated"
    assert said(data, eval_tokens=35) == f"{trained}; held out: 2 of {windows} windows evaluated"
    assert "no evaluation and no best checkpoint (eval_tokens 15 is less than a window of 16)" in said(
        data, eval_tokens=15
    )
    short = tmp_path / "short.jsonl"
    short.write_text('{"text": "import os"}')
    assert "tokens fill no window: give more held-out text" in said(data, held_out=short)
    assert "no evaluation and no best checkpoint (--held-out names some)" in said(alone)
    assert said(data, streaming=True, steps=5).startswith("a stream; held out: ")


def test_prompts_that_fill_windows_are_counted_and_do_not_stop_a_stream(tokenizer: Any, tmp_path: Path) -> None:
    path, ids = tmp_path / "a.jsonl", list(range(1, 18))
    records = [{"input_ids": ids, "labels": ids if row == 7 else [-100] * 17} for row in range(8)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    changes: dict[str, object] = {"packing": "none", "held_out": path, "batch_size": 1, "shuffle_buffer": 1}
    config = make_config({"teacher": "t", "student": "s", "data": path, "out": "o", "seq_len": 16, **changes})
    found = opened(tokenizer, path, 1, **changes)
    assert "7 of 8 windows without a label (prompts fill them)" in found.describe(config)
    stream = opened(tokenizer, path, 1, streaming=True, **changes).order
    assert stream.batch(0).num_targets == 0
    check_labels(stream, path)
    assert stream.batch(0).num_targets == 0


def test_data_without_a_label_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    for labels, is_refused in (([-100] * 40, True), ([-100] * 32 + [5] * 8, False)):
        path.write_text(json.dumps({"input_ids": [5] * 40, "labels": labels}))
        for streaming in (False, True):
            order = opened(tokenizer, path, streaming=streaming).order
            if is_refused:
                with pytest.raises(InputError, match="at least one that is not masked"):
                    check_labels(order, path)
            else:
                check_labels(order, path)


def check(model: DistillationModel, seq_len: int = 32) -> None:
    check_isolation(model, model.student.config, 2048, seq_len, torch.device("cpu"))


def test_a_student_that_ignores_the_mask_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = DistillationModel(load_student(student_path(), seed=1), KDLossConfig())
    check(model)
    assert model.training
    base = model.student.base_model
    forward = base.forward
    monkeypatch.setattr(base, "forward", lambda attention_mask=None, **rest: forward(**rest))
    # transformers reads packed documents off the positions too, where it is given no mask.
    check(model)
    monkeypatch.setattr(base, "forward", lambda attention_mask=None, position_ids=None, **rest: forward(**rest))
    with pytest.raises(InputError, match="packed documents see each other"):
        check(model)


@pytest.fixture(scope="module")
def chat_student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("student") / "student"
    shutil.copytree(student_path(), folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def run(out: Path, data: Path, student: Path, *extra: str) -> int:
    settings = {"steps": 6, "batch_size": 1, "accumulation": 2, "threads": 1, "eval_tokens": 64, "checkpoint_every": 4}
    return main(
        [
            *("distill", "--teacher", str(teacher_path()), "--student", str(student), "--data", str(data)),
            *("--out", str(out), "--seq-len", "16", "--seed", "5", *scratch_words(student)),
            *[word for key, value in settings.items() for word in ("--set", f"{key}={value}")],
            *extra,
        ]
    )


def steps(out: Path) -> dict[int, tuple[float, int]]:
    lines = map(json.loads, (out / "events.jsonl").read_text().splitlines())
    return {line["step"]: (line["loss"], line["tokens"]) for line in lines if line["event"] == "step"}


def test_chats_train_on_answers_alone_though_micro_batches_have_no_label(tmp_path: Path, chat_student: Path) -> None:
    data = tmp_path / "chats.jsonl"
    chat = [{"role": "user", "content": "print(values)\n" * 12}, {"role": "assistant", "content": "yes"}]
    data.write_text((json.dumps({"messages": chat}) + "\n") * 12)
    words = ("--set", "completion_only=true", "--set", "packing=none", "--set", f"held_out={data}")
    assert run(tmp_path / "run", data, chat_student, *words) == 0
    tokens = [count for _, count in steps(tmp_path / "run").values()]
    assert len(tokens) == 6
    assert 0 in tokens  # two windows of a prompt made a step of no label
    assert max(tokens) < 2 * 16


@pytest.mark.parametrize("streaming", ["false", "true"])
def test_a_resumed_run_has_the_losses_of_the_whole(tmp_path: Path, chat_student: Path, streaming: str) -> None:
    data = write_texts(tmp_path / "a.jsonl", 12)
    words = ("--set", f"streaming={streaming}", "--set", "shuffle_buffer=5")
    assert run(tmp_path / "whole", data, chat_student, *words) == 0
    assert run(tmp_path / "part", data, chat_student, *words, "--max-steps", "3") == 0
    before = steps(tmp_path / "part")
    assert run(tmp_path / "part", data, chat_student, *words, "--resume") == 0
    assert {**before, **steps(tmp_path / "part")} == steps(tmp_path / "whole")


def test_other_labels_are_other_data(tmp_path: Path, chat_student: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "a.jsonl"
    record = {"input_ids": list(range(100)), "labels": list(range(100))}
    data.write_text(json.dumps(record))
    assert run(tmp_path / "run", data, chat_student, "--max-steps", "1") == 0
    record["labels"][7] = -100
    data.write_text(json.dumps(record))
    assert run(tmp_path / "run", data, chat_student, "--resume") == 2
    assert "other training data" in capsys.readouterr().err


@pytest.mark.parametrize("streaming", ["false", "true"])
def test_what_is_left_out_of_a_folder_is_said_and_in_the_events(
    tmp_path: Path, chat_student: Path, capsys: pytest.CaptureFixture[str], streaming: str
) -> None:
    data = tmp_path / "data"
    (data / ".git").mkdir(parents=True)
    (data / ".git" / "config").write_text("[core]")
    (data / "README.md").write_text("card")
    (data / "picture.png").write_bytes(b"\x89PNG\xff")
    write_texts(data / "a.jsonl", 12)
    held = tmp_path / "held"
    held.mkdir()
    (held / "a.txt").write_text("def f():\n    return 1\n" * 10)
    (held / "b.txt.gz").write_bytes(b"x")
    words = ("--held-out", str(held), "--max-steps", "1", "--set", f"streaming={streaming}")
    assert run(tmp_path / "run", data, chat_student, *words) == 0
    said = capsys.readouterr()
    assert "data: left out, hidden: .git/\n" in said.out
    assert "data: left out, a data set's description beside its records: README.md\n" in said.out
    assert "data: left out, not UTF-8 text (convert or remove them): picture.png\n" in said.out + said.err
    assert "held-out: left out, compressed (unpack them): b.txt.gz\n" in said.out
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    (read,) = [event for event in events if event["event"] == "data_read"]
    assert {".git/", "README.md"} <= set(read["left_out"])
    assert set(read["held_out"]["left_out"]) == {"b.txt.gz"}
    (plan,) = [event for event in events if event["event"] == "run_plan"]
    assert plan["begin_of_text"] == []
