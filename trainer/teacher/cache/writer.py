"""``q4kd cache``: the frozen teacher over every training window, in canonical order, into shards that can be resumed.

Logits exist for one chunk of tokens at a time. A shard is written whole, so a killed run loses at most the one that it
was computing.
"""

import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from q4kd.trainer.data.batch import Batch
from q4kd.trainer.data.packing import Windows
from q4kd.trainer.device.memory_report import sized
from q4kd.trainer.errors import InputError, RunFolderError
from q4kd.trainer.teacher.cache.cached_teacher import check_key
from q4kd.trainer.teacher.cache.signal import TopKSignal, take_top
from q4kd.trainer.teacher.cache.store import INDEX_FILE, CacheIndex, CacheKey, read_index, windows_per_shard
from q4kd.trainer.teacher.teacher import Teacher

_SAY_EVERY_S = 5.0
# Beside the shards, the disk holds cache.json and a temporary copy of a shard.
_DISK_MARGIN = 1.01


@dataclass(frozen=True)
class Pass:
    """How the teacher goes over the windows."""

    batch_size: int  # windows of one forward pass
    chunk: int  # tokens whose logits exist at one time
    device: torch.device  # where windows are put


def open_index(folder: Path, key: CacheKey, k: int, shard_bytes: int) -> CacheIndex:
    """Return the cache of a folder to go on with, or a new one; what a killed writer left half written is removed.

    Finished shards are checked by digest; those that are missing or damaged are forgotten, and so made anew.

    Raises:
        InputError: when the folder holds a cache of another key or k, or shards without an index.
    """
    if not (folder / INDEX_FILE).is_file():
        if (found := next(folder.glob("signal-*"), None)) is not None:
            got, remedy = "shards without their index", "choose another --out, or move them away"
            raise InputError(str(found), expected=f"no shard where {INDEX_FILE} is not", got=got, remedy=remedy)
        return CacheIndex(folder, key, k, {}, windows_per_shard(k, key.rows, key.seq_len, shard_bytes))
    index = read_index(folder)
    check_key(index, key)
    # The index is proof that these are a writer's own.
    for path in [*folder.glob(".signal-*.tmp"), *folder.glob(f".{INDEX_FILE}.*.tmp")]:
        path.unlink()
    if index.k != k:
        expected, remedy = f"k of the cache in {folder}: {index.k}", "choose another --out"
        raise InputError(f"--k {k}", expected=expected, got=str(k), remedy=remedy)
    for shard in range(index.num_shards):
        if index.name(shard) in index.shards:
            try:
                index.check_shard(shard)
            except InputError:
                print(f"cache: {index.name(shard)} is damaged or missing: made anew", flush=True)
                del index.shards[index.name(shard)]
    return index


def check_disk(index: CacheIndex) -> None:
    """Raise InputError, with the arithmetic, when the disk has no room for what is missing."""
    missing = int(_DISK_MARGIN * (index.num_bytes - index.kept_bytes))
    free = shutil.disk_usage(index.folder).free
    if missing > free:
        tokens, remedy = index.key.windows * index.key.seq_len, "choose a smaller --k, less data or another disk"
        expected = f"{sized(missing)} of free disk ({tokens:,} tokens, k {index.k})"
        raise InputError(f"--out {index.folder}", expected=expected, got=sized(free), remedy=remedy)


def write_cache(index: CacheIndex, teacher: Teacher, windows: Windows, how: Pass) -> None:
    """Compute and write every shard that is not there yet.

    Raises:
        RunFolderError: when the folder cannot be written; the finished shards are kept.
    """
    todo = [shard for shard in range(index.num_shards) if index.name(shard) not in index.shards]
    say = _progress(index, sum(len(index.windows_of(shard)) for shard in todo))
    try:
        index.write()
        for shard in todo:
            index.write_shard(shard, _join(_signals(teacher, windows, index.windows_of(shard), index, how, say)))
    except OSError as error:
        raise RunFolderError(
            f"{index.folder} cannot be written ({error.strerror}); {len(index.shards)} of {index.num_shards} shards "
            "are kept: free some space where that is the cause, and run the same command again"
        ) from error


def _signals(
    teacher: Teacher, windows: Windows, chosen: range, index: CacheIndex, how: Pass, say: Callable[[int], None]
) -> Iterator[TopKSignal]:
    """Yield the signals of some windows in order, on the host."""
    for start in range(chosen.start, chosen.stop, how.batch_size):
        numbers = np.arange(start, min(start + how.batch_size, chosen.stop))
        batch = Batch.stack([windows[int(number)] for number in numbers]).to(how.device)
        hidden_MH = teacher.hidden_of(batch).flatten(0, 1)
        for hidden_CH in torch.split(hidden_MH, how.chunk):
            logits_CV = teacher.head_logits(hidden_CH)[:, : index.key.rows]
            yield take_top(logits_CV, index.k).to(torch.device("cpu"))
        say(len(numbers))


def _join(parts: Iterator[TopKSignal]) -> TopKSignal:
    columns = zip(*((part.ids_MK, part.log_probs_MK, part.tail_M) for part in parts), strict=True)
    return TopKSignal(*map(torch.cat, columns))


def _progress(index: CacheIndex, total: int) -> Callable[[int], None]:
    """Return a function that takes the number of windows just done and prints the progress every five seconds."""
    started = last = time.monotonic()
    done = 0

    def say(count: int) -> None:
        nonlocal done, last
        done += count
        now = time.monotonic()
        if now - last < _SAY_EVERY_S:
            return
        last, rate = now, done / (now - started)
        print(
            f"cache: {done:,} of {total:,} windows, {len(index.shards)} of {index.num_shards} shards, "
            f"{sized(index.kept_bytes)}, {rate * index.key.seq_len:.0f} tok/s, "
            f"about {(total - done) / rate:.0f} s left",
            flush=True,
        )

    return say
