"""Faults in the teacher's cache: signals of other windows, of half a distribution, of another run, or not checked."""

import dataclasses
from collections.abc import Callable
from typing import Any

from q4kd.harness.sabotage.registry import declare, replace

_STORE, _WRITER, _TEACHER = "q4kd.trainer.cache_store", "q4kd.trainer.cache_writer", "q4kd.trainer.cached_teacher"
_READ = "q4kd.trainer.cache_reader:CacheReader.read"
_TOP = "q4kd.trainer.cache_signal:take_top"
_Call = Callable[..., Any]


def _windows_written_shifted() -> None:
    """Compute the signals of each window's successor."""

    def make(original: _Call) -> _Call:
        def signals(teacher: Any, windows: Any, chosen: range, *rest: Any) -> Any:
            last = len(windows) - 1
            for window in chosen:
                after = min(window + 1, last)
                yield from original(teacher, windows, range(after, after + 1), *rest)

        return signals

    replace(f"{_WRITER}:_signals", make)


def _windows_read_shifted() -> None:
    def make(original: _Call) -> _Call:
        def read(self: Any, windows_B: Any) -> Any:
            return original(self, (windows_B + 1) % self.index.key.windows)

        return read

    replace(_READ, make)


def _top_changed(change: Callable[[Any], Any]) -> None:
    replace(_TOP, lambda original: lambda *arguments: change(original(*arguments)))


def _tail_dropped() -> None:
    def renormalise(signal: Any) -> Any:
        total = signal.log_probs_MK.logsumexp(-1)
        log_probs = signal.log_probs_MK - total.unsqueeze(-1)
        return dataclasses.replace(signal, log_probs_MK=log_probs, tail_M=signal.tail_M.fill_(float("-inf")))

    _top_changed(renormalise)


def _ids_truncated() -> None:
    _top_changed(lambda signal: dataclasses.replace(signal, ids_MK=signal.ids_MK & 0xFF))


def _key_not_compared() -> None:
    replace(f"{_TEACHER}:check_key", lambda _original: lambda *_arguments: None)


def _digest_not_checked() -> None:
    replace(f"{_STORE}:CacheIndex.check_shard", lambda _original: lambda self, shard: self.folder / self.name(shard))


def _starts_over() -> None:
    """Forget the finished shards of a cache that was begun."""

    def make(original: _Call) -> _Call:
        def open_index(*arguments: Any) -> Any:
            index = original(*arguments)
            index.shards.clear()
            return index

        return open_index

    replace(f"{_WRITER}:open_index", make)


declare(
    "loop",
    "cache-windows-written-shifted",
    "the cache holds the signals of the window after",
    _windows_written_shifted,
    f"{_WRITER}:_signals",
)
declare(
    "loop", "cache-windows-read-shifted", "a step reads the signals of the window after", _windows_read_shifted, _READ
)
declare("loss", "cache-tail-dropped", "the k listed tokens are made to sum to one", _tail_dropped, _TOP)
declare("vocabulary", "cache-ids-truncated", "token ids lose all but their lowest byte", _ids_truncated, _TOP)
declare(
    "dispatch", "cache-key-not-compared", "a cache of anything is taken", _key_not_compared, f"{_TEACHER}:check_key"
)
declare(
    "checkpoint",
    "cache-digest-not-checked",
    "a shard is read without comparing its digest",
    _digest_not_checked,
    f"{_STORE}:CacheIndex.check_shard",
)
declare(
    "checkpoint",
    "cache-starts-over",
    "a writer that is started again computes everything anew",
    _starts_over,
    f"{_WRITER}:open_index",
)
