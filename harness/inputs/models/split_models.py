"""Split copies of small models, as gguf-split writes them, and broken twins of them.

The shards are written by the gguf package, which has the same layout and keys as llama.cpp's gguf-split.
"""

import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np

KEYS = ("split.no", "split.count", "split.tensors.count")


# What makes the splits of every small model of 31 tensors: three shards, and three that are cut elsewhere.
THREE, ELSEWHERE = 12, 14


def write_split(folder: Path, source: Path, *, tensors: int, empty_first: bool = False, stem: str = "model") -> None:
    """Write the shards of a GGUF of at most ``tensors`` tensors each; ``empty_first``: metadata alone in the first."""
    folder.mkdir()
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(
        folder / f"{stem}.gguf",
        reader.fields["general.architecture"].contents(),
        split_max_tensors=tensors,
        small_first_shard=empty_first,
    )
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            inner = field.types[1] if len(field.types) > 1 else None
            writer.add_key_value(key, field.contents(), field.types[0], inner)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, np.asarray(tensor.data), raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def shards(folder: Path) -> list[Path]:
    """Return the shards of a folder in their order."""
    return sorted(folder.glob("*-?????-of-?????.gguf"))


def _poke(path: Path, key: str, layout: str, value: int) -> None:
    """Change the number that a shard's metadata hold under ``key``."""
    data = bytearray(path.read_bytes())
    at = data.index(struct.pack("<Q", len(key)) + key.encode()) + 8 + len(key) + 4
    struct.pack_into(layout, data, at, value)
    path.write_bytes(data)


def _missing(shards: list[Path], _other: list[Path]) -> None:
    shards[1].unlink()


def _copied(shards: list[Path], _other: list[Path]) -> None:
    shutil.copyfile(shards[2], shards[1])


def _swapped(shards: list[Path], _other: list[Path]) -> None:
    kept = shards[1].rename(shards[1].with_name("kept"))
    shards[2].rename(shards[1])
    kept.rename(shards[2])


def _renamed(shards: list[Path], _other: list[Path]) -> None:
    for path in shards:
        path.rename(path.with_name(path.name.replace("of-00003", "of-00004")))


def _foreign(shards: list[Path], other: list[Path]) -> None:
    shutil.copyfile(other[1], shards[1])


def _total(shards: list[Path], _other: list[Path]) -> None:
    """Let all shards speak of one more tensor than they hold, as if an optional one had been lost."""
    held = sum(len(gguf.GGUFReader(path).tensors) for path in shards)
    for path in shards:
        _poke(path, KEYS[2], "<i", held + 1)


def _another_total(shards: list[Path], _other: list[Path]) -> None:
    _poke(shards[1], KEYS[2], "<i", 1)


def _truncated(shards: list[Path], _other: list[Path]) -> None:
    shards[2].write_bytes(shards[2].read_bytes()[:-64])


# case → what makes a set of three shards wrong; the second list is another split of the same model into as many.
BROKEN_SPLITS: dict[str, Callable[[list[Path], list[Path]], None]] = {
    "missing shard": _missing,
    "copied shard": _copied,
    "swapped shards": _swapped,
    "renamed shards": _renamed,
    "foreign shard": _foreign,
    "wrong total": _total,
    "another total": _another_total,
    "truncated shard": _truncated,
}


def write_broken_split(folder: Path, split: Path, elsewhere: Path, case: str) -> None:
    """Copy the three shards of ``split`` and spoil them as ``case`` says; ``elsewhere`` holds three cut elsewhere."""
    shutil.copytree(split, folder)
    BROKEN_SPLITS[case](shards(folder), shards(elsewhere))
