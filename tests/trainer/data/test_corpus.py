"""Documents, packing and batch order."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from q4kd.trainer.data.corpus import BatchOrder, load_corpus
from q4kd.trainer.data.documents import SourceSettings, is_held_out
from q4kd.trainer.data.encoding import DocumentEncoder, Encoded
from q4kd.trainer.data.packing import Windows
from q4kd.trainer.data.readers import read_documents
from q4kd.trainer.data.token_set import TokenSet
from q4kd.trainer.errors import InputError


def encode(texts: list[str]) -> list[list[int]]:
    return [[ord(letter) for letter in text] for text in texts]


def load(path: Path, pattern: str = "**/*", max_bytes: int = 0):  # type: ignore[no-untyped-def]
    return load_corpus(path, DocumentEncoder(encode, 0), SourceSettings(pattern=pattern), max_bytes=max_bytes)


def test_text_jsonl_and_folders(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("ab")
    (tmp_path / "b.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in ("x", "yz")) + "\n\n")
    assert load(tmp_path / "a.txt").train.ids.tolist() == [97, 98, 0]
    assert [document.name for document in read_documents(tmp_path / "b.jsonl", "")] == ["b.jsonl:1", "b.jsonl:2"]
    (tmp_path / "c.bin").write_bytes(b"\xff\xfe")
    (tmp_path / "__pycache__").mkdir()
    (tmp_path / "__pycache__" / "d.txt").write_text("no")
    assert [document.name for document in read_documents(tmp_path, "**/*.txt")] == ["a.txt"]
    assert [document.name for document in read_documents(tmp_path, "**/*")] == [
        "a.txt",
        "b.jsonl:1",
        "b.jsonl:2",
    ]


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
    text = "".join(map(chr, corpus.train.ids))
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
    with pytest.raises(InputError, match="no document"):
        load(tmp_path)
    (tmp_path / "a.txt").write_bytes(b"\xff")
    with pytest.raises(InputError, match="UTF-8 text"):
        load(tmp_path / "a.txt")


def order(tokens: int, per_step: int = 3, seq_len: int = 4, seed: int = 0) -> BatchOrder:
    windows = Windows(TokenSet.join([Encoded.make(range(tokens))]), seq_len, "documents")
    return BatchOrder(windows, sequences_per_step=per_step, seed=seed, path=Path("d"))


def test_every_token_is_a_target_once_an_epoch() -> None:
    batches = order(4 * 12 + 1)
    assert batches.steps_per_epoch == 4
    targets = np.concatenate([batches.batch(step).labels_BT.numpy().ravel() for step in range(4)])
    assert sorted(targets) == list(range(1, 49))
    batch = batches.batch(0)
    assert (batch.labels_BT == batch.ids_BT + 1).all()
    assert (batch.ids_BT.diff(dim=1) == 1).all()
    assert batch.starts_BT is None


def test_a_batch_depends_on_seed_and_step_alone() -> None:
    one, other = order(4 * 12 + 1), order(4 * 12 + 1)
    later = one.batch(9).ids_BT
    assert torch.equal(later, other.batch(9).ids_BT)
    one.batch(0)
    assert torch.equal(later, one.batch(9).ids_BT)
    assert not torch.equal(one.batch(0).ids_BT, one.batch(4).ids_BT)  # another epoch, another order
    assert not torch.equal(one.batch(0).ids_BT, order(4 * 12 + 1, seed=1).batch(0).ids_BT)


def test_one_texts_windows_are_the_tokens_cut_in_sequence(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("".join(map(chr, range(40, 100))))
    tokens = [*range(40, 100), 0]
    corpus = load(tmp_path / "a.txt")
    for packing in ("documents", "stream"):
        batches = BatchOrder(Windows(corpus.train, 6, packing), sequences_per_step=3, seed=9, path=tmp_path)
        for step in range(2 * batches.steps_per_epoch):
            epoch, position = divmod(step, batches.steps_per_epoch)
            chosen = np.random.default_rng((9, epoch)).permutation(10)[position * 3 : position * 3 + 3]
            batch = batches.batch(step)
            assert batch.ids_BT.tolist() == [tokens[index * 6 : index * 6 + 6] for index in chosen]
            assert batch.labels_BT.tolist() == [tokens[index * 6 + 1 : index * 6 + 7] for index in chosen]
            assert batch.starts_BT is None


def test_too_little_data_says_how_much_is_needed() -> None:
    with pytest.raises(InputError, match="3 windows of 4 tokens"):
        order(12)
