"""The joined tokens of a corpus, in memory while they are few, beyond that in a mapped file without a name."""

import hashlib
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from q4kd.trainer.data.encoding import Encoded

# This many bytes of tokens are held in memory before they go to the file.
SPILL_BYTES = 256 << 20
_HASHED = 1 << 24


@dataclass(frozen=True)
class TokenSet:
    """Tokens of all documents of one split.

    Attributes:
        ids: int32 ``[n]``.
        offsets: int64 ``[documents + 1]``: where each document begins, and n.
        learnt: bool ``[n]``, whether a token may be a label; None where all may.
    """

    ids: npt.NDArray[np.int32]
    offsets: npt.NDArray[np.int64]
    learnt: npt.NDArray[np.bool_] | None = None

    @classmethod
    def join(cls, documents: Iterable[Encoded]) -> "TokenSet":
        """Join documents in memory."""
        writer = TokenWriter(None)
        for document in documents:
            writer.add(document)
        return writer.finish()

    @property
    def num_documents(self) -> int:
        """Number of documents with at least one token."""
        return len(self.offsets) - 1

    @cached_property
    def sha256(self) -> str:
        """Digest of tokens, borders and what is learnt, computed once: every checkpoint states it."""
        digest = hashlib.sha256()
        for array in (self.ids, self.offsets, self.learnt):
            digest.update(b"none" if array is None else f"{array.dtype} {len(array)}".encode())
            for start in range(0, 0 if array is None else len(array), _HASHED):
                assert array is not None
                digest.update(np.ascontiguousarray(array[start : start + _HASHED]).tobytes())
        return digest.hexdigest()


class _Column:
    """One growing array, in pieces in memory and then in a mapped file."""

    def __init__(self, dtype: npt.DTypeLike, folder: Path | None) -> None:
        self._dtype, self._folder = np.dtype(dtype), folder
        self._pieces: list[npt.NDArray[Any]] = []
        self._held = self.length = 0
        self._file: Any = None

    def add(self, piece: npt.NDArray[Any]) -> None:
        self._pieces.append(piece.astype(self._dtype, copy=False))
        self._held += self._pieces[-1].nbytes
        self.length += len(piece)
        if self._folder is not None and self._held > SPILL_BYTES:
            self._spill()

    def _spill(self) -> None:
        if self._file is None:
            assert self._folder is not None
            self._folder.mkdir(parents=True, exist_ok=True)
            # The file has no name: it is gone with this process, however that ends.
            self._file = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115
        for piece in self._pieces:
            self._file.write(piece.tobytes())
        self._pieces, self._held = [], 0

    def finish(self) -> npt.NDArray[Any]:
        if self._file is None:
            return np.concatenate([np.zeros(0, self._dtype), *self._pieces])
        self._spill()
        self._file.flush()
        return np.memmap(self._file, self._dtype, mode="r", shape=(self.length,))


class TokenWriter:
    """Collects documents into a ``TokenSet`` within bounded memory.

    Args:
        folder: folder of the file for tokens past ``SPILL_BYTES``; None keeps all in memory.
    """

    def __init__(self, folder: Path | None) -> None:
        self._ids, self._learnt = _Column(np.int32, folder), _Column(np.bool_, folder)
        self._lengths: list[int] = []
        self._masked = False

    @property
    def num_tokens(self) -> int:
        """Number of tokens so far."""
        return self._ids.length

    def add(self, document: Encoded) -> None:
        """Append a document; one without tokens is left out."""
        count = len(document.ids)
        if not count:
            return
        if document.learnt is not None and not self._masked:
            self._masked = True
            self._learnt.add(np.ones(self._ids.length, np.bool_))
        self._ids.add(document.ids)
        self._lengths.append(count)
        if self._masked:
            self._learnt.add(np.ones(count, np.bool_) if document.learnt is None else document.learnt)

    def finish(self) -> TokenSet:
        """Return what was collected."""
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(np.array(self._lengths, np.int64))])
        return TokenSet(self._ids.finish(), offsets, self._learnt.finish() if self._masked else None)
