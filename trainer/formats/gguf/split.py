"""Split GGUF models: one model in several files, which are found by their names and read as one.

llama.cpp's gguf-split and its converters write ``NAME-00001-of-0000N.gguf`` and so on (``SPLIT_PATH_FORMAT`` of
src/llama.cpp). Every shard is a GGUF with a header of its own and says, under the keys of ``LLM_KV_SPLIT_*``
(src/llama-arch.cpp):

    split.no             which one it is, counted from 0
    split.count          how many there are
    split.tensors.count  how many tensors all of them hold together

The first shard holds the model's metadata, with tensors or without (``--no-tensor-first-split``); the others hold
nothing but tensors. Nothing in a shard says of which model it is: shards that another model of the same dimensions
lends its names to cannot be told from the right ones, except by the digest that a run binds.
"""

import re
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from q4kd.trainer.errors import InputError
from q4kd.trainer.formats.gguf.header import MAX_HEADER_BYTES, MAX_TENSORS, Header, read_header
from q4kd.trainer.formats.gguf.metadata import MetadataArray
from q4kd.trainer.mapped import MappedFile

# Each shard stays open while it is mapped, and a process may commonly have 1,024 files open.
MAX_SHARDS = 512
_NUMBER, _COUNT, _TENSORS = "split.no", "split.count", "split.tensors.count"
_NAME = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf", re.DOTALL)
_AGAIN = "download this shard again from where the others are from"


@dataclass(frozen=True)
class Shard:
    """A file of a model: the only one, or one of several."""

    path: Path
    mapped: MappedFile
    header: Header


def open_shards(path: Path) -> tuple[Shard, ...]:
    """Open all files of the model to which a file belongs, in their order; a file that is not split is the only one.

    All headers together are bounded as one is.

    Raises:
        InputError: for a shard that is missing, damaged, another one than its name says, or of another model, and for
            shards that do not hold as many tensors as they should.
    """
    named = _open(path, MAX_HEADER_BYTES)
    paths = _shard_paths(path, named.header.metadata)
    if len(paths) == 1:
        return (named,)
    _refuse_missing(path, paths)
    shards: list[Shard] = []
    left = MAX_HEADER_BYTES
    for number, each in enumerate(paths):
        shard = named if each == path else _open(each, left)
        _check_place(shard, number, len(paths))
        if shards:
            _check_same_model(shards[0], shard)
        left -= shard.header.data_start
        shards.append(shard)
    check_total(shards)
    return tuple(shards)


def model_paths(path: Path) -> tuple[Path, ...]:
    """Return the files of the model to which a file belongs, in their order; others than shards are not opened.

    Raises:
        InputError: as ``open_shards``.
    """
    if _NAME.fullmatch(path.name) is None:
        return (path,)
    return tuple(shard.path for shard in open_shards(path))


def shard_names(name: str) -> list[str]:
    """Return the names of all shards by the name of one, in their order; another name is the only one."""
    match = _NAME.fullmatch(name)
    if match is None or not 1 <= int(match[2]) <= int(match[3]) <= MAX_SHARDS:
        return [name]
    return [f"{match[1]}-{number:05d}-of-{match[3]}.gguf" for number in range(1, int(match[3]) + 1)]


def model_metadata(shards: Sequence[Shard]) -> Mapping[str, Any]:
    """Return the metadata of the model itself, the same as if it had never been split."""
    metadata = shards[0].header.metadata
    return {key: value for key, value in metadata.items() if len(shards) == 1 or not key.startswith("split.")}


def _open(path: Path, max_header_bytes: int) -> Shard:
    mapped = MappedFile(path)
    return Shard(path, mapped, read_header(path, mapped.data, max_header_bytes))


def _shard_paths(path: Path, metadata: Mapping[str, Any]) -> tuple[Path, ...]:
    """Return the paths that the shards of a file's model must have; its own alone for one that is not split."""
    if metadata.get(_COUNT, 1) in (0, 1):
        return (path,)
    count = _integer(path, metadata, _COUNT, MAX_SHARDS)
    number = _integer(path, metadata, _NUMBER, count - 1)
    prefix = (_NAME.fullmatch(path.name) or ["", ""])[1]
    names = [f"{prefix or 'NAME'}-{each:05d}-of-{count:05d}.gguf" for each in range(1, count + 1)]
    if not prefix or path.name != names[number]:
        remedy = "give every shard the name that it was downloaded with, in one folder"
        expected = f"the name {names[number]} for shard {number + 1} of {count}, which it says it is"
        raise InputError(str(path), expected=expected, got=path.name, remedy=remedy)
    return tuple(path.with_name(name) for name in names)


def _integer(path: Path, metadata: Mapping[str, Any], key: str, most: int) -> int:
    found = metadata.get(key)
    if type(found) is not int or not 0 <= found <= most:
        got = "nothing" if found is None else repr(found)[:80]
        raise InputError(f"{path}: {key}", expected=f"a whole number up to {most}", got=got, remedy=_AGAIN)
    return found


def _refuse_missing(named: Path, paths: Sequence[Path]) -> None:
    missing = [path.name for path in paths if not _is_file(path)]
    if missing:
        got = f"{len(paths) - len(missing)} of them: {', '.join(missing[:4])} missing"
        got += f", and {len(missing) - 4} more" if len(missing) > 4 else ""
        remedy = "download the rest into the same folder; any shard may be named then"
        raise InputError(str(named), expected=f"all {len(paths)} shards beside it", got=got, remedy=remedy)


def _is_file(path: Path) -> bool:
    try:
        return stat.S_ISREG(path.stat().st_mode)  # A pipe would be waited for.
    except OSError:
        return False


def _check_place(shard: Shard, number: int, count: int) -> None:
    """Check that a shard is the one that its name says."""
    said = [shard.header.metadata.get(key) for key in (_NUMBER, _COUNT)]
    if said == [number, count]:
        return
    got = "a file that is not split"
    if said != [None, None]:
        got = f"shard {said[0] + 1 if type(said[0]) is int else repr(said[0])[:40]} of {repr(said[1])[:40]}"
    expected = f"shard {number + 1} of {count} ({_NUMBER} {number})"
    raise InputError(str(shard.path), expected=expected, got=got, remedy=f"it was renamed or copied: {_AGAIN}")


def _check_same_model(first: Shard, other: Shard) -> None:
    """Check that what a later shard says of the model is what the first one says: most say nothing.

    The alignment is of the file alone, and so is the number of the shard.
    """
    for key, value in other.header.metadata.items():
        if key in (_NUMBER, "general.alignment"):
            continue
        said = first.header.metadata.get(key)
        if not _is_equal(value, said):
            expected = f"a shard of the model of {first.path.name}, where it is " + _shown(said)
            remedy = f"it is of another model: {_AGAIN}"
            raise InputError(f"{other.path}: {key}", expected=expected, got=_shown(value), remedy=remedy)


def _is_equal(one: object, other: object) -> bool:
    if isinstance(one, MetadataArray) and isinstance(other, MetadataArray):
        return one.is_same(other)
    return type(one) is type(other) and one == other


def _shown(value: object) -> str:
    return "not given" if value is None else repr(value)[:80]


def check_total(shards: Sequence[Shard]) -> None:
    """Check that no tensor comes twice, and that all shards together hold as many as the first one says.

    Raises:
        InputError: naming the tensor, or both numbers.
    """
    holders: dict[str, Shard] = {}
    for shard in shards:
        for entry in shard.header.tensors:
            if entry.name in holders:
                subject, got = f"{shard.path}: tensor {entry.name}", f"one in {holders[entry.name].path.name} as well"
                raise InputError(subject, expected="each tensor once", got=got, remedy=_AGAIN)
            holders[entry.name] = shard
    first = shards[0]
    count = _integer(first.path, first.header.metadata, _TENSORS, MAX_TENSORS)
    if len(holders) != count:
        expected = f"{count} tensors in its {len(shards)} shards ({_TENSORS})"
        remedy = "a shard is of another model, or of another split of this one: download all of them again"
        raise InputError(str(first.path), expected=expected, got=str(len(holders)), remedy=remedy)
