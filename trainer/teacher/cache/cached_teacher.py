"""A teacher that is not loaded: its signal for every window is read from a cache that must belong to the run."""

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import Tensor

from q4kd.trainer.config.settings import DistillConfig, no_stream
from q4kd.trainer.data.batch import Batch
from q4kd.trainer.data.corpus import BatchOrder
from q4kd.trainer.data.packing import Windows
from q4kd.trainer.data.training_data import TrainingData
from q4kd.trainer.errors import InputError
from q4kd.trainer.files import sha256_file
from q4kd.trainer.formats.gguf.split import model_paths
from q4kd.trainer.formats.model_file import combine_digests
from q4kd.trainer.loss.signal import LossOptions
from q4kd.trainer.loss.sums import LossTerms
from q4kd.trainer.loss.topk import check_distributions, topk_kd_loss
from q4kd.trainer.teacher.cache.reader import CacheReader
from q4kd.trainer.teacher.cache.signal import TopKSignal
from q4kd.trainer.teacher.cache.store import INDEX_FILE, CacheIndex, CacheKey, explain_mismatch, read_index


@dataclass(frozen=True)
class CachedSignal:
    """A distribution over k tokens and the tail, read from a cache."""

    top: TopKSignal  # of M positions
    is_checked: bool = False  # whether ``check_signal`` has seen it

    def loss(self, hidden_MH: Tensor, weight_VH: Tensor, labels_M: Tensor, **options: Unpack[LossOptions]) -> LossTerms:
        """Return the loss over k + 1 events; see ``topk_kd_loss``.

        Raises:
            InputError: when what was read is not a distribution over different tokens.
        """
        with _explaining_signals():
            return topk_kd_loss(
                hidden_MH,
                weight_VH,
                labels_M,
                topk_ids_MK=self.top.ids_MK,
                topk_log_probs_MK=self.top.log_probs_MK,
                tail_log_prob_M=self.top.tail_M,
                is_checked=self.is_checked,
                **options,
            )


def check_signal(top: TopKSignal, vocab: int) -> None:
    """Check a signal on the host, so that no step reads it back from a device.

    Raises:
        InputError: as ``CachedSignal.loss``, for any of its positions.
    """
    with _explaining_signals():
        check_distributions(top.ids_MK, torch.cat([top.log_probs_MK, top.tail_M.unsqueeze(1)], 1), vocab)


@contextlib.contextmanager
def _explaining_signals() -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        expected, remedy = "signals that q4kd cache wrote", "delete the cache's folder and make it anew"
        raise InputError("teacher_cache", expected=expected, got=str(error)[:160], remedy=remedy) from error


class CachedTeacher:
    """Gives a step its teacher's signal from a cache that belongs to this run.

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
        """Digest and k that a resumed run must find again: two caches of one identity teach the same."""
        return f"{self.index.key.teacher_sha256} k={self.index.k}"


def training_windows(data: TrainingData) -> Windows:
    """Return the windows whose signals are cached, in the order of the data, whatever the seed and the epoch.

    Raises:
        InputError: for a stream, whose windows have no fixed order.
    """
    if not isinstance(data.order, BatchOrder):
        raise no_stream()
    return data.order.windows


def digest_tokenizer(tokenizer: Any) -> str:
    """Return the SHA-256 of a tokenizer's token -> id map, which saving it anew does not change, unlike its files."""
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

    When a teacher is named as well, as in the RUN.yaml that made the cache, the cache must be of that file, or of all
    shards of that model. It is not loaded.

    Raises:
        InputError: naming what differs, or what is missing.
    """
    assert config.teacher_cache is not None
    index = read_index(config.teacher_cache)
    wanted = make_key(data, tokenizer, rows, index.key.teacher_sha256)
    if config.teacher is not None:
        wanted = dataclasses.replace(wanted, teacher_sha256=_digest(config.teacher))
    check_key(index, wanted)
    return CachedTeacher(index)


def _digest(teacher: Path) -> str:
    try:
        return combine_digests([sha256_file(path) for path in model_paths(teacher)])
    except OSError as error:
        expected, got = "the file that the cache was made from", str(error.strerror)
        remedy = "leave it out: the cache names its teacher by digest"
        raise InputError(f"--teacher {teacher}", expected=expected, got=got, remedy=remedy) from error


def check_key(index: CacheIndex, wanted: CacheKey) -> None:
    """Refuse a cache that belongs to something else.

    Raises:
        InputError: naming each part that differs.
    """
    difference = explain_mismatch(index.key, wanted)
    if difference is not None:
        expected, got = "a cache of this teacher, tokenizer, data and seq_len", f"another one ({difference})"
        remedy = "repeat the settings that it was made with, or make one for these with q4kd cache"
        raise InputError(str(index.folder / INDEX_FILE), expected=expected, got=got, remedy=remedy)
