"""The text that two models are compared on."""

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("tokenizers")

from q4kd.trainer.errors import InputError
from q4kd.trainer.export.fidelity_text import read_ids, read_sample


def letters(texts: list[str]) -> list[list[int]]:
    return [[ord(letter) for letter in text] for text in texts]


def test_documents_are_joined_by_the_end_token_and_cut_into_windows(tmp_path: Path) -> None:
    for name, text in (("a.txt", "abc"), ("b.txt", "de"), ("c.txt", "fgh")):
        (tmp_path / name).write_text(text)
    sample = read_sample(tmp_path, encode=letters, end=0, tokens=100, length=5)
    assert [[chr(index) for index in row] for row in sample.windows] == [list("abc\0d"), list("e\0fgh")]
    assert len(sample.sha256) == 64
    assert read_sample(tmp_path / "a.txt", encode=letters, end=None, tokens=100, length=3).windows.tolist() == [
        [97, 98, 99]
    ]
    assert read_sample(tmp_path, encode=letters, end=0, tokens=7, length=3).windows.size == 6


def test_no_more_text_is_encoded_than_needed(tmp_path: Path) -> None:
    for name in "abcd":
        (tmp_path / f"{name}.txt").write_text("x" * 10)
    read: list[int] = []

    def encode(texts: list[str]) -> list[list[int]]:
        read.append(len(texts))
        return letters(texts)

    read_sample(tmp_path, encode=encode, end=None, tokens=15, length=5)
    assert len(read) == 2


def test_the_default_is_text_that_the_demo_teacher_has_not_seen(tmp_path: Path) -> None:
    seen: list[str] = []

    def encode(texts: list[str]) -> list[list[int]]:
        seen.extend(texts)
        return letters(texts)

    sample = read_sample(None, encode=encode, end=None, tokens=3000, length=512)
    assert sample.name == "Python standard library, held out"
    assert sample.windows.shape == (5, 512)
    assert "def " in seen[0]


def test_ids_are_read_as_they_are(tmp_path: Path) -> None:
    np.save(tmp_path / "ids.npy", np.arange(12, dtype=np.uint16).reshape(3, 4))
    sample = read_sample(tmp_path / "ids.npy", encode=letters, end=None, tokens=10, length=4)
    assert sample.windows.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert sample.windows.dtype == np.int64


@pytest.mark.parametrize("value", [np.ones(3), np.array(["a"]), np.array([{}], dtype=object)])
def test_what_is_no_ids_is_refused(tmp_path: Path, value: np.ndarray) -> None:
    np.save(tmp_path / "ids.npy", value)
    with pytest.raises(InputError, match="integer"):
        read_ids(tmp_path / "ids.npy")


def test_too_little_text_and_no_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("abc")
    with pytest.raises(InputError, match="one window of 8 tokens, got 3"):
        read_sample(tmp_path / "a.txt", encode=letters, end=None, tokens=100, length=8)
    with pytest.raises(InputError, match="No such file"):
        read_sample(tmp_path / "none.txt", encode=letters, end=None, tokens=100, length=8)
    (tmp_path / "bad.npy").write_text("no array")
    with pytest.raises(InputError, match=r"integer \.npy"):
        read_ids(tmp_path / "bad.npy")


def test_completions_are_text_and_what_is_no_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "ab", "completion": "cd"}\n')
    assert read_sample(path, encode=letters, end=None, tokens=9, length=4).windows.tolist() == [[97, 98, 99, 100]]
    for record in ('{"messages": [{"role": "user", "content": "x"}]}', '{"input_ids": [1, 2]}'):
        path.write_text(record)
        with pytest.raises(InputError, match=r"a\.jsonl:1: expected text"):
            read_sample(path, encode=letters, end=None, tokens=9, length=2)
