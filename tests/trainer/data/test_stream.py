"""Streams: every document once a pass in a seeded order, bounded, and the same batches however one comes to a step."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from q4kd.trainer.data import stream as stream_module
from q4kd.trainer.data.documents import Document, SourceSettings, is_held_out
from q4kd.trainer.data.encoding import DocumentEncoder
from q4kd.trainer.data.stream import Stream, StreamOrder, open_stream, shuffle
from q4kd.trainer.errors import InputError


def encode(texts: list[str]) -> list[list[int]]:
    return [[ord(letter) for letter in text] for text in texts]


def make(path: Path, buffer: int = 5, seed: int = 0, own: bool = True) -> Stream:
    return Stream(path, DocumentEncoder(encode, 0), SourceSettings(), 0, own, buffer, seed)


def batches(path: Path, buffer: int = 5, seed: int = 0) -> StreamOrder:
    found = make(path, buffer, seed)
    return open_stream(found, seq_len=6, packing="documents", sequences_per_step=2, steps=40)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    for file in range(3):
        lines = [json.dumps({"text": chr(97 + file) * (3 + row % 5) + str(row)}) for row in range(30)]
        (tmp_path / f"{file}.jsonl").write_text("\n".join(lines))
    return tmp_path


def test_a_pass_has_every_document_once_in_an_order_of_its_own(source: Path) -> None:
    documents = make(source).training_documents()
    passes = [[next(documents).name for _ in range(90)] for _ in range(2)]
    assert len(set(passes[0])) == 90
    assert sorted(passes[0]) == sorted(passes[1])
    assert passes[0] != passes[1]
    again = make(source).training_documents()
    assert [next(again).name for _ in range(90)] == passes[0]
    other = make(source, seed=1).training_documents()
    assert [next(other).name for _ in range(90)] != passes[0]


def test_the_buffer_is_bounded_in_documents_and_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = 0

    def documents():  # type: ignore[no-untyped-def]
        nonlocal taken
        for number in range(100):
            taken += 1
            yield Document(str(number), "x" * 10)

    for size, limit, held in ((7, 1 << 20, 8), (1000, 50, 6)):
        taken, most = 0, 0
        monkeypatch.setattr(stream_module, "MAX_BUFFER_BYTES", limit)
        for given, _ in enumerate(shuffle(documents(), size, np.random.default_rng(0)), start=1):
            # Once it has been full it stays so, until the source ends.
            most = max(most, taken - given)
            assert taken - given < held
            assert taken < held or taken - given >= held - 2 or taken == 100
        assert (given, most) == (100, held - 1)


def test_a_resumed_run_gets_the_batches_of_the_whole(source: Path) -> None:
    whole = batches(source)
    wanted = [whole.batch(step) for step in range(40)]
    assert any(batch.starts_BT is not None for batch in wanted)
    assert torch.equal(whole.batch(39).ids_BT, wanted[39].ids_BT)  # asked again, as guards do
    assert torch.equal(whole.batch(3).ids_BT, wanted[3].ids_BT)  # an earlier one starts again
    resumed = batches(source)
    for step in (17, 18, 39):
        found = resumed.batch(step)
        assert torch.equal(found.ids_BT, wanted[step].ids_BT)
        assert torch.equal(found.labels_BT, wanted[step].labels_BT)
        assert str(found.starts_BT) == str(wanted[step].starts_BT)
    assert not torch.equal(batches(source, seed=1).batch(0).ids_BT, wanted[0].ids_BT)


def test_held_out_documents_are_never_drawn(source: Path) -> None:
    found = make(source, own=False)
    documents = found.training_documents()
    names = {next(documents).name for _ in range(200)}
    held = [f"{file}.jsonl:{row}" for file in range(3) for row in range(1, 31) if is_held_out(f"{file}.jsonl:{row}")]
    assert held
    assert not names & set(held)
    assert len(names) == 90 - len(held)
    assert found.held_out_tokens(1 << 20).num_documents == len(held)
    assert 10 < len(found.held_out_tokens(10).ids) < 10 + 12
    assert len(found.held_out_tokens(0).ids) == 0


def test_what_a_stream_needs_is_said(source: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="steps"):
        open_stream(make(source), seq_len=4, packing="none", sequences_per_step=1, steps=None)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(InputError, match="no document"):
        batches(empty).batch(0)


def test_the_digest_sees_names_sizes_and_ends(source: Path) -> None:
    before = make(source).sha256
    path = source / "1.jsonl"
    path.write_text(path.read_text().replace("bbb0", "bbb1"))
    changed = make(source).sha256
    path.rename(source / "9.jsonl")
    assert len({before, changed, make(source).sha256}) == 3


def test_the_digest_sees_names_sizes_and_both_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream_module, "_SAMPLED", 8)
    digests = set()
    for number, (name, text) in enumerate(
        (("a.txt", "begin" + "x" * 90 + "end"), ("b.txt", "begin" + "x" * 90 + "end"),
         ("a.txt", "begin" + "x" * 91 + "end"), ("a.txt", "Begin" + "x" * 90 + "end"),
         ("a.txt", "begin" + "x" * 90 + "enD"))
    ):  # fmt: skip
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / name).write_text(text)
        digests.add(make(folder).sha256)
    assert len(digests) == 5


@pytest.mark.parametrize("packing", ["none", "documents"])
def test_a_stream_whose_documents_never_fill_a_window_is_refused(tmp_path: Path, packing: str) -> None:
    (tmp_path / "a.jsonl").write_text('{"input_ids": [3]}\n' * 700)
    order = open_stream(make(tmp_path), seq_len=6, packing=packing, sequences_per_step=1, steps=4)
    if packing == "none":
        with pytest.raises(InputError, match="none in a whole pass"):
            order.batch(0)
    else:
        assert order.batch(2).ids_BT.shape == (1, 6)
