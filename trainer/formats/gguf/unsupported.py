"""Says of a GGUF that cannot be a teacher every part that stands in the way, and what would be taken instead.

``open_gguf`` refuses a file for the first reason that it meets; whoever chooses between files wants all of them.
"""

import functools
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from q4kd.trainer.errors import InputError
from q4kd.trainer.formats.architecture import check_architecture, read_dimensions
from q4kd.trainer.formats.blocks.layout import FORMATS, GGML_TYPES
from q4kd.trainer.formats.families import FAMILIES
from q4kd.trainer.formats.gguf import reader
from q4kd.trainer.formats.gguf.header import TensorEntry
from q4kd.trainer.formats.gguf.pre_tokenizers import check_kind
from q4kd.trainer.formats.gguf.split import model_metadata, open_shards
from q4kd.trainer.formats.tensor_shapes import expected_shapes

_LAYER = re.compile(r"^blk\.\d+\.")
_TOKENIZER = "tokenizer"
_Check = Callable[[], object]


@dataclass(frozen=True)
class Unsupported:
    """A part of a file that is not supported.

    Attributes:
        part: kind of the part, such as ``tensor type``.
        found: what the file holds.
        supported: what would be taken instead.
    """

    part: str
    found: str
    supported: str

    @property
    def is_refused(self) -> bool:
        """Return whether it stands in the way of a teacher, which the tokenizer does not."""
        return self.part != _TOKENIZER


def find_unsupported(path: Path) -> list[Unsupported]:
    """Return every part of a GGUF, or of the split model to which a shard belongs, that is not supported.

    The tokenizer is among them only where another part is: a teacher does without it, ``q4kd fidelity`` does not.

    Raises:
        InputError: for a file whose header cannot be read, or shards that are not one model.
    """
    shards = open_shards(path)
    metadata = model_metadata(shards)
    tensors = {entry.name: entry for shard in shards for entry in shard.header.tensors}
    name = str(metadata.get("general.architecture"))[:80]
    values = {key.removeprefix(f"{name}."): value for key, value in metadata.items() if key.startswith(f"{name}.")}
    found = [
        *_refusal("kind of file", lambda: reader.refuse_companion(path, metadata)),
        *_refusal("architecture", lambda: check_architecture(path, metadata.get("general.architecture"))),
        *_types(tensors.values()),
        *_settings(path, name, values),
        *_tensors(path, name, values, tensors),
    ]
    return [*found, *unsupported_tokenizer(metadata)] if found else []


def _refusal(part: str, check: _Check) -> Iterator[Unsupported]:
    try:
        check()
    except InputError as error:
        yield Unsupported(part, error.got, error.expected.removeprefix(f"{part} "))


def _types(tensors: Iterable[TensorEntry]) -> Iterator[Unsupported]:
    """Give each type that has no decoder, with the number of its tensors, the commonest first."""
    counts = Counter(entry.type_id for entry in tensors if entry.type_id not in GGML_TYPES)
    for type_id, count in counts.most_common():
        found = f"{reader.ggml_type_name(type_id)} in {count} tensor{'s' * (count > 1)}"
        yield Unsupported("tensor type", found, ", ".join(FORMATS))


def _settings(path: Path, architecture: str, values: Mapping[str, Any]) -> Iterator[Unsupported]:
    """Give each setting of the architecture that is not implemented; each is looked at beside the context length."""
    beside = {key: value for key, value in values.items() if key == "context_length"}
    for key, value in values.items():
        check = functools.partial(reader.refuse_unsupported, path, architecture, {**beside, key: value})
        for refused in _refusal("setting", check):
            yield Unsupported(refused.part, f"{architecture}.{key} {refused.found}", refused.supported)


def _tensors(
    path: Path, architecture: str, values: Mapping[str, Any], tensors: Mapping[str, TensorEntry]
) -> Iterator[Unsupported]:
    """Give each tensor that would be ignored, the layers' together; and dimensions that are not implemented.

    Where the architecture is not known, a tensor that any known one has is passed over.
    """
    taken: set[str] = set()
    if architecture not in FAMILIES:  # What only some families have is named as a setting, and not looked into here.
        values = {key: value for key, value in values.items() if key in reader.PLAIN_KEYS}
    for name in [architecture] if architecture in FAMILIES else FAMILIES:
        try:
            config = read_dimensions(path, name, values, tensors)
            taken |= expected_shapes(config).keys() | {tensor for tensor in tensors if config.is_skipped(tensor)}
        except InputError as error:
            if name == architecture:
                yield Unsupported(error.subject.removeprefix(f"{path}: "), error.got, error.expected)
    counts = Counter(_LAYER.sub("blk.N.", name) for name in tensors if name not in taken)
    for name, count in counts.items() if taken else ():
        found = name if count == 1 else f"{name} in {count} layers"
        yield Unsupported("tensor", found, f"only the tensors of {' or '.join(FAMILIES)}")


def unsupported_tokenizer(metadata: Mapping[str, Any]) -> Iterator[Unsupported]:
    """Give the tokenizer of a GGUF if it is of a kind that is not read, or missing."""
    yield from _refusal(_TOKENIZER, lambda: check_kind(_TOKENIZER, metadata))
