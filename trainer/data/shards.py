"""Binary data files: parquet by pyarrow, token shards by numpy and safetensors. Sizes are checked before use."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from q4kd.trainer.errors import InputError

# This bounds a parquet row group once decompressed, as the file states it; one group is in memory at a time.
MAX_ROW_GROUP_BYTES = 2 << 30
_ROWS = 256
_HEADER_BYTES = 64 << 20


def _bad(path: Path, expected: str, got: object) -> InputError:
    return InputError(str(path), expected=expected, got=str(got).splitlines()[0][:120], remedy="write the file again")


def read_parquet(path: Path, columns: tuple[str, ...]) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Yield ``(row, record)`` of a parquet file, rows counted from 1, with those of the columns that the file has.

    Raises:
        InputError: when it is no parquet file, has none of the columns, or a row group is too large.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path, thrift_string_size_limit=_HEADER_BYTES, thrift_container_size_limit=1 << 20) as file:
            present = [name for name in columns if name in file.schema_arrow.names]
            if not present:
                names = ", ".join(file.schema_arrow.names)
                raise _bad(path, f"a column named {' or '.join(columns)}", names or "none")
            for group in range(file.num_row_groups):
                size = file.metadata.row_group(group).total_byte_size
                if not 0 <= size <= MAX_ROW_GROUP_BYTES:
                    raise _bad(path, f"row groups of at most {MAX_ROW_GROUP_BYTES} bytes", f"{size} in group {group}")
            row = 0
            for batch in file.iter_batches(batch_size=_ROWS, columns=present, use_threads=False):
                for record in batch.to_pylist():
                    row += 1
                    yield row, record
    except (pa.ArrowException, OverflowError) as error:
        raise _bad(path, "a parquet file", error) from error


def read_shard(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Yield ``(row, {"input_ids"[, "labels"]})`` of a token shard, rows counted from 1.

    A ``.npy`` holds integers ``[n]`` (one document) or ``[rows, n]``; a ``.safetensors`` holds such a tensor
    ``input_ids`` and, if wanted, one of the same shape ``labels``.

    Raises:
        InputError: when the file is damaged or holds something else.
    """
    arrays = dict(_open_npy(path) if path.suffix.lower() == ".npy" else _open_safetensors(path))
    ids = arrays.get("input_ids")
    if ids is None or any(array.shape != ids.shape for array in arrays.values()):
        raise _bad(path, "input_ids, and labels of the same shape", ", ".join(arrays) or "no tensor")
    if ids.ndim not in (1, 2) or any(array.dtype.kind not in "iu" for array in arrays.values()):
        raise _bad(path, "integers [n] or [rows, n]", f"{ids.dtype} {ids.shape}")
    if ids.ndim == 1:
        yield 1, arrays
        return
    for row in range(len(ids)):
        yield row + 1, {name: array[row] for name, array in arrays.items()}


def _open_npy(path: Path) -> Mapping[str, Any]:
    import numpy as np

    try:
        return {"input_ids": np.load(path, mmap_mode="r", allow_pickle=False)}
    except (ValueError, EOFError, OverflowError, TypeError) as error:
        raise _bad(path, "a .npy array of integers", error) from error


def _open_safetensors(path: Path) -> Mapping[str, Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            return {name: file.get_tensor(name) for name in ("input_ids", "labels") if name in set(file.keys())}
    except (SafetensorError, TypeError, ValueError) as error:
        raise _bad(path, "a safetensors file", error) from error
