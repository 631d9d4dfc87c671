"""A teacher that is not here: what it said of every training window, read from a cache that must belong to the run."""

import dataclasses
import hashlib
import json
from typing import Any

from q4kd.trainer.batch import Batch
from q4kd.trainer.cache_reader import CacheReader
from q4kd.trainer.cache_store import INDEX_FILE, CacheIndex, CacheKey, explain_mismatch, read_index
from q4kd.trainer.config import DistillConfig
from q4kd.trainer.data import BatchOrder
from q4kd.trainer.errors import InputError
from q4kd.trainer.files import sha256_file
from q4kd.trainer.packing import Windows
from q4kd.trainer.teacher_signal import CachedSignal, check_signal
from q4kd.trainer.training_data import TrainingData


class CachedTeacher:
    """Gives a step its teacher's signal from a cache.

    Args:
        index: of a complete cache that belongs to this run.

    Raises:
        InputError: when the cache is not complete.
    """

    def __init__(self, index: CacheIndex) -> None:
        self.index = index
        self._reader = CacheReader(index)

    def signal(self, batch: Batch) -> CachedSignal:
        """Return the signal of a batch of training windows, on its device.

        Raises:
            InputError: when a shard is missing, changed or not what its name says.
        """
        assert batch.windows_B is not None
        top = self._reader.read(batch.windows_B)
        check_signal(top, self.index.key.rows)
        return CachedSignal(top.to(batch.ids_BT.device), is_checked=True)

    def describe(self) -> dict[str, str | int]:
        """Return what run.json says of the teacher."""
        return {"sha256": self.index.key.teacher_sha256, "cache": self.index.folder.name, "k": self.index.k}

    @property
    def identity(self) -> str:
        """What a resumed run must find again: two caches of one identity teach the same."""
        return f"{self.index.key.teacher_sha256} k={self.index.k}"


def training_windows(data: TrainingData) -> Windows:
    """Return the windows that signals are cached of, in canonical order: that of the data, whatever seed and epoch.

    Raises:
        InputError: for a stream, whose windows have no fixed order.
    """
    if not isinstance(data.order, BatchOrder):
        raise InputError(
            "setting streaming",
            expected="data in a fixed order, for a teacher's cache",
            got="a stream",
            remedy="set streaming to false; tokens that do not fit in memory are kept on disk",
        )
    return data.order.windows


def digest_tokenizer(tokenizer: Any) -> str:
    """Return the SHA-256 of a tokenizer's token -> id map: saving it anew changes its files, but not this."""
    content = json.dumps(sorted(tokenizer.get_vocab().items()), ensure_ascii=True)
    return hashlib.sha256(content.encode()).hexdigest()


def make_key(data: TrainingData, tokenizer: Any, rows: int, teacher_sha256: str) -> CacheKey:
    """Return what a cache of these windows belongs to."""
    windows = training_windows(data)
    return CacheKey(
        teacher_sha256=teacher_sha256,
        tokenizer_sha256=digest_tokenizer(tokenizer),
        data_sha256=data.sha256,
        rows=rows,
        seq_len=windows.seq_len,
        windows=len(windows),
        packing=windows.packing,
    )


def open_cached_teacher(config: DistillConfig, data: TrainingData, tokenizer: Any, rows: int) -> CachedTeacher:
    """Open the cache of a run and check that it belongs to it.

    With a teacher named as well, as in a RUN.yaml that made the cache, the cache must be of that file, which is not
    loaded.

    Raises:
        InputError: naming what differs, or what is missing.
    """
    assert config.teacher_cache is not None
    index = read_index(config.teacher_cache)
    wanted = make_key(data, tokenizer, rows, index.key.teacher_sha256)
    if config.teacher is not None:
        wanted = dataclasses.replace(wanted, teacher_sha256=_digest(config))
    check_key(index, wanted)
    return CachedTeacher(index)


def _digest(config: DistillConfig) -> str:
    assert config.teacher is not None
    try:
        return sha256_file(config.teacher)
    except OSError as error:
        raise InputError(
            f"--teacher {config.teacher}",
            expected="the file that the cache was made from",
            got=str(error.strerror),
            remedy="leave it out: the cache names its teacher by digest",
        ) from error


def check_key(index: CacheIndex, wanted: CacheKey) -> None:
    """Refuse a cache that belongs to something else.

    Raises:
        InputError: naming each part that differs.
    """
    difference = explain_mismatch(index.key, wanted)
    if difference is not None:
        raise InputError(
            str(index.folder / INDEX_FILE),
            expected="a cache of this teacher, tokenizer, data and seq_len",
            got=f"another one ({difference})",
            remedy="repeat the settings that it was made with, or make one for these with q4kd cache",
        )
