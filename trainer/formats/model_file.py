"""A teacher file on disk, whatever its container: dimensions, tokens and packed tensors, memory-mapped and checked."""

import hashlib
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from q4kd.trainer.formats.architecture import TeacherConfig
from q4kd.trainer.mapped import MappedFile


@dataclass(frozen=True)
class PackedTensor:
    """One tensor as it lies in the file.

    Attributes:
        name: GGUF name, such as ``blk.0.attn_q.weight``.
        type: GGML type name, such as ``Q4_K``.
        shape: outermost dimension first: ``(experts, rows, cols)``, ``(rows, cols)`` or ``(length,)``.
        data: uint8 ``[rows, row_bytes]``, the rows of all experts after one another, a view of the memory map.
        scale: a factor of all its weights, which files hold beside NVFP4 matrices.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    data: npt.NDArray[np.uint8]
    scale: float = 1.0

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensor in the file."""
        return int(self.data.nbytes)


@dataclass(frozen=True, kw_only=True)
class ModelFile:
    """A checked model file. The tensors are views of a private memory map: nothing is read before it is used.

    ``metadata`` of a GGUF hold a ``MetadataArray`` for every array, and ``tokens`` are one: the strings are decoded
    when the first is asked for. ``files`` are the maps: one, or those of a split model's shards in their order, and
    ``path`` is that of the first.
    """

    path: Path
    config: TeacherConfig
    tensors: Mapping[str, PackedTensor]
    tokens: Sequence[str]
    metadata: Mapping[str, Any]
    files: tuple[MappedFile, ...]

    @property
    def file_bytes(self) -> int:
        """Bytes of all files."""
        return sum(len(file.data) for file in self.files)

    def check_unchanged(self) -> None:
        """Refuse to go on with a file that was changed since it was opened; see ``WatchedFile.check_unchanged``.

        Raises:
            FileChangedError: naming the file.
        """
        for file in self.files:
            file.check_unchanged()

    def sha256(self) -> str:
        """Return the model's identity, whatever its files are called; see ``combine_digests``.

        Raises:
            OSError: when a file cannot be read.
        """
        return combine_digests([file.sha256() for file in self.files])

    @property
    def tensor_bytes(self) -> int:
        """Bytes of all tensors, without header and padding."""
        return sum(tensor.num_bytes for tensor in self.tensors.values())

    @property
    def num_weights(self) -> int:
        """Elements of all tensors."""
        return sum(math.prod(tensor.shape) for tensor in self.tensors.values())

    @property
    def weights_per_token(self) -> int:
        """Weights that serve one token, called active: of the experts its own alone."""
        experts = sum(math.prod(tensor.shape) for tensor in self.tensors.values() if len(tensor.shape) == 3)
        count, used = self.config.num_experts, self.config.experts_per_token
        return self.num_weights - (experts * (count - used) // count if count else 0)

    @property
    def products_per_token(self) -> int:
        """Weights that the states of a token are multiplied by: those active, without an embedding that is no head."""
        embedding = 0 if self.config.tied_head else self.config.vocab_size * self.config.hidden_size
        return self.weights_per_token - embedding

    def bytes_by_type(self) -> dict[str, int]:
        """Tensor bytes per GGML type."""
        count: Counter[str] = Counter()
        for tensor in self.tensors.values():
            count[tensor.type] += tensor.num_bytes
        return dict(count)


def combine_digests(digests: Sequence[str]) -> str:
    """Return the SHA-256 of the only file, or that of the digests of a split model's shards, a line each, in order."""
    if len(digests) == 1:
        return digests[0]
    return hashlib.sha256("".join(f"{digest}\n" for digest in digests).encode()).hexdigest()
