"""Documents, packing and batch order."""

import json
from pathlib import Path

import numpy as np
import pytest

from q4kd.trainer.data import BatchOrder, TokenSet, load_corpus, read_documents
from q4kd.trainer.errors import InputError
from q4kd.trainer.split import is_held_out


def encode(texts: list[str]) -> list[list[int]]:
    return [[ord(letter) for letter in text] for text in texts]


def load(path: Path, pattern: str = "**/*", max_bytes: int = 0):  # type: ignore[no-untyped-def]
    return load_corpus(path, pattern=pattern, max_bytes=max_bytes, encode=encode, end_of_text=0)


def test_text_jsonl_and_folders(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("ab")
    (tmp_path / "b.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in ("x", "yz")) + "\n\n")
    assert load(tmp_path / "a.txt").train.tokens.tolist() == [97, 98, 0]
    assert [document.name for document in read_documents(tmp_path / "b.jsonl", "")] == ["b.jsonl:1", "b.jsonl:2"]
    (tmp_path / "c.bin").write_bytes(b"\xff\xfe")
    (tmp_path / "__pycache__").mkdir()
    (tmp_path / "__pycache__" / "d.txt").write_text("no")
    assert [document.name for document in read_documents(tmp_path, "**/*.txt")] == ["a.txt"]
    assert [document.name for document in read_documents(tmp_path, "**/*")] == ["a.txt", "b.jsonl"]


def test_links_that_leave_the_folder_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "secret.txt").write_text("secret")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text("a")
    (tmp_path / "in" / "out.txt").symlink_to(tmp_path / "secret.txt")
    assert [document.name for document in read_documents(tmp_path / "in", "**/*")] == ["a.txt"]


def test_held_out_files_are_chosen_by_name_and_never_trained_on(tmp_path: Path) -> None:
    names = [f"file{index}.txt" for index in range(60)]
    for name in names:
        (tmp_path / name).write_text(name)
    corpus = load(tmp_path)
    held = [name for name in names if is_held_out(name)]
    assert 0 < len(held) < 20
    assert corpus.held_out.num_documents == len(held)
    text = "".join(map(chr, corpus.train.tokens))
    assert not any(f"{name}\0" in text for name in held)
    assert sum(f"{name}\0" in "\0" + text for name in names) >= len(names) - len(held)


def test_reading_stops_at_the_limit(tmp_path: Path) -> None:
    for index in range(20):
        (tmp_path / f"{index:02}.txt").write_text("x" * 100)
    corpus = load(tmp_path, max_bytes=350)
    assert corpus.train.num_documents + corpus.held_out.num_documents == 4


@pytest.mark.parametrize("line", ['{"text": 3}', "[1]", "nonsense", '{"a": "b"}'])
def test_bad_jsonl_names_the_line(tmp_path: Path, line: str) -> None:
    path = tmp_path / "b.jsonl"
    path.write_text('{"text": "ok"}\n' + line + "\n")
    with pytest.raises(InputError, match=r"b\.jsonl:2"):
        load(path)


def test_missing_empty_and_binary_data_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="No such file"):
        load(tmp_path / "none")
    with pytest.raises(InputError, match="UTF-8 text files"):
        load(tmp_path)
    (tmp_path / "a.txt").write_bytes(b"\xff")
    with pytest.raises(InputError, match="UTF-8 text"):
        load(tmp_path / "a.txt")


def order(tokens: int, per_step: int = 3, seq_len: int = 4, seed: int = 0) -> BatchOrder:
    return BatchOrder(
        TokenSet(np.arange(tokens, dtype=np.int32), 1),
        seq_len=seq_len,
        sequences_per_step=per_step,
        seed=seed,
        path=Path("d"),
    )


def test_every_token_is_a_target_once_an_epoch() -> None:
    batches = order(4 * 12 + 1)
    assert batches.steps_per_epoch == 4
    targets = np.concatenate([batches.batch(step)[:, 1:].ravel() for step in range(4)])
    assert sorted(targets) == list(range(1, 49))
    for window in batches.batch(0):
        assert (np.diff(window) == 1).all()


def test_a_batch_depends_on_seed_and_step_alone() -> None:
    one, other = order(4 * 12 + 1), order(4 * 12 + 1)
    later = one.batch(9)
    assert np.array_equal(later, other.batch(9))
    one.batch(0)
    assert np.array_equal(later, one.batch(9))
    assert not np.array_equal(one.batch(0), one.batch(4))  # another epoch, another order
    assert not np.array_equal(one.batch(0), order(4 * 12 + 1, seed=1).batch(0))


def test_too_little_data_says_how_much_is_needed() -> None:
    with pytest.raises(InputError, match="3 windows of 4 tokens"):
        order(12)
