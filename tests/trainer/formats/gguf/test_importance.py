"""Importance matrices: what a file of llama-imatrix says is read, and what it must not say is refused."""

from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest

from q4kd.trainer.errors import InputError
from q4kd.trainer.formats.gguf.importance import importance_of, read_importance

NAME = "blk.0.attn_q.weight"


def write_imatrix(
    path: Path,
    sums: dict[str, np.ndarray],
    *,
    counts: float | None = 8.0,
    kind: str | None = "imatrix",
    change: Callable[[gguf.GGUFWriter], None] | None = None,
) -> Path:
    """Write a file as llama-imatrix does: two float32 tensors a matrix, counts of one row."""
    writer = gguf.GGUFWriter(path, "")
    if kind is not None:
        writer.add_string("general.type", kind)
    writer.add_array("imatrix.datasets", ["text.txt"])
    writer.add_uint32("imatrix.chunk_count", 1)
    writer.add_uint32("imatrix.chunk_size", 8)
    for name, values in sums.items():
        writer.add_tensor(f"{name}.in_sum2", values)
        if counts is not None:
            writer.add_tensor(f"{name}.counts", np.full((1, 1), counts, np.float32))
    if change:
        change(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def sums(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).chisquare(1, shape).astype(np.float32)


def test_sums_are_divided_by_their_count(tmp_path: Path) -> None:
    given = {NAME: sums(1, 64), "blk.1.ffn_down.weight": sums(96)}
    found = read_importance(write_imatrix(tmp_path / "i.gguf", given))
    assert found.keys() == given.keys()
    for name, values in given.items():
        np.testing.assert_array_equal(found[name], values.reshape(-1) / 8)
        assert importance_of(found, name, values.size) is found[name]
    assert importance_of(found, "output.weight", 64) is None
    assert importance_of(None, NAME, 64) is None
    with pytest.raises(InputError, match=r"importance of blk\.0\.attn_q\.weight: expected 32 columns, got 64"):
        importance_of(found, NAME, 32)


def test_a_matrix_that_no_token_reached_weighs_its_columns_alike(tmp_path: Path) -> None:
    found = read_importance(write_imatrix(tmp_path / "i.gguf", {NAME: sums(64) * 0}, counts=0.0))
    np.testing.assert_array_equal(found[NAME], np.ones(64))


@pytest.mark.parametrize(
    ("words", "arguments"),
    [
        ("general.type imatrix.*got general.type 'adapter'", {"kind": "adapter"}),
        ("general.type imatrix.*got general.type None", {"kind": None}),
        ("one row of sums and one count, got none", {"counts": None}),
        ("finite numbers, none negative, got 1 of 64", {"bad": np.nan}),
        ("finite numbers, none negative, got 1 of 64", {"bad": -1.0}),
        ("finite numbers, none negative, got 1 of 64", {"bad": np.inf}),
        (r"one row of sums and one count, got \(4, 16\)", {"shape": (4, 16)}),
        ("finite numbers", {"counts": 1e-30, "bad": 3e38}),
        (r"count of blk\.0\.attn_q\.weight: expected finite numbers, none negative, got 1 of 1", {"counts": np.nan}),
        (r"count of blk\.0\.attn_q\.weight: expected finite numbers", {"counts": -1.0}),
        (r"count of blk\.0\.attn_q\.weight: expected finite numbers", {"counts": np.inf}),
    ],
)
def test_what_is_no_importance_matrix_is_refused(tmp_path: Path, words: str, arguments: dict) -> None:
    values = sums(*arguments.pop("shape", (64,)))
    values.reshape(-1)[7] = arguments.pop("bad", 1.0)
    path = write_imatrix(tmp_path / "i.gguf", {NAME: values}, **arguments)
    with pytest.raises(InputError, match=words):
        read_importance(path)


def test_other_tensors_types_and_ends_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"tensors that end in \.in_sum2, got none"):
        read_importance(write_imatrix(tmp_path / "none.gguf", {}, change=lambda w: w.add_tensor("other", sums(4))))
    halves = write_imatrix(tmp_path / "halves.gguf", {NAME: sums(64).astype(np.float16)})
    with pytest.raises(InputError, match="type F32, got F16"):
        read_importance(halves)
    whole = write_imatrix(tmp_path / "whole.gguf", {"a.weight": sums(8), NAME: sums(4096)})
    (tmp_path / "cut.gguf").write_bytes(whole.read_bytes()[:-4096])
    with pytest.raises(InputError, match="truncated"):
        read_importance(tmp_path / "cut.gguf")
