"""A folder of cached teacher signals: the k most likely tokens of every position, and the mass of all others.

    cache.json             what it was made of, how it is laid out, and the digest of every finished shard
    signal-000000.safetensors, …   windows 0 to W - 1, W to 2 W - 1, …

A shard holds, for each of its windows ``[n, T]``:

    ids        uint16 or uint32 [n, T, k]   token ids, most likely first (uint16 where the vocabulary allows)
    log_probs  float16 [n, T, k]            log p of these tokens, over the student's rows of the vocabulary
    tail       float16 [n, T]               log of the probability of all others; minus infinity where none is left

so a position takes 4 k + 2 or 6 k + 2 bytes. float16 keeps log p to 2^-11 of itself; the reader makes each position
sum to one again, so that what rounding took from one token goes to all in proportion.

Every file is written whole or not at all; a shard counts when ``cache.json`` names it. A cache is hostile until it is
checked: sizes by ``cache.json``, contents by digest when a shard is first opened, ids and sums by the loss.
"""

import hashlib
import math
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from q4kd.trainer.errors import InputError
from q4kd.trainer.files import parse_json, read_bounded, write_atomic, write_json

CACHE_VERSION = 1
# Shards are cut so that one is about this large: few files, and little lost when writing is interrupted.
SHARD_BYTES = 64 << 20
_MAX_SHARD_BYTES = 1 << 30
_MAX_INDEX_BYTES = 64 << 20
_OPEN_SHARDS = 8


@dataclass(frozen=True)
class CacheKey:
    """What a cache belongs to: with any other value its signals would be wrong.

    Attributes:
        teacher_sha256: of the teacher's file.
        tokenizer_sha256: of the student's tokenizer files.
        data_sha256: of the windows' tokens and labels, packing included.
        rows: student's vocabulary rows, to which the teacher's logits were cut before softmax.
        seq_len: T.
        windows: how many windows there are.
    """

    teacher_sha256: str
    tokenizer_sha256: str
    data_sha256: str
    rows: int
    seq_len: int
    windows: int


@dataclass(frozen=True)
class Signal:
    """The teacher's distribution over k tokens and the tail at M positions.

    Attributes:
        ids_MK: int64 token ids.
        log_probs_MK: float32.
        tail_M: float32 log-probability of all other tokens.
    """

    ids_MK: Tensor
    log_probs_MK: Tensor
    tail_M: Tensor

    def to(self, device: torch.device) -> "Signal":
        """Return the signal on a device."""
        return Signal(self.ids_MK.to(device), self.log_probs_MK.to(device), self.tail_M.to(device))


def bytes_per_token(k: int, rows: int) -> int:
    """Return the bytes that a position takes on disk."""
    return k * (_id_dtype(rows).itemsize + 2) + 2


def _id_dtype(rows: int) -> torch.dtype:
    return torch.uint16 if rows <= 1 << 16 else torch.uint32


def windows_per_shard(k: int, rows: int, seq_len: int) -> int:
    """Return how many windows go into one shard."""
    return max(1, SHARD_BYTES // (seq_len * bytes_per_token(k, rows)))


def take_top(logits_MV: Tensor, k: int) -> Signal:
    """Return the k most likely tokens of each row and the mass of the others, computed in float32.

    Args:
        logits_MV: teacher logits over the student's rows, float ``[M, V]``.
        k: tokens kept, from 1 to V.
    """
    log_p_MV = torch.log_softmax(logits_MV.float(), -1)
    log_probs_MK, ids_MK = log_p_MV.topk(k, dim=-1)
    # Summed by itself: one minus the listed probabilities would lose a small tail to rounding.
    tail_M = log_p_MV.scatter_(1, ids_MK, -torch.inf).logsumexp(-1)
    return Signal(ids_MK, log_probs_MK, tail_M)


class CacheIndex:
    """``cache.json``: the key, the layout and the finished shards."""

    def __init__(self, folder: Path, key: CacheKey, k: int, shards: Mapping[str, dict[str, Any]]) -> None:
        self.folder, self.key, self.k = folder, key, k
        self.shards = dict(shards)
        self.windows_per_shard = windows_per_shard(k, key.rows, key.seq_len)

    @property
    def num_shards(self) -> int:
        """Shards of a complete cache."""
        return math.ceil(self.key.windows / self.windows_per_shard)

    @property
    def is_complete(self) -> bool:
        """Whether every shard is there."""
        return len(self.shards) == self.num_shards

    def name(self, shard: int) -> str:
        """Return a shard's file name."""
        return f"signal-{shard:06d}.safetensors"

    def windows_of(self, shard: int) -> range:
        """Return the windows that a shard holds."""
        start = shard * self.windows_per_shard
        return range(start, min(start + self.windows_per_shard, self.key.windows))

    def write_shard(self, shard: int, signal: Signal) -> None:
        """Write one shard and then name it in ``cache.json``.

        Args:
            shard: its number.
            signal: of all its windows in order, M = windows x T.

        Raises:
            OSError: when the folder cannot be written.
        """
        count = len(self.windows_of(shard))
        shape = (count, self.key.seq_len)
        tensors = {
            "ids": signal.ids_MK.to(_id_dtype(self.key.rows)).view(*shape, self.k).contiguous(),
            "log_probs": signal.log_probs_MK.half().view(*shape, self.k).contiguous(),
            "tail": signal.tail_M.half().view(shape).contiguous(),
        }
        path, data = self.folder / self.name(shard), save(tensors)
        write_atomic(path, data)
        self.shards[path.name] = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
        self.write()

    def write(self) -> None:
        """Write ``cache.json``."""
        document = {"version": CACHE_VERSION, "key": asdict(self.key), "k": self.k, "shards": self.shards}
        write_json(self.folder / "cache.json", document)


def read_index(folder: Path) -> CacheIndex:
    """Read ``cache.json``.

    Raises:
        InputError: when it is missing, damaged or of another version.
    """
    path = folder / "cache.json"
    document = parse_json(read_bounded(path, _MAX_INDEX_BYTES), str(path))
    try:
        key, k, shards = _parse(document)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(
            str(path), expected=f"cache version {CACHE_VERSION}", got=f"something else ({error})"[:120],
            remedy="make it anew with q4kd cache",
        ) from error  # fmt: skip
    index = CacheIndex(folder, key, k, shards)
    known = {index.name(number) for number in range(index.num_shards)}
    if not set(shards) <= known:
        stray = sorted(set(shards) - known)[0]
        raise InputError(str(path), expected="shards of this cache", got=repr(stray)[:60], remedy="make it anew")
    return index


def _parse(document: Any) -> tuple[CacheKey, int, dict[str, dict[str, Any]]]:
    if document["version"] != CACHE_VERSION:
        raise ValueError(f"version {document['version']!r}")
    key, k = CacheKey(**document["key"]), document["k"]
    for number in (key.rows, key.seq_len, key.windows, k):
        if type(number) is not int or not 0 < number < 1 << 40:
            raise ValueError(f"size {number!r}")
    if k > key.rows:
        raise ValueError(f"k {k} of {key.rows} rows")
    shards = {str(name): dict(shard) for name, shard in document["shards"].items()}
    for shard in shards.values():
        if type(shard["bytes"]) is not int or not 0 < shard["bytes"] <= _MAX_SHARD_BYTES:
            raise ValueError(f"shard of {shard['bytes']!r} bytes")
    return key, k, shards


def explain_mismatch(found: CacheKey, wanted: CacheKey) -> str | None:
    """Return which parts of two keys differ, or None."""
    theirs, ours = asdict(found), asdict(wanted)
    parts = [f"{name}: {_short(theirs[name])} → {_short(ours[name])}" for name in ours if theirs[name] != ours[name]]
    return "; ".join(parts) or None


def _short(value: object) -> str:
    return str(value)[:12]


class CacheReader:
    """Reads signals of windows in any order; the shards used last are kept open.

    Args:
        index: of a complete cache.

    Raises:
        InputError: when the cache is not complete.
    """

    def __init__(self, index: CacheIndex) -> None:
        if not index.is_complete:
            raise InputError(
                str(index.folder),
                expected=f"{index.num_shards} shards",
                got=f"{len(index.shards)}",
                remedy="finish it: run q4kd cache again with the same arguments",
            )
        self._index = index
        self._open: OrderedDict[int, dict[str, Tensor]] = OrderedDict()

    def read(self, windows: npt.NDArray[np.int64]) -> Signal:
        """Return the signal of whole windows, M = len(windows) x T, each position made to sum to one.

        Raises:
            InputError: when a shard is missing, changed or not what its name says.
        """
        per_shard = self._index.windows_per_shard
        parts = [(self._shard(int(window) // per_shard), int(window) % per_shard) for window in windows]
        ids = torch.cat([shard["ids"][place].long() for shard, place in parts])
        log_probs = torch.cat([shard["log_probs"][place].float() for shard, place in parts])
        tail = torch.cat([shard["tail"][place].float() for shard, place in parts])
        total = torch.logaddexp(log_probs.logsumexp(-1), tail)
        return Signal(ids, log_probs - total.unsqueeze(-1), tail - total)

    def _shard(self, number: int) -> dict[str, Tensor]:
        if number not in self._open:
            self._open[number] = self._load(number)
            if len(self._open) > _OPEN_SHARDS:
                self._open.popitem(last=False)
        self._open.move_to_end(number)
        return self._open[number]

    def _load(self, number: int) -> dict[str, Tensor]:
        index = self._index
        path = index.folder / index.name(number)
        data = read_bounded(path, index.shards[path.name]["bytes"])
        if hashlib.sha256(data).hexdigest() != index.shards[path.name].get("sha256"):
            raise _damaged(path, "the digest in cache.json", "a changed file")
        try:
            tensors = load(data)
        except (SafetensorError, ValueError) as error:
            raise _damaged(path, "safetensors", str(error)[:100]) from error
        shape = (len(index.windows_of(number)), index.key.seq_len)
        wanted = {
            "ids": (*shape, index.k, _id_dtype(index.key.rows)),
            "log_probs": (*shape, index.k, torch.float16),
            "tail": (*shape, torch.float16),
        }
        found = {name: (*tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
        if found != wanted:
            raise _damaged(path, str(wanted), str(found)[:200])
        return tensors


def _damaged(path: Path, expected: str, got: str) -> InputError:
    return InputError(
        str(path),
        expected=expected,
        got=got,
        remedy="delete the cache's folder and make it anew",
    )
