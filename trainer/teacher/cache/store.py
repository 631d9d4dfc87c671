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
checked: sizes against ``cache.json``, contents by digest when a shard is first opened, and ids (in range and different
within a position) and sums when they are read. Shards are mapped, so windows in random order cost only their own bytes.
"""

import hashlib
import math
import typing
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from q4kd.trainer.errors import InputError
from q4kd.trainer.files import FieldKind, check_fields, parse_json, read_bounded, sha256_file, write_atomic, write_json
from q4kd.trainer.teacher.cache.signal import TopKSignal

CACHE_VERSION = 1
INDEX_FILE = "cache.json"
# A shard is about this large, so that files are few and little is lost when writing is interrupted.
SHARD_BYTES = 64 << 20
_MAX_SHARD_BYTES = 1 << 30
_MAX_INDEX_BYTES = 64 << 20
_MAX_SHARDS = 1 << 20


@dataclass(frozen=True)
class CacheKey:
    """What a cache belongs to: with any other value its signals would be wrong."""

    teacher_sha256: str  # digest of the teacher's file
    tokenizer_sha256: str  # digest of the student tokenizer's token -> id map
    data_sha256: str  # digest of the training tokens, the borders of documents, and which tokens have a label
    rows: int  # the student's vocabulary rows, to which the teacher's logits were cut before softmax
    seq_len: int  # T
    windows: int  # number of windows
    packing: str  # how documents were put into windows


def bytes_per_token(k: int, rows: int) -> int:
    """Return the bytes that a position takes on disk."""
    return k * (id_dtype(rows).itemsize + 2) + 2


def id_dtype(rows: int) -> torch.dtype:
    """Return the type of token ids on disk."""
    return torch.uint16 if rows <= 1 << 16 else torch.uint32


def windows_per_shard(k: int, rows: int, seq_len: int, shard_bytes: int = SHARD_BYTES) -> int:
    """Return how many windows go into one shard."""
    return max(1, shard_bytes // (seq_len * bytes_per_token(k, rows)))


class CacheIndex:
    """``cache.json``: the key, the layout and the finished shards.

    Args:
        folder: folder of the cache.
        key: what it belongs to.
        k: listed tokens of a position.
        shards: ``{file name: {"sha256", "bytes", "tail_mass"}}`` of those that are finished.
        per_shard: windows of a shard; 0 chooses.
    """

    def __init__(
        self, folder: Path, key: CacheKey, k: int, shards: Mapping[str, dict[str, Any]], per_shard: int = 0
    ) -> None:
        self.folder, self.key, self.k = folder, key, k
        self.shards = dict(shards)
        self.windows_per_shard = per_shard or windows_per_shard(k, key.rows, key.seq_len)

    @property
    def num_shards(self) -> int:
        """Shards of a complete cache."""
        return math.ceil(self.key.windows / self.windows_per_shard)

    @property
    def is_complete(self) -> bool:
        """Return whether every shard is there."""
        return len(self.shards) == self.num_shards

    def name(self, shard: int) -> str:
        """Return a shard's file name."""
        return f"signal-{shard:06d}.safetensors"

    def windows_of(self, shard: int) -> range:
        """Return the windows that a shard holds."""
        start = shard * self.windows_per_shard
        return range(start, min(start + self.windows_per_shard, self.key.windows))

    @property
    def num_bytes(self) -> int:
        """Bytes of a complete cache, headers apart."""
        return self.key.windows * self.key.seq_len * bytes_per_token(self.k, self.key.rows)

    @property
    def kept_bytes(self) -> int:
        """Bytes of the finished shards."""
        return sum(shard["bytes"] for shard in self.shards.values())

    @property
    def tail_mass(self) -> float:
        """Mean probability outside the k listed tokens, over the finished shards."""
        counts = {self.name(number): len(self.windows_of(number)) for number in range(self.num_shards)}
        done = sum(counts[name] for name in self.shards)
        return float(sum(counts[name] * shard["tail_mass"] for name, shard in self.shards.items())) / max(1, done)

    def write_shard(self, shard: int, signal: TopKSignal) -> None:
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
            "ids": signal.ids_MK.to(id_dtype(self.key.rows)).view(*shape, self.k).contiguous(),
            "log_probs": signal.log_probs_MK.half().view(*shape, self.k).contiguous(),
            "tail": signal.tail_M.half().view(shape).contiguous(),
        }
        path, data = self.folder / self.name(shard), save(tensors)
        write_atomic(path, data)
        self.shards[path.name] = {
            "sha256": hashlib.sha256(data).hexdigest(),
            "bytes": len(data),
            "tail_mass": float(signal.tail_M.double().exp().mean()),
        }
        self.write()

    def write(self) -> None:
        """Write ``cache.json``."""
        document = {"version": CACHE_VERSION, "key": asdict(self.key), "k": self.k, "shards": self.shards}
        write_json(self.folder / INDEX_FILE, document | {"windows_per_shard": self.windows_per_shard})

    def check_shard(self, shard: int) -> Path:
        """Return the path of a finished shard whose size and digest are those of ``cache.json``.

        Raises:
            InputError: when it is missing or was changed.
        """
        path = self.folder / self.name(shard)
        entry = self.shards[path.name]
        try:
            same = path.stat().st_size == entry["bytes"] and sha256_file(path) == entry["sha256"]
        except OSError as error:
            raise damaged(path, "a readable shard", str(error.strerror)) from error
        if not same:
            raise damaged(path, f"the size and digest in {INDEX_FILE}", "a changed file")
        return path


def read_index(folder: Path) -> CacheIndex:
    """Read ``cache.json``.

    Raises:
        InputError: when it is missing, damaged or of another version.
    """
    path = folder / INDEX_FILE
    document = parse_json(read_bounded(path, _MAX_INDEX_BYTES), str(path))
    try:
        return _parse(folder, document)
    except ValueError as error:
        raise damaged(path, f"cache version {CACHE_VERSION}", f"something else ({error})"[:120]) from error


def _parse(folder: Path, document: object) -> CacheIndex:
    kinds: dict[str, FieldKind] = {"version": CACHE_VERSION, "key": dict, "k": int, "windows_per_shard": int}
    fields = check_fields(document, kinds | {"shards": dict})
    key = CacheKey(**check_fields(fields["key"], typing.get_type_hints(CacheKey)))
    k, per_shard, shards = fields["k"], fields["windows_per_shard"], fields["shards"]
    for number in (key.rows, key.seq_len, key.windows, k, per_shard):
        if not 0 < number < 1 << 40:
            raise ValueError(f"size {number!r}")
    if k > key.rows:
        raise ValueError(f"k {k} of {key.rows} rows")
    if -(-key.windows // per_shard) > _MAX_SHARDS:
        raise ValueError(f"{key.windows} windows in shards of {per_shard}")
    for shard in shards.values():
        size = check_fields(shard, {"sha256": str, "bytes": int, "tail_mass": float})["bytes"]
        if not 0 < size <= _MAX_SHARD_BYTES:
            raise ValueError(f"shard of {size!r} bytes")
    index = CacheIndex(folder, key, k, shards, per_shard)
    for stray in sorted(shards.keys() - {index.name(number) for number in range(index.num_shards)}):
        raise ValueError(f"a shard of another cache, {stray[:60]!r}")
    return index


def explain_mismatch(found: CacheKey, wanted: CacheKey) -> str | None:
    """Return which parts of two keys differ, or None."""
    pairs = [(name, theirs, getattr(wanted, name)) for name, theirs in asdict(found).items()]
    parts = [f"{name}: {theirs!s:.12} → {ours!s:.12}" for name, theirs, ours in pairs if theirs != ours]
    return "; ".join(parts) or None


def damaged(path: Path, expected: str, got: str) -> InputError:
    """Return the refusal of a shard or of the index."""
    return InputError(str(path), expected=expected, got=got, remedy="delete the cache's folder and make it anew")
