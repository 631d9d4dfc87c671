"""Data are read in a thread beside the loading: the same data, the same errors, and no thread that outlives the run."""

import json
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from q4kd.trainer.config.settings import DistillConfig, make_config
from q4kd.trainer.data.encoding import DocumentEncoder
from q4kd.trainer.data.training_data import open_data
from q4kd.trainer.errors import InputError
from q4kd.trainer.train.run.data_reading import reading_data


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


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    before = threading.active_count()
    yield
    assert threading.active_count() == before


def test_the_data_are_those_that_are_read_without_a_thread(config: DistillConfig) -> None:
    with reading_data(config, DocumentEncoder(encode, 0), 2) as wait:
        found = wait()
    expected = open_data(config, DocumentEncoder(encode, 0), 2, config.out)
    assert (found.sha256, found.train_tokens) == (expected.sha256, expected.train_tokens)
    assert np.array_equal(found.held_out.tokens.ids, expected.held_out.tokens.ids)
    assert found.account.to_json() == expected.account.to_json()


def test_an_error_is_raised_where_the_data_are_waited_for(config: DistillConfig) -> None:
    reached = False
    with (
        pytest.raises(InputError, match=r"token ids from 0 to 63"),
        reading_data(config, DocumentEncoder(encode, 0, vocab_size=64), 2) as wait,
    ):
        reached = True
        wait()
    assert reached


def test_what_nobody_wants_is_not_read_to_its_end(config: DistillConfig) -> None:
    records = (json.dumps({"text": f"text {number}"}) for number in range(3000))
    (config.data / "more.jsonl").write_text("\n".join(records))
    begun, wanted, seen = threading.Event(), threading.Event(), list[str]()

    def slowly(texts: list[str]) -> list[list[int]]:
        begun.set()
        wanted.wait(0.5)
        seen.extend(texts)
        return encode(texts)

    with pytest.raises(InputError, match="no such student"), reading_data(config, DocumentEncoder(slowly, 0), 2):
        assert begun.wait(10)
        raise InputError("student", expected="one", got="no such student", remedy="none")
    assert 0 < len(seen) <= 512  # the group that was being tokenised
