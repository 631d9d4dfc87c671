"""A teacher's weights on one device and the forward pass over them: what every device's offers, and how it is loaded.

Letters in shapes: B sequences, T positions, M = B * T tokens, H hidden size, V vocabulary.
"""

from collections import Counter
from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from q4kd.trainer.device.devices import Allocation
from q4kd.trainer.errors import InputError
from q4kd.trainer.formats.blocks.scales import check_scales
from q4kd.trainer.formats.model_file import ModelFile
from q4kd.trainer.teacher.cpu.forward import CpuForward


class HeldMatrix(Protocol):
    """What residency asks of a weight matrix: its GGML type in the file, the one in memory, and its bytes there."""

    source_type: str
    held_as: str

    @property
    def is_dense(self) -> bool:
        """Whether the weights are held decoded."""

    @property
    def resident_bytes(self) -> int:
        """Bytes held."""


class HeldScratch(Protocol):
    """What residency asks of a scratch."""

    @property
    def num_bytes(self) -> int:
        """Bytes held now."""


class Forward(Protocol):
    """A model's weights on one device and the forward pass over them; see ``CpuForward``."""

    device: torch.device
    vector_bytes: Counter[str]

    @property
    def scratch(self) -> HeldScratch:
        """The only dense storage for packed weights."""

    @property
    def matrices(self) -> Mapping[str, HeldMatrix]:
        """Every weight matrix by tensor name."""

    def embed(self, row_ids: Tensor) -> Tensor:
        """Return float32 embedding rows ``[n, H]``."""

    def hidden(self, ids_BT: Tensor, starts_BT: Tensor | None = None) -> Tensor:
        """Return final hidden states ``[B, T, H]``."""

    def head_logits(self, hidden_MH: Tensor) -> Tensor:
        """Return float32 logits ``[M, V]``."""

    def decoded_head(self) -> Tensor | None:
        """Return the whole head ``[V, H]`` decoded to the compute dtype, or None where it is too large to be held."""

    def decode_head(self, start: int, stop: int, out_RH: Tensor) -> None:
        """Write head rows ``start`` to ``stop`` to ``out_RH``, contiguous, of the compute dtype."""


def build_forward(
    model: ModelFile, backend: str, device: str, dtype: str, allocation: Allocation = "device"
) -> Forward:
    """Load a model's weights for a backend, a device and a compute dtype."""
    if device == "cuda":
        from q4kd.trainer.teacher.cuda.load import load_forward

        return load_forward(model, backend, dtype=getattr(torch, dtype), allocation=allocation)
    check_weights(model)
    return CpuForward(model, backend, getattr(torch, dtype))


def check_weights(model: ModelFile) -> None:
    """Refuse weights that are NaN or infinite: one such scale makes every logit NaN.

    Raises:
        InputError: naming the first tensor that has one.
    """
    for tensor in model.tensors.values():
        count = check_scales(tensor.type, tensor.data)
        if count:
            raise InputError(
                f"{model.path}: tensor {tensor.name}",
                expected="finite scales",
                got=f"{count} {tensor.type} blocks with NaN or infinity",
                remedy="download or quantise the model again",
            )
