"""What the arms of ``bench/loss/comparison.py`` work on: sizes, and random tensors of them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from q4kd.trainer.formats.blocks.layout import block_format
from q4kd.trainer.loss.teacher_head import DenseHead


@dataclass(frozen=True)
class LossShape:
    """Sizes of one comparison; ``padding`` are rows of the teacher's head past the student's vocabulary."""

    tokens: int
    vocab: int
    hidden: int
    teacher_hidden: int
    padding: int = 128

    @property
    def flop(self) -> int:
        """Floating-point operations of the four products."""
        return 2 * self.tokens * self.vocab * (self.teacher_hidden + 3 * self.hidden)


# CUDA_SHAPE is Qwen2.5-7B as teacher of Qwen2.5-0.5B, 32 sequences of 256; CPU_SHAPE suits a laptop.
CUDA_SHAPE = LossShape(8192, 151_936, 896, 3584)
CPU_SHAPE = LossShape(512, 8192, 128, 256)


class _PackedHead(DenseHead):
    """A Q6_K head that is decoded at every call, into one buffer, as a step's first use of the teacher's head does."""

    def __init__(self, shape: LossShape, device: torch.device) -> None:
        from q4kd.trainer.kernels.teacher_kernels import Kernels

        rows, cols = shape.vocab + shape.padding, shape.teacher_hidden
        super().__init__(torch.empty(rows, cols, dtype=torch.bfloat16, device=device))
        form = block_format("Q6_K")
        blocks = rows * form.row_bytes(cols) // form.block_bytes
        packed = torch.randint(0, 256, (blocks, form.block_bytes), device=device).to(torch.uint8)
        # Scales of sub-blocks lie within ± 8, those of superblocks are 2^-12: weights are about 0.03.
        packed[:, 192:208] = torch.randint(-8, 9, (len(packed), 16), device=device).to(torch.int8).view(torch.uint8)
        packed[:, 208:] = torch.tensor([0x00, 0x0C], dtype=torch.uint8, device=device)
        self._kernels = Kernels(device)
        self._packed = self._kernels.repack_q6_k(packed.view(rows, -1))

    def decoded(self) -> Tensor:
        """Decode every row and return the matrix."""
        self.decode(0, self.rows, self._weight_VH)
        return self._weight_VH

    def decode(self, start: int, stop: int, out_RH: Tensor) -> None:
        """Decode rows ``start`` to ``stop``."""
        self._kernels.decode("Q6_K_SOA", self._packed, start, stop, self._weight_VH.shape[1], out_RH)


@dataclass
class LossWork:
    """The tensors that every arm works on."""

    shape: LossShape
    hidden: Tensor
    weight: Tensor
    teacher_hidden: Tensor
    head: DenseHead
    labels: Tensor

    @property
    def gradient_bytes(self) -> int:
        """Bytes of the two gradients."""
        return self.hidden.nbytes + self.weight.nbytes


def make_work(shape: LossShape, device: torch.device) -> LossWork:
    """Return random tensors, bfloat16 on CUDA and float32 on the CPU, every position unmasked."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32

    def normal(*size: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*size, device=device) * scale).to(dtype)

    if device.type == "cuda":
        head: DenseHead = _PackedHead(shape, device)
    else:
        head = DenseHead(normal(shape.vocab + shape.padding, shape.teacher_hidden, scale=shape.teacher_hidden**-0.5))
    return LossWork(
        shape=shape,
        hidden=normal(shape.tokens, shape.hidden).requires_grad_(),
        weight=normal(shape.vocab, shape.hidden, scale=2 * shape.hidden**-0.5).requires_grad_(),
        teacher_hidden=normal(shape.tokens, shape.teacher_hidden),
        head=head,
        labels=torch.randint(0, shape.vocab, (shape.tokens,), device=device),
    )
