"""Texts are read in a thread beside the student: the same data, the same errors, no thread that outlives the run."""

import json
import logging
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from q4kd.trainer.config.settings import DistillConfig, make_config
from q4kd.trainer.data.encoding import DocumentEncoder
from q4kd.trainer.data.training_data import open_data
from q4kd.trainer.demo import student_path
from q4kd.trainer.errors import InputError
from q4kd.trainer.student.loaded import without_report
from q4kd.trainer.train.run import text_reading
from q4kd.trainer.train.run.text_reading import TextReading, reading_texts

Read = Callable[[DocumentEncoder], AbstractContextManager[TextReading]]


@pytest.fixture
def config(tmp_path: Path) -> DistillConfig:
    data = tmp_path / "data"
    data.mkdir()
    for number in range(40):
        (data / f"{number}.txt").write_text(f"text {number} " * 20)
    paths = {"student": str(tmp_path), "data": str(data), "out": str(tmp_path / "out"), "teacher": str(tmp_path)}
    return make_config({**paths, "seq_len": 16, "packing": "stream"})


def encode(texts: list[str]) -> list[list[int]]:
    return [[ord(letter) for letter in text] for text in texts]


@pytest.fixture
def read(config: DistillConfig, monkeypatch: pytest.MonkeyPatch) -> Read:
    """Return ``reading_texts`` with an encoder of the test's own in place of one for the student's tokenizer."""

    def begin(encoder: DocumentEncoder) -> AbstractContextManager[TextReading]:
        monkeypatch.setattr(text_reading, "load_tokenizer", lambda _folder: "a tokenizer")
        monkeypatch.setattr(text_reading, "tokens_with_rows", lambda _tokenizer, _rows: {})
        monkeypatch.setattr(text_reading, "make_encoder", lambda *_given: encoder)
        return reading_texts(config, None, 128, 2)

    return begin


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    before = threading.active_count()
    yield
    assert threading.active_count() == before


def test_the_data_are_those_that_are_read_without_a_thread(config: DistillConfig, read: Read) -> None:
    with read(DocumentEncoder(encode, 0)) as texts:
        assert texts.tokenizer() == "a tokenizer"
        assert texts.vocabulary() == ""  # there is no teacher
        found = texts.data()
    expected = open_data(config, DocumentEncoder(encode, 0), 2, config.out)
    assert (found.sha256, found.train_tokens) == (expected.sha256, expected.train_tokens)
    assert np.array_equal(found.held_out.tokens.ids, expected.held_out.tokens.ids)
    assert found.account.to_json() == expected.account.to_json()


def test_an_error_is_raised_where_the_data_are_waited_for(read: Read) -> None:
    reached = False
    with (
        pytest.raises(InputError, match=r"token ids from 0 to 63"),
        read(DocumentEncoder(encode, 0, vocab_size=64)) as it,
    ):
        it.tokenizer()
        reached = True
        it.data()
    assert reached


def test_what_nobody_wants_is_not_read_to_its_end(config: DistillConfig, read: Read) -> None:
    records = (json.dumps({"text": f"text {number}"}) for number in range(3000))
    (config.data / "more.jsonl").write_text("\n".join(records))
    begun, wanted, seen = threading.Event(), threading.Event(), list[str]()

    def slowly(texts: list[str]) -> list[list[int]]:
        begun.set()
        wanted.wait(0.5)
        seen.extend(texts)
        return encode(texts)

    with pytest.raises(InputError, match="no such student"), read(DocumentEncoder(slowly, 0)):
        assert begun.wait(10)
        raise InputError("student", expected="one", got="no such student", remedy="none")
    assert 0 < len(seen) <= 512  # the group that was being tokenised


@pytest.mark.parametrize("ending", [KeyboardInterrupt, InputError])
def test_nothing_more_is_begun_after_the_end(
    ending: type[BaseException], read: Read, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that ends while its tokenizer is read, by an error or by Ctrl-C, neither compares nor tokenises."""
    begun, ended, opened = threading.Event(), threading.Event(), list[object]()

    def slowly(_folder: Path) -> str:
        begun.set()
        ended.wait(10)
        return "a tokenizer"

    reading = read(DocumentEncoder(encode, 0))
    monkeypatch.setattr(text_reading, "load_tokenizer", slowly)
    monkeypatch.setattr(text_reading, "open_data", lambda *given: opened.append(given))
    original = TextReading.abandon

    def abandon(self: TextReading) -> None:
        original(self)
        ended.set()

    monkeypatch.setattr(TextReading, "abandon", abandon)
    error = ending() if ending is KeyboardInterrupt else InputError("student", expected="a", got="b", remedy="c")
    with pytest.raises(ending), reading:
        assert begun.wait(10)
        raise error
    assert not opened


def test_the_error_of_a_tokenizer_comes_before_that_of_weights(read: Read, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder in which both are wrong is refused for its tokenizer, though its weights may have been read by then."""
    said = InputError("student", expected="its tokenizer", got="none", remedy="copy it")

    def late(_folder: Path) -> Any:
        time.sleep(0.2)
        raise said

    reading = read(DocumentEncoder(encode, 0))
    monkeypatch.setattr(text_reading, "load_tokenizer", late)
    with pytest.raises(InputError) as caught, reading:
        raise InputError("student", expected="weights", got="others", remedy="fetch them")
    assert caught.value is said
    assert caught.value.__suppress_context__


def test_the_interrupt_is_not_replaced_by_an_error(read: Read, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_folder: Path) -> Any:
        raise InputError("student", expected="its tokenizer", got="none", remedy="copy it")

    reading = read(DocumentEncoder(encode, 0))
    monkeypatch.setattr(text_reading, "load_tokenizer", fail)
    with pytest.raises(KeyboardInterrupt), reading:
        raise KeyboardInterrupt


def test_a_students_tokenizer_is_read(tmp_path: Path, config: DistillConfig) -> None:
    student = tmp_path / "student"
    shutil.copytree(student_path(), student)
    settings = {**config.to_json(), "student": str(student), "out": str(tmp_path / "out")}
    with reading_texts(make_config(settings), None, 2048, 2) as texts:
        assert texts.tokenizer().eos_token_id is not None
        assert texts.data().train_tokens
    (student / "tokenizer.json").unlink()
    with (
        pytest.raises(InputError, match=r"its tokenizer"),
        reading_texts(make_config(settings), None, 2048, 2) as texts,
    ):
        texts.tokenizer()


def test_what_a_tokenizer_warns_of_is_heard_while_the_student_is_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    """Loading a student keeps transformers quiet in its own thread and those that it starts, and in no other."""
    from transformers.utils import logging as its_logging

    logger = its_logging.get_logger("transformers.test")
    handler = logging.StreamHandler()
    records: list[str] = []
    handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("transformers").addHandler(handler)
    go, done = threading.Event(), threading.Event()

    def warn() -> None:
        go.wait(10)
        logger.warning("of a tokenizer")
        done.set()

    reader = threading.Thread(target=warn)
    reader.start()
    try:
        with without_report():
            go.set()
            assert done.wait(10)
            logger.warning("of a student")
            worker = threading.Thread(target=logger.warning, args=("of its worker",))
            worker.start()
            worker.join()
            logger.error("an error")
        logger.warning("afterwards")
    finally:
        logging.getLogger("transformers").removeHandler(handler)
        reader.join()
    assert records == ["of a tokenizer", "an error", "afterwards"]
