"""The metadata of a GGUF: scalars and texts as they are, arrays by where they lie, decoded when they are asked for.

A vocabulary holds hundreds of thousands of strings, and most commands look at none of them.
"""

import array
import struct
from collections.abc import Callable, Iterator, Sequence
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from q4kd.trainer.errors import InputError

STRING, ARRAY = 8, 9
# Codes of the format's document: a scalar's layout for ``struct``, and for NumPy.
SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_DTYPES = {kind: np.dtype(form.replace("?", "u1")) for kind, form in SCALARS.items()}
_BOOL = 7
_LENGTH = struct.Struct("<Q")


class MetadataArray(Sequence[Any]):
    """The entries of an array, all decoded when the first one is asked for.

    Args:
        count: number of entries.
        kind: what they are: "strings", "numbers" or "truth values".
        stored: uint8 ``[bytes]``, the entries as they lie in the file.
        decode: function that returns them.
    """

    def __init__(self, count: int, kind: str, stored: npt.NDArray[np.uint8], decode: Callable[[], list[Any]]) -> None:
        self._count, self._kind, self._stored, self._decode = count, kind, stored, decode
        self._decoded: list[Any] | None = None

    @property
    def holds_strings(self) -> bool:
        """Return whether the entries are strings."""
        return self._kind == "strings"

    def is_same(self, other: "MetadataArray") -> bool:
        """Return whether two arrays are stored alike; nothing is decoded."""
        return (self._count, self._kind) == (other._count, other._kind) and np.array_equal(self._stored, other._stored)

    def _entries(self) -> list[Any]:
        if self._decoded is None:
            self._decoded = self._decode()
        return self._decoded

    @overload
    def __getitem__(self, index: int) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> list[Any]: ...
    def __getitem__(self, index: int | slice) -> Any:
        return self._entries()[index]

    def __iter__(self) -> Iterator[Any]:
        return iter(self._entries())

    def __len__(self) -> int:
        return self._count

    def __repr__(self) -> str:
        return f"an array of {self._count} {self._kind}"


def numbers(data: npt.NDArray[np.uint8], start: int, count: int, kind: int) -> MetadataArray:
    """Return the array of ``count`` numbers or truth values of a scalar ``kind`` that begins at ``start``."""
    dtype = _DTYPES[kind]
    stored = data[start : start + count * dtype.itemsize]

    def decode() -> list[Any]:
        found = stored.view(dtype)
        return list((found != 0).tolist() if kind == _BOOL else found.tolist())

    return MetadataArray(count, "truth values" if kind == _BOOL else "numbers", stored, decode)


def strings(subject: str, data: npt.NDArray[np.uint8], start: int, ends: npt.NDArray[np.uint32]) -> MetadataArray:
    """Return an array of strings whose first length lies at ``start``; ``ends`` says where each string ends.

    Decoding raises ``InputError`` for a string that is not UTF-8.
    """

    stored = data[start : int(ends[-1]) if len(ends) else start]

    def decode() -> list[Any]:
        stops = ends.tolist()
        whole, begins = stored.tobytes(), [start, *stops[:-1]]
        try:
            return [whole[a + 8 - start : b - start].decode() for a, b in zip(begins, stops, strict=False)]
        except UnicodeDecodeError as error:
            remedy = "convert the model again"
            raise InputError(subject, expected="strings in UTF-8", got=str(error.reason), remedy=remedy) from error

    return MetadataArray(len(ends), "strings", stored, decode)


def string_ends(data: memoryview, start: int, count: int) -> npt.NDArray[np.uint32]:
    """Return where each of ``count`` strings ends, the first of whose lengths lies at ``start``.

    Each begins where the one before it ends, so this is the one loop over a vocabulary: 0.25 µs a string.

    Raises:
        ValueError: when one does not end within ``data``, of at most 4 GiB.
    """
    length, at, ends = _LENGTH.unpack_from, start, array.array("I")
    append, limit = ends.append, len(data)
    try:
        for _ in range(count):
            at += 8 + length(data, at)[0]
            append(at)
    except (struct.error, OverflowError, IndexError):
        at = limit + 1
    if at > limit:
        raise ValueError(f"one that does not end within {limit} bytes")
    return np.frombuffer(ends, np.uint32) if count else np.zeros(0, np.uint32)
