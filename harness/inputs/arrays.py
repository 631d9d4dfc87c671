"""Arrays in files: inputs of experiments, what probes measured, and the pairs that checks read."""

import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from q4kd.trainer.files import write_atomic

if TYPE_CHECKING:
    from q4kd.harness.runs.experiment import Inputs

Floats: TypeAlias = npt.NDArray[np.float64]
Ints: TypeAlias = npt.NDArray[np.int64]
# Arrays of a file by name, each of which has a type of its own.
Array: TypeAlias = npt.NDArray[Any]
Arrays: TypeAlias = dict[str, Array]


def save_arrays(path: Path, arrays: Mapping[str, Array]) -> None:
    """Write arrays by name as an ``.npz``, whole or not at all.

    Its members are not compressed: floats shrink by a tenth alone, and what packs a bundle finds equal arrays of two
    runs only where they are stored as they are.
    """
    buffer = io.BytesIO()
    members: dict[str, Any] = dict(arrays)
    np.savez(buffer, **members)
    write_atomic(path, buffer.getvalue())


def save_array(path: Path, array: Array) -> None:
    """Write one array as ``.npy``, whole or not at all."""
    buffer = io.BytesIO()
    np.save(buffer, array)
    write_atomic(path, buffer.getvalue())


def read_arrays(path: Path) -> Arrays:
    """Return the arrays of an ``.npz`` by name, and nothing when a run did not come so far as to write it."""
    if not path.is_file():
        return {}
    with np.load(path, allow_pickle=False) as arrays:
        return dict(arrays)


def read_array(path: Path) -> Array:
    """Return the array of an ``.npy``."""
    array: Array = np.load(path, allow_pickle=False)
    return array


def array_input(inputs: "Inputs", name: str, make: Callable[[], Array]) -> Path:
    """Return the ``.npy`` input ``name``, which ``make`` gives the first time."""
    return inputs.file(name, lambda path: save_array(path, make()))


def arrays_input(inputs: "Inputs", name: str, make: Callable[[], Mapping[str, Array]]) -> Path:
    """Return the ``.npz`` input ``name``, which ``make`` gives the first time."""
    return inputs.file(name, lambda path: save_arrays(path, make()))


def random_ids(
    inputs: "Inputs", name: str, vocab: int, shape: int | tuple[int, ...], *, seed: int = 1, low: int = 0
) -> Path:
    """Return the ``.npy`` input ``name`` of random token ids from ``low`` to below ``vocab``, int64 of that shape."""
    return array_input(inputs, name, lambda: np.random.default_rng(seed).integers(low, vocab, shape))


def seeded_columns(count: int, chosen: int, seed: int = 2) -> Ints:
    """Return ``chosen`` of ``count`` column numbers, sorted; the same in every run."""
    return np.sort(np.random.default_rng(seed).choice(count, chosen, replace=False)).astype(np.int64)


def rows_around(count: int, *edges: int, others: int = 32, seed: int = 3) -> Ints:
    """Return row numbers below ``count``, sorted: two before and two from each edge on, first and last ones, and more.

    A block whose edge is wrong shows there first. ``others`` are a seeded choice of all rows.
    """
    near = [edge + offset for edge in (0, *edges, count) for offset in (-2, -1, 0, 1)]
    drawn = np.random.default_rng(seed).choice(count, min(others, count), replace=False)
    return np.unique([row for row in (*near, *drawn.tolist()) if 0 <= row < count]).astype(np.int64)
