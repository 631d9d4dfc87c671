"""Which files hold the tensors of a checkpoint's parts: one each, but for an optimiser's state that is large.

SHA-256 has one core's speed however many there are: 0.9 GB/s for a checkpoint of 8.8 GB, of which the optimiser's state
was 7.6 GB. Cut into files of about a gigabyte it is hashed and written by several threads, each file with its digest.
"""

import re
from collections.abc import Iterable, Mapping

from torch import Tensor

CUT_BYTES = 1 << 30


def file_name(part: str) -> str:
    """Return the name of the file that holds a part's tensors."""
    return f"{part}.safetensors"


def part_files(part: str, names: Iterable[str]) -> list[str]:
    """Return those of ``names`` that hold a part's tensors; none where one of several is missing."""
    whole, numbered = file_name(part), re.compile(rf"{part}-(\d{{5}})-of-(\d{{5}})\.safetensors")
    found = sorted(name for name in names if name == whole or numbered.fullmatch(name))
    if found == [whole]:
        return found
    return found if found and found == _cut_names(part, len(found)) else []


def _cut_names(part: str, count: int) -> list[str]:
    return [f"{part}-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def cut(part: str, held: Mapping[str, Tensor]) -> dict[str, Mapping[str, Tensor]]:
    """Return the tensors of each file of a part: of one, but for an optimiser's state that is large."""
    groups: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in held.items():
        num_bytes = tensor.numel() * tensor.element_size()
        if part == "optimizer" and groups[-1] and size + num_bytes > CUT_BYTES:
            groups.append({})
            size = 0
        groups[-1][name] = tensor
        size += num_bytes
    names = [file_name(part)] if len(groups) == 1 else _cut_names(part, len(groups))
    return dict(zip(names, groups, strict=True))
