"""The folder of cached signals: what is read is what the teacher said, and nothing else is read at all."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from q4kd.trainer.errors import FileChangedError, InputError
from q4kd.trainer.teacher.cache.reader import CacheReader
from q4kd.trainer.teacher.cache.signal import take_top
from q4kd.trainer.teacher.cache.store import (
    CacheIndex,
    CacheKey,
    bytes_per_token,
    explain_mismatch,
    read_index,
    windows_per_shard,
)

ROWS, SEQ_LEN, WINDOWS, K = 300, 8, 10, 5
KEY = CacheKey("a" * 64, "b" * 64, "c" * 64, ROWS, SEQ_LEN, WINDOWS, "documents")


@pytest.fixture
def cached(tmp_path: Path) -> tuple[Path, torch.Tensor]:
    logits = torch.randn(WINDOWS * SEQ_LEN, ROWS, generator=torch.Generator().manual_seed(0)) * 4
    index = CacheIndex(
        tmp_path, KEY, K, {}, windows_per_shard(K, ROWS, SEQ_LEN, 4 * SEQ_LEN * bytes_per_token(K, ROWS))
    )
    assert (index.windows_per_shard, index.num_shards) == (4, 3)
    for shard in range(index.num_shards):
        windows = index.windows_of(shard)
        index.write_shard(shard, take_top(logits[windows.start * SEQ_LEN : windows.stop * SEQ_LEN], K))
    return tmp_path, logits


def test_signals_are_the_teachers_in_any_order(cached: tuple[Path, torch.Tensor]) -> None:
    folder, logits = cached
    chosen = np.array([9, 0, 4, 3])
    signal = CacheReader(read_index(folder)).read(chosen)
    rows = torch.cat([torch.arange(window * SEQ_LEN, (window + 1) * SEQ_LEN) for window in chosen])
    exact = torch.log_softmax(logits[rows].double(), -1)
    top = exact.topk(K, -1)
    assert torch.equal(signal.ids_MK, top.indices)
    # float16 keeps 11 bits; making the position sum to one moves it by no more than that again.
    torch.testing.assert_close(signal.log_probs_MK.double(), top.values, rtol=2**-10, atol=2**-10)
    tail = (1 - top.values.exp().sum(-1)).log()
    torch.testing.assert_close(signal.tail_M.double(), tail, rtol=2**-9, atol=2**-9)
    total = signal.log_probs_MK.exp().sum(-1) + signal.tail_M.exp()
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-6)


def test_a_tail_of_nothing_is_minus_infinity() -> None:
    signal = take_top(torch.randn(3, 4), 4)
    assert torch.isneginf(signal.tail_M).all()
    torch.testing.assert_close(signal.log_probs_MK.exp().sum(-1), torch.ones(3))


def test_bytes_follow_the_vocabulary() -> None:
    assert bytes_per_token(32, 2048) == 130
    assert bytes_per_token(32, 151_936) == 194


def test_an_unfinished_cache_is_refused(tmp_path: Path) -> None:
    index = CacheIndex(tmp_path, KEY, K, {})
    index.write()
    with pytest.raises(InputError, match="expected 1 shards, got 0"):
        CacheReader(read_index(tmp_path))


def test_a_shard_that_is_changed_after_it_was_checked_is_not_read(cached: tuple[Path, torch.Tensor]) -> None:
    folder, _ = cached
    reader = CacheReader(read_index(folder))
    reader.read(np.array([9, 0]))
    os.truncate(folder / "signal-000000.safetensors", 100)
    reader.read(np.array([9]))
    with pytest.raises(FileChangedError, match=r"signal-000000\.safetensors: .* got 100: it was changed"):
        reader.read(np.array([9, 0]))


def test_a_changed_byte_is_seen(cached: tuple[Path, torch.Tensor]) -> None:
    folder, _ = cached
    path = folder / "signal-000001.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    reader = CacheReader(read_index(folder))
    reader.read(np.array([0, 9]))
    with pytest.raises(InputError, match=r"signal-000001.*a changed file"):
        reader.read(np.array([5]))


@pytest.mark.parametrize(
    "change",
    [
        lambda index: index.update(version=2),
        lambda index: index.update(k=0),
        lambda index: index.update(k=ROWS + 1),
        lambda index: index["key"].update(windows=True),
        lambda index: index["key"].pop("rows"),
        lambda index: index["shards"].update({"../signal.safetensors": {"sha256": "", "bytes": 9}}),
        lambda index: index["shards"]["signal-000000.safetensors"].update(bytes=1 << 50),
        lambda index: index.update(shards=[]),
    ],
)
def test_hostile_indexes_are_one_line(cached: tuple[Path, torch.Tensor], change: Any) -> None:
    path = cached[0] / "cache.json"
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))
    with pytest.raises(InputError) as caught:
        read_index(cached[0])
    assert "\n" not in str(caught.value)


def test_another_layout_than_the_index_says_is_refused(cached: tuple[Path, torch.Tensor]) -> None:
    """A k that the digest cannot tell: the index itself was edited, and the shard does not fit it."""
    path = cached[0] / "cache.json"
    document = json.loads(path.read_text())
    document["k"] = K - 1
    path.write_text(json.dumps(document))
    with pytest.raises(InputError, match="expected"):
        CacheReader(read_index(cached[0])).read(np.array([0]))


def test_a_mismatch_names_what_differs() -> None:
    assert explain_mismatch(KEY, KEY) is None
    other = CacheKey("a" * 64, "b" * 64, "d" * 64, ROWS, 16, WINDOWS, "documents")
    assert explain_mismatch(KEY, other) == "data_sha256: cccccccccccc → dddddddddddd; seq_len: 8 → 16"


def test_ids_of_a_large_vocabulary_keep_all_their_bits(tmp_path: Path) -> None:
    rows = (1 << 16) + 9
    index = CacheIndex(tmp_path, CacheKey("", "", "", rows, 2, 1, "none"), 1, {})
    logits = torch.zeros(2, rows)
    logits[0, rows - 1] = logits[1, 3] = 30.0
    index.write_shard(0, take_top(logits, 1))
    assert CacheReader(read_index(tmp_path)).read(np.array([0])).ids_MK.tolist() == [[rows - 1], [3]]
