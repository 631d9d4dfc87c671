"""Faults in the teacher's cache: signals of other windows, of half a distribution, of another run, or not checked."""

import dataclasses
from collections.abc import Callable, Iterator, Sized
from pathlib import Path
from typing import TYPE_CHECKING

from q4kd.harness.runs.faults import Call, patch

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from q4kd.trainer.data.batch import Batch
    from q4kd.trainer.teacher.cache.reader import CacheReader
    from q4kd.trainer.teacher.cache.signal import TopKSignal
    from q4kd.trainer.teacher.cache.store import CacheIndex

_WRITER = "q4kd.trainer.teacher.cache.writer"
_PART = "q4kd.trainer.data.batch:Batch.__getitem__"
_READ = "q4kd.trainer.teacher.cache.reader:CacheReader.read"
_TOP = "q4kd.trainer.teacher.cache.signal:take_top"
_SIGNALS = f"{_WRITER}:_signals"
_CHECK_SHARD = "q4kd.trainer.teacher.cache.store:CacheIndex.check_shard"
_PER_SHARD = "q4kd.trainer.teacher.cache.store:windows_per_shard"
_CHECK_ARGUMENTS = "q4kd.trainer.cli.cache:_check_arguments"
_OPEN_INDEX = f"{_WRITER}:open_index"


@patch("loop", "cache-windows-written-shifted", "the cache holds the signals of the window after", _SIGNALS)
def _windows_written_shifted(
    original: Callable[..., Iterator["TopKSignal"]], teacher: object, windows: Sized, chosen: range, *rest: object
) -> Iterator["TopKSignal"]:
    last = len(windows) - 1
    for window in chosen:
        after = min(window + 1, last)
        yield from original(teacher, windows, range(after, after + 1), *rest)


@patch("loop", "cache-windows-read-shifted", "a step reads the signals of the window after", _READ)
def _windows_read_shifted(original: Call, self: "CacheReader", windows_B: "npt.NDArray[np.int64]") -> object:
    return original(self, (windows_B + 1) % self.index.key.windows)


@patch("loop", "micro-batches-read-first-windows", "every micro-batch reads the signals of the first one", _PART)
def _read_first_windows(original: Callable[..., "Batch"], self: "Batch", sequences: slice) -> "Batch":
    part = original(self, sequences)
    if self.windows_B is not None:
        object.__setattr__(part, "windows_B", self.windows_B[: len(part)])
    return part


@patch("loop", "cache-first-shard-only", "windows of later shards are read from the first one", _READ)
def _first_shard_only(original: Call, self: "CacheReader", windows_B: "npt.NDArray[np.int64]") -> object:
    return original(self, windows_B % self.index.windows_per_shard)


@patch("loss", "cache-tail-dropped", "the k listed tokens are made to sum to one", _TOP)
def _tail_dropped(original: Callable[..., "TopKSignal"], *arguments: object) -> "TopKSignal":
    signal = original(*arguments)
    log_probs = signal.log_probs_MK - signal.log_probs_MK.logsumexp(-1).unsqueeze(-1)
    return dataclasses.replace(signal, log_probs_MK=log_probs, tail_M=signal.tail_M.fill_(float("-inf")))


@patch("vocabulary", "cache-ids-truncated", "token ids lose all but their lowest byte", _TOP)
def _ids_truncated(original: Callable[..., "TopKSignal"], *arguments: object) -> "TopKSignal":
    signal = original(*arguments)
    return dataclasses.replace(signal, ids_MK=signal.ids_MK & 0xFF)


@patch(
    "dispatch",
    "cache-key-not-compared",
    "a cache of anything is taken",
    "q4kd.trainer.teacher.cache.cached_teacher:check_key",
)
def _key_not_compared(_original: Call, *_arguments: object) -> None:
    return


@patch("checkpoint", "cache-digest-not-checked", "a shard is read without comparing its digest", _CHECK_SHARD)
def _digest_not_checked(_original: Call, self: "CacheIndex", shard: int) -> Path:
    return self.folder / self.name(shard)


@patch("checkpoint", "cache-starts-over", "a writer that is started again computes everything anew", _OPEN_INDEX)
def _starts_over(original: Callable[..., "CacheIndex"], *arguments: object) -> "CacheIndex":
    index = original(*arguments)
    index.shards.clear()  # forgets what was finished
    return index


@patch(
    "dispatch", "cache-options-unchecked", "a cache is made with any number of tokens and any size", _CHECK_ARGUMENTS
)
def _options_unchecked(_original: Call, *_arguments: object) -> None:
    return


@patch("loop", "cache-shards-too-large", "a shard takes a window more than fits", _PER_SHARD)
def _shards_too_large(original: Callable[..., int], *arguments: int) -> int:
    return original(*arguments) + 1
