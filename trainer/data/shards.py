"""Binary data files: parquet by pyarrow, token shards by numpy and safetensors. Sizes are checked before use."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from tokenize import TokenError
from typing import Any

from q4kd.trainer.data.sources.account import SourceAccount
from q4kd.trainer.errors import InputError

# This bounds a parquet row group once decompressed, as the file states it; one group is in memory at a time.
MAX_ROW_GROUP_BYTES = 2 << 30
_ROWS = 256
MAX_ROW_BYTES = 64 << 20
_HEADER_BYTES = 64 << 20


def _bad(path: Path, expected: str, got: object, remedy: str = "write the file again") -> InputError:
    said = " ".join(str(got).split())[:120] or type(got).__name__
    return InputError(str(path), expected=expected, got=said, remedy=remedy)


def _without_null(value: Any) -> Any:
    """Return a value without the fields that are null: parquet gives every object the fields of all the others."""
    if isinstance(value, dict):
        return {key: _without_null(part) for key, part in value.items() if part is not None}
    return [_without_null(part) for part in value] if isinstance(value, list) else value


def read_parquet(
    path: Path, columns: tuple[str, ...], read: tuple[str, ...], account: SourceAccount
) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Yield ``(row, record)`` of a parquet file, rows counted from 1, with those of the columns that the file has.

    Args:
        path: the file.
        columns: columns that hold a document; the file must have one.
        read: all columns that are read.
        account: is told of the other columns.

    Raises:
        InputError: when it is no parquet file, has none of the columns, or a row group is too large.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path, thrift_string_size_limit=_HEADER_BYTES, thrift_container_size_limit=1 << 20) as file:
            names = file.schema_arrow.names
            if not set(columns).intersection(names):
                remedy = "rename a column, or name it with --text-field or --messages-field"
                raise _bad(path, f"a column named {' or '.join(columns)}", ", ".join(names) or "none", remedy)
            present = [name for name in dict.fromkeys(read) if name in names]
            account.pass_over(set(names).difference(present))
            for group in range(file.num_row_groups):
                size = file.metadata.row_group(group).total_byte_size
                if not 0 <= size <= MAX_ROW_GROUP_BYTES:
                    raise _bad(path, f"row groups of at most {MAX_ROW_GROUP_BYTES} bytes", f"{size} in group {group}")
            row = 0
            for batch in file.iter_batches(batch_size=_ROWS, columns=present, use_threads=False):
                for record in batch.to_pylist():
                    row += 1
                    yield row, _without_null(record)
    except (pa.ArrowException, OverflowError, UnicodeDecodeError) as error:
        raise _bad(path, "a parquet file", error) from error


def read_shard(path: Path, read: tuple[str, ...], account: SourceAccount) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Yield ``(row, {"input_ids"[, "labels", …]})`` of a token shard, rows counted from 1.

    A ``.npy`` holds integers ``[n]`` (one document) or ``[rows, n]``; a ``.safetensors`` holds such a tensor
    ``input_ids`` and, if wanted, others of the same shape: ``labels``, masks and what else is ``read``.

    Raises:
        InputError: when the file is damaged or holds something else.
    """
    arrays = dict(_open_npy(path) if path.suffix.lower() == ".npy" else _open_safetensors(path, read, account))
    ids = arrays.get("input_ids")
    if ids is None or any(array.shape != ids.shape for array in arrays.values()):
        raise _bad(path, "input_ids, and labels of the same shape", ", ".join(arrays) or "no tensor")
    if ids.ndim not in (1, 2) or ids.dtype.kind not in "iu":
        raise _bad(path, "integers [n] or [rows, n]", f"{ids.dtype} {ids.shape}")
    if ids.ndim == 1 and ids.nbytes > MAX_ROW_BYTES:
        expected, remedy = f"a document of at most {MAX_ROW_BYTES} bytes", "save it as [rows, n], a document a row"
        raise _bad(path, expected, f"{ids.nbytes} bytes in {ids.dtype} {ids.shape}", remedy)
    if ids.ndim == 1:
        yield 1, arrays
        return
    for row in range(len(ids)):
        yield row + 1, {name: array[row] for name, array in arrays.items()}


def _open_npy(path: Path) -> Mapping[str, Any]:
    import numpy as np

    try:
        return {"input_ids": np.load(path, mmap_mode="r", allow_pickle=False)}
    except (ValueError, EOFError, OverflowError, TypeError, SyntaxError, TokenError, MemoryError) as error:
        raise _bad(path, "a .npy array of integers", error) from error


def _open_safetensors(path: Path, read: tuple[str, ...], account: SourceAccount) -> Mapping[str, Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            names = set(file.keys())
            account.pass_over(names.difference(read))
            return {name: file.get_tensor(name) for name in dict.fromkeys(read) if name in names}
    except (SafetensorError, TypeError, ValueError) as error:
        raise _bad(path, "a safetensors file", error) from error
