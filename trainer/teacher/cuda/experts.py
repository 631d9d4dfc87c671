"""The experts of a layer on a CUDA device: packed, or decoded once, and the router in the dtype of its product.

Letters in shapes: E experts, N rows of an expert's matrix, K columns, H hidden size, F feed-forward size of an expert.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from q4kd.trainer.errors import InputError
from q4kd.trainer.kernels.expert_kernels import UNSUPPORTED_TYPES
from q4kd.trainer.teacher.cuda.weights import CudaMatrix, DeviceTensor

if TYPE_CHECKING:
    from q4kd.trainer.kernels.expert_kernels import ExpertKernels
    from q4kd.trainer.kernels.teacher_kernels import Kernels


class ExpertMatrix(CudaMatrix):
    """One matrix of every expert, ``[E, N, K]``, the rows of all after one another.

    Raises:
        InputError: for a type, or a number of columns, that experts cannot be decoded from.
    """

    def __init__(self, tensor: DeviceTensor, kernels: "Kernels", expert_kernels: "ExpertKernels") -> None:
        self.experts, self.expert_rows, cols = tensor.shape
        rows = self.experts * self.expert_rows
        if tensor.type in UNSUPPORTED_TYPES or cols % 16:
            expected, got = "experts of a type but NVFP4, columns a multiple of 16", f"{tensor.type}, {cols} columns"
            remedy = "use --device cpu, or a file that holds its experts in another type"
            raise InputError(f"tensor {tensor.name}", expected=expected, got=got, remedy=remedy)
        super().__init__(replace(tensor, shape=(rows, cols), packed=tensor.packed.view(rows, -1)), kernels)
        self._expert_kernels = expert_kernels

    def decode_chosen(self, first: int, ends_E: Tensor | None, out_eNK: Tensor) -> None:
        """Decode the experts from ``first`` that have rows, each to its place in ``out_eNK``.

        ``ends_E`` and ``out_eNK`` are as in ``ExpertKernels.decode_experts``.
        """
        self._expert_kernels.decode_experts(self._layout, self._data, self.cols, self.experts, first, ends_E, out_eNK)


class Biases(NamedTuple):
    """What is added to the products of a layer's experts, float32.

    Attributes:
        router: ``[E]``.
        gate_up: ``[E, 2 F]``, the gate's first.
        down: ``[E, H]``.
    """

    router: Tensor
    gate_up: Tensor
    down: Tensor


@dataclass(frozen=True, eq=False)
class Experts:
    """A layer's experts.

    Attributes:
        router: ``[1, E, H]`` in float32, or ``[2, E, H]`` in bfloat16, which add up to float32 weights but for their
            last eight bits: the choice of experts should not depend on how the router is rounded.
        gate, up, down: the three matrices, packed; without ``up`` the gate holds both, the rows of an expert's up
            behind those of its gate.
        per_token: how many experts a token is given to.
        resident: gate and up ``[E, 2 F, H]`` and down ``[E, H, F]`` where they were decoded once.
        biases: None for a family without.
        scales_E: float32 ``[E]``, what each expert's output is multiplied by beside its token's weight; None for one.
    """

    router: Tensor
    gate: ExpertMatrix
    up: ExpertMatrix | None
    down: ExpertMatrix
    per_token: int
    resident: tuple[Tensor, Tensor] | None = None
    biases: Biases | None = None
    scales_E: Tensor | None = None

    @property
    def size(self) -> int:
        """F."""
        return self.down.cols

    @property
    def matrices(self) -> tuple[ExpertMatrix, ...]:
        """The packed matrices."""
        return (self.gate, self.down) if self.up is None else (self.gate, self.up, self.down)

    def decode_gate_up(self, first: int, ends_E: Tensor | None, out: Tensor) -> None:
        """Decode gate and up of experts that have rows into ``[e, 2 F, H]``, gate rows first."""
        self.gate.decode_chosen(first, ends_E, out[:, : self.gate.expert_rows])
        if self.up is not None:
            self.up.decode_chosen(first, ends_E, out[:, self.gate.expert_rows :])

    def densified(self, dtype: torch.dtype) -> "Experts":
        """Return the same experts decoded; their packed bytes are dropped."""
        count, size, hidden = self.gate.experts, self.size, self.gate.cols
        device = self.router.device
        gate_up = torch.empty(count, 2 * size, hidden, dtype=dtype, device=device)
        down = torch.empty(count, hidden, size, dtype=dtype, device=device)
        self.decode_gate_up(0, None, gate_up)
        self.down.decode_chosen(0, None, down)
        self.gate.hold(gate_up[:, : self.gate.expert_rows])
        if self.up is not None:
            self.up.hold(gate_up[:, self.gate.expert_rows :])
        self.down.hold(down)
        return replace(self, resident=(gate_up, down))


def split_router(weight_EH: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a router's float32 weights as ``Experts.router`` holds them."""
    if dtype == torch.float32:
        return weight_EH[None]
    high = weight_EH.to(dtype)
    return torch.stack([high, (weight_EH - high.float()).to(dtype)])


def build_experts(
    tensors: Sequence[DeviceTensor],
    per_token: int,
    kernels: "Kernels",
    expert_kernels: "ExpertKernels",
    dtype: torch.dtype,
    biases: Biases | None = None,
) -> Experts:
    """Arrange a layer's router, gate, up (but where the gate holds it) and down; Q6_K ones are repacked in place."""
    router, *matrices = tensors
    weight = torch.empty(router.shape, dtype=torch.float32, device=router.packed.device)
    kernels.decode(router.type, router.packed, 0, router.shape[0], router.shape[1], weight)
    gate, *up, down = (ExpertMatrix(tensor, kernels, expert_kernels) for tensor in matrices)
    return Experts(split_router(weight, dtype), gate, up[0] if up else None, down, per_token, biases=biases)
