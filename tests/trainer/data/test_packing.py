"""Packing: no token lost, none seen or predicted across a border, and a stream's windows are those of the whole."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from q4kd.trainer.data import token_set
from q4kd.trainer.data.encoding import Encoded
from q4kd.trainer.data.packing import Window, Windows, pack
from q4kd.trainer.data.token_set import TokenSet, TokenWriter
from q4kd.trainer.loss.config import IGNORE_INDEX


def numbered(lengths: list[int]) -> list[Encoded]:
    """Return documents whose tokens are all different: document d has ids from 1000 d."""
    return [Encoded.make(range(1000 * d, 1000 * d + length)) for d, length in enumerate(lengths, 1)]


def all_windows(documents: list[Encoded], seq_len: int, packing: str) -> list[Window]:
    windows = Windows(TokenSet.join(documents), seq_len, packing)
    return [windows[index] for index in range(len(windows))]


LENGTHS = st.lists(st.integers(0, 20), min_size=1, max_size=12)
SEQ_LEN = st.integers(2, 9)


@settings(max_examples=60, deadline=None)
@given(LENGTHS, SEQ_LEN)
def test_every_token_but_first_ones_is_a_label_once(lengths: list[int], seq_len: int) -> None:
    documents = numbered(lengths)
    firsts = {int(part.ids[0]) for part in documents if len(part.ids)}
    joined = [int(token) for part in documents for token in part.ids]
    windows = all_windows(documents, seq_len, "documents")
    labels = [int(label) for window in windows for label in window.labels if label != IGNORE_INDEX]
    used = joined[: len(windows) * seq_len + 1]
    assert labels == [token for token in used[1:] if token not in firsts]
    assert [int(token) for window in windows for token in window.ids] == used[:-1]
    assert len(joined) - len(used) < seq_len or not windows
    alone = [int(label) for window in all_windows(documents, seq_len, "none") for label in window.labels]
    assert [label for label in alone if label != IGNORE_INDEX] == [token for token in joined if token not in firsts]
    stream = [int(label) for window in all_windows(documents, seq_len, "stream") for label in window.labels]
    assert stream == used[1:]


@settings(max_examples=60, deadline=None)
@given(LENGTHS, SEQ_LEN)
def test_a_position_starts_where_its_document_does_and_predicts_it_alone(lengths: list[int], seq_len: int) -> None:
    for window in all_windows(numbered(lengths), seq_len, "documents"):
        of = window.ids // 1000
        for position, start in enumerate(window.starts):
            assert (of[start : position + 1] == of[position]).all()
            assert start == 0 or of[start - 1] != of[position]
            label = window.labels[position]
            assert label == IGNORE_INDEX or label == window.ids[position] + 1


@settings(max_examples=60, deadline=None)
@given(LENGTHS, SEQ_LEN, st.sampled_from(["documents", "stream", "none"]))
def test_windows_of_a_stream_are_those_of_the_whole(lengths: list[int], seq_len: int, packing: str) -> None:
    documents = numbered(lengths)
    found, wanted = list(pack(documents, seq_len, packing)), all_windows(documents, seq_len, packing)
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        for name in ("ids", "labels", "starts"):
            assert np.array_equal(getattr(one, name), getattr(other, name))


def test_padding_has_no_label_and_follows_every_token() -> None:
    first, last, other = all_windows(numbered([6, 3, 1]), 4, "none")
    assert first.ids.tolist() == [1000, 1001, 1002, 1003]
    assert first.labels.tolist() == [1001, 1002, 1003, 1004]
    assert last.ids[0] == 1004
    assert last.labels.tolist() == [1005, IGNORE_INDEX, IGNORE_INDEX, IGNORE_INDEX]
    assert other.labels.tolist() == [2001, 2002, IGNORE_INDEX, IGNORE_INDEX]
    assert not other.starts.any()


def test_what_is_not_learnt_has_no_label() -> None:
    prompt = Encoded(np.arange(5, dtype=np.int32), np.array([False, False, True, True, False]))
    text = Encoded(np.arange(10, 15, dtype=np.int32))
    windows = Windows(TokenSet.join([text, prompt]), 9, "documents")
    assert windows[0].labels.tolist() == [11, 12, 13, 14, IGNORE_INDEX, IGNORE_INDEX, 2, 3, IGNORE_INDEX]
    assert windows.has_label()
    masked = Encoded(prompt.ids, np.zeros(5, bool))
    assert not Windows(TokenSet.join([masked]), 4, "documents").has_label()


def test_digests_cover_tokens_borders_and_labels() -> None:
    ids = np.arange(6, dtype=np.int32)
    sets = [
        TokenSet.join([Encoded(ids)]),
        TokenSet.join([Encoded(ids[:3]), Encoded(ids[3:])]),
        TokenSet.join([Encoded(ids, np.arange(6) > 2)]),
        TokenSet.join([Encoded(ids[::-1])]),
    ]
    assert len({part.sha256 for part in sets}) == 4
    assert TokenSet.join([Encoded(ids)]).sha256 == sets[0].sha256


def test_tokens_past_the_limit_lie_in_a_file(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:  # type: ignore[no-untyped-def]
    documents = [Encoded(np.arange(50, dtype=np.int32), np.arange(50) > index) for index in range(20)]
    wanted = TokenSet.join(documents)
    monkeypatch.setattr(token_set, "SPILL_BYTES", 500)
    writer = TokenWriter(tmp_path)
    for document in documents:
        writer.add(document)
    found = writer.finish()
    assert isinstance(found.ids, np.memmap)
    assert found.sha256 == wanted.sha256
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("packing", ["none", "stream"])
def test_windows_without_a_label_are_counted(packing: str) -> None:
    rng = np.random.default_rng(0)
    for seq_len in (1, 3, 5):
        documents = [
            Encoded(np.arange(size, dtype=np.int64), rng.random(size) < 0.15) for size in rng.integers(1, 18, 60)
        ]
        windows = Windows(TokenSet.join(documents), seq_len, packing)
        slowly = sum(not bool((windows[index].labels != -100).any()) for index in range(len(windows)))
        assert windows.count_unlabelled() == slowly > 0
    assert Windows(TokenSet.join([Encoded(np.arange(9), None)]), 3, packing).count_unlabelled() == 0
    assert Windows(TokenSet.join([]), 3, packing).count_unlabelled() == 0
