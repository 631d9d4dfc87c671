"""Reads an importance matrix as llama.cpp's ``llama-imatrix`` writes it: a GGUF of mean squared activations.

For each weight matrix ``NAME`` it holds ``NAME.in_sum2``, float32 ``[cols]``, the squares of what the matrix was
multiplied by, summed over tokens, and ``NAME.counts``, their number. A squared error of column j's weights counts
``in_sum2[j] / counts`` times.
"""

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from q4kd.trainer.errors import InputError
from q4kd.trainer.formats.blocks.layout import GGML_TYPES
from q4kd.trainer.formats.gguf.header import Header, TensorEntry, read_header
from q4kd.trainer.mapped import MappedFile

Importance = Mapping[str, npt.NDArray[np.float32]]
_SUMS, _COUNTS = ".in_sum2", ".counts"
_REMEDY = "make it again: llama-imatrix -m MODEL.gguf -f TEXT -o imatrix.gguf"


def read_importance(path: Path) -> dict[str, npt.NDArray[np.float32]]:
    """Return the importance of each column by the name of the matrix, float32 ``[cols]``.

    A matrix that no token reached weighs its columns alike, as in llama.cpp.

    Raises:
        InputError: for a file that is no importance matrix, for one of experts, for sums without a count, and for
            values that are not finite or negative.
    """
    data = MappedFile(path).data
    header = read_header(path, data)
    kind = header.metadata.get("general.type")
    if kind != "imatrix":
        expected = "an importance matrix as GGUF (general.type imatrix)"
        raise InputError(str(path), expected=expected, got=f"general.type {kind!r}"[:80], remedy=_REMEDY)
    entries = {entry.name: entry for entry in header.tensors}
    found = {}
    for name, entry in entries.items():
        if name.endswith(_SUMS):
            matrix = name.removesuffix(_SUMS)
            counts = entries.get(matrix + _COUNTS)
            if counts is None or math.prod(counts.shape) != 1 or math.prod(entry.shape) != entry.shape[-1]:
                expected, got = "one row of sums and one count", "none" if counts is None else f"{entry.shape}"
                raise InputError(f"{path}: {matrix}", expected=expected, got=got, remedy="use a dense model's matrix")
            count, sums = _values(path, counts, header, data), _values(path, entry, header, data)
            _refuse_values(f"{path}: count of {matrix}", count)
            with np.errstate(over="ignore", invalid="ignore"):  # what comes of it is refused as not finite
                found[matrix] = sums / count if count[0] > 0 else np.ones_like(sums)
            _refuse_values(f"{path}: {matrix}", found[matrix])
    if not found:
        raise InputError(str(path), expected=f"tensors that end in {_SUMS}", got="none", remedy=_REMEDY)
    return found


def _values(path: Path, entry: TensorEntry, header: Header, data: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """Return a copy of a float32 tensor."""
    subject, start = f"{path}: tensor {entry.name}", header.data_start + entry.offset
    end = start + 4 * math.prod(entry.shape)
    if GGML_TYPES.get(entry.type_id) != "F32":
        got = GGML_TYPES.get(entry.type_id, f"type number {entry.type_id}")
        raise InputError(subject, expected="type F32", got=got, remedy=_REMEDY)
    if end > len(data):
        expected, got = f"an end within the file's {len(data)} bytes", f"byte {end}"
        raise InputError(subject, expected=expected, got=got, remedy="copy the file again: it is truncated or damaged")
    return np.frombuffer(data[start:end].tobytes(), "<f4").astype(np.float32)


def _refuse_values(subject: str, values: npt.NDArray[np.float32]) -> None:
    bad = int(np.count_nonzero(~(np.isfinite(values) & (values >= 0))))
    if bad:
        got = f"{bad} of {values.size} that are not"
        raise InputError(subject, expected="finite numbers, none negative", got=got, remedy=_REMEDY)


def importance_of(importance: Importance | None, name: str, cols: int) -> npt.NDArray[np.float32] | None:
    """Return a matrix's importances ``[cols]``, or None where there are none.

    Raises:
        InputError: when they are of another number of columns.
    """
    values = None if importance is None else importance.get(name)
    if values is not None and values.shape != (cols,):
        expected, remedy = f"{cols} columns", "use the importance matrix of this model"
        raise InputError(f"importance of {name}", expected=expected, got=str(len(values)), remedy=remedy)
    return values
