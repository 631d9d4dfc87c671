"""The CUDA kernels' interface in plain torch on the CPU, so that what calls them can be tested without a GPU.

Each method checks what the real one may assume (shapes, dtypes, contiguity) and computes in float32 with one rounding
at the end. Repacked Q6_K blocks are reversed byte by byte: reading them as the file's layout, or the other way round,
gives nonsense.
"""

import torch
from torch import Tensor

from q4kd.trainer.formats.blocks.decode import decode_rows
from q4kd.trainer.formats.blocks.layout import FORMATS
from q4kd.trainer.formats.families import RopeLayout
from q4kd.trainer.formats.model_file import ModelFile
from q4kd.trainer.teacher.cpu.forward import rotate
from q4kd.trainer.teacher.cuda.weights import DeviceTensor
from q4kd.trainer.teacher.delta_rule import short_convolution

_LAYOUTS: dict[str, RopeLayout] = {"split": "split_halves", "interleaved": "interleaved"}


def widening_multiply(x_MK: Tensor, weight_RK: Tensor, out_MR: Tensor) -> None:
    """Stand in for the CUDA product, whose ``out_dtype`` torch's CPU product lacks; it also adds in float32 inside."""
    assert x_MK.dtype == weight_RK.dtype
    out_MR.copy_(x_MK.float() @ weight_RK.float().T)


def device_tensors(model: ModelFile) -> dict[str, DeviceTensor]:
    """Copy a file's tensors, as loading to a device does."""
    return {
        name: DeviceTensor(
            name,
            tensor.type,
            tensor.shape,
            torch.from_numpy(tensor.data.copy()).view(tensor.shape[0] if len(tensor.shape) > 1 else 1, -1),
            tensor.scale,
        )
        for name, tensor in model.tensors.items()
    }


class ReferenceKernels:
    device, launcher = torch.device("cpu"), None

    def __init__(self) -> None:
        self.calls: list[str] = []

    def _rows(self, type_name: str, packed: Tensor, cols: int) -> Tensor:
        if type_name == "Q6_K_SOA":
            packed, type_name = packed.view(-1, 210).flip(1).view(packed.shape), "Q6_K"
        elif type_name == "Q6_K":
            raise AssertionError("Q6_K must be repacked first")
        out = torch.empty(packed.shape[0], cols)
        return decode_rows(type_name, packed.contiguous(), out)

    def decode(
        self, type_name: str, packed: Tensor, row_start: int, row_stop: int, cols: int, out: Tensor, scale: float = 1.0
    ) -> None:
        self.calls.append("decode")
        assert 0 <= row_start < row_stop <= packed.shape[0]
        assert out.shape == (row_stop - row_start, cols)
        assert out.is_contiguous() and packed.is_contiguous()
        out.copy_(self._rows(type_name, packed[row_start:row_stop], cols) * scale)

    def gather(self, type_name: str, packed: Tensor, cols: int, ids: Tensor, out: Tensor) -> None:
        assert ids.dtype == torch.int64 and ids.dim() == 1 and out.shape == (len(ids), cols)
        out.copy_(self._rows(type_name, packed[ids], cols))

    def repack_q6_k(self, packed: Tensor) -> Tensor:
        assert packed.shape[1] % FORMATS["Q6_K"].block_bytes == 0
        return packed.view(-1, 210).flip(1).contiguous().view(packed.shape)

    def matvec(self, type_name: str, packed: Tensor, x: Tensor, rows: int, out: Tensor) -> None:
        self.calls.append("matvec")
        assert type_name in ("Q4_K", "Q6_K_SOA")
        assert x.dtype == torch.bfloat16 and 1 <= len(x) <= 16 and x.is_contiguous()
        assert out.shape == (len(x), rows) and out.stride(1) == 1
        out.copy_(x.float() @ self._rows(type_name, packed, x.shape[1]).T)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, out: Tensor) -> None:
        assert weight.dtype == torch.float32 and x.is_contiguous() and out.is_contiguous() and x.shape == out.shape
        wide = x.float()
        out.copy_(wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight)

    def add_rms_norm(self, residual: Tensor, delta: Tensor, weight: Tensor, eps: float, out: Tensor) -> None:
        assert residual.shape == delta.shape and delta.is_contiguous()
        residual += delta.float()
        self.rms_norm(residual, weight, eps, out)

    def rope(
        self,
        q: Tensor,
        k: Tensor,
        cos: Tensor,
        sin: Tensor,
        layout: str,
        *,
        q_bias: Tensor | None = None,
        k_bias: Tensor | None = None,
        q_norm: Tensor | None = None,
        k_norm: Tensor | None = None,
        eps: float = 0.0,
    ) -> None:
        assert len(q) % len(cos) == 0 and cos.dtype == torch.float32 and q.stride(2) == 1
        for x_MND, bias, norm in ((q, q_bias, q_norm), (k, k_bias, k_norm)):
            wide = x_MND.float()
            if bias is not None:
                wide = wide + bias.view(wide.shape[1:])
            if norm is not None:
                wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * norm
            wide_BNTD = wide.unflatten(0, (-1, len(cos))).transpose(1, 2)
            x_MND.copy_(rotate(wide_BNTD, cos, sin, _LAYOUTS[layout]).transpose(1, 2).flatten(0, 1))

    def add_bias(self, x: Tensor, bias: Tensor) -> None:
        assert x.shape[1:] == bias.shape and x.stride(1) == 1
        x.copy_(x.float() + bias)

    def swiglu(self, gate_up: Tensor, out: Tensor) -> None:
        assert gate_up.is_contiguous() and out.is_contiguous() and gate_up.shape == (len(out), 2 * out.shape[1])
        gate, up = gate_up.float().chunk(2, 1)
        out.copy_(torch.nn.functional.silu(gate) * up)

    def geglu(self, gate_up: Tensor, out: Tensor) -> None:
        assert gate_up.is_contiguous() and out.is_contiguous() and gate_up.shape == (len(out), 2 * out.shape[1])
        gate, up = gate_up.float().chunk(2, 1)
        out.copy_(torch.nn.functional.gelu(gate, approximate="tanh") * up)


class ReferenceExpertKernels:
    """The kernels of mixtures; ``decoded`` counts how often each expert's matrix was."""

    def __init__(self, *_shared: object) -> None:
        self.decoded: dict[int, int] = {}

    def decode_experts(
        self, type_name: str, packed: Tensor, cols: int, experts: int, first: int, ends: Tensor | None, out: Tensor
    ) -> None:
        count, rows, _ = out.shape
        assert 0 <= first <= experts - count and packed.shape[0] == experts * rows
        for place in range(count):
            expert = first + place
            if ends is not None and int(ends[expert]) == (int(ends[expert - 1]) if expert else 0):
                out[place] = torch.nan  # nothing may read it
                continue
            self.decoded[expert] = self.decoded.get(expert, 0) + 1
            part = packed[expert * rows : (expert + 1) * rows]
            if type_name == "Q6_K_SOA":
                part, source = part.reshape(-1, 210).flip(1).view(part.shape), "Q6_K"
            else:
                source = type_name
            out[place].copy_(decode_rows(source, part.contiguous(), torch.empty(rows, cols)))

    def route(self, logits: Tensor, chosen: Tensor, weights: Tensor, renormalise: int) -> None:
        assert logits.dim() == 3 and logits.shape[1] in (1, 2) and renormalise in (0, 1)
        shares = logits.sum(1).softmax(1)
        order = shares.argsort(dim=1, descending=True, stable=True)[:, : chosen.shape[1]]
        taken = shares.gather(1, order)
        chosen.copy_(order)
        weights.copy_(taken / taken.sum(1, keepdim=True) if renormalise else taken)

    def sort(self, chosen: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
        order = chosen.flatten().long().argsort(dim=0, stable=True)
        rows = torch.empty_like(order)
        rows[order] = torch.arange(len(order))
        ends = chosen.flatten().long().bincount(minlength=experts).cumsum(0)
        return rows.int().view(chosen.shape), (order // chosen.shape[1]).int(), ends.int()

    def take_rows(self, x: Tensor, token_of_row: Tensor, first: int, out: Tensor) -> None:
        assert first + len(out) <= len(token_of_row)
        out.copy_(x[token_of_row[first : first + len(out)].long()])

    def clamped_swiglu(self, gate_up: Tensor, biases: Tensor, ends: Tensor, out: Tensor) -> None:
        assert gate_up.is_contiguous() and out.is_contiguous() and gate_up.shape == (len(out), 2 * out.shape[1])
        assert ends.dtype == torch.int32 and len(ends) == len(biases) and int(ends[-1]) == len(out)
        counts = ends.long().diff(prepend=torch.zeros(1, dtype=torch.long))
        gate, up = (gate_up.float() + biases.repeat_interleave(counts, 0)).chunk(2, 1)
        gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
        out.copy_(gate * (1.702 * gate).sigmoid() * (up + 1))

    def combine_rows(
        self, pieces: list[Tensor], first: int, row_of_slot: Tensor, weights: Tensor, residual: Tensor
    ) -> None:
        assert 1 <= len(pieces) <= 4
        rows = torch.cat(pieces).float()
        places = row_of_slot.long() - first
        inside = (places >= 0) & (places < len(rows))
        taken = rows[places.clamp(0, len(rows) - 1)]
        residual += torch.where(inside[..., None], weights[..., None] * taken, 0).sum(1)


class ReferenceStateKernels:
    """The kernels of gated delta nets."""

    def __init__(self, *_shared: object) -> None:
        pass

    def convolve(
        self,
        x: Tensor,
        taps: Tensor,
        starts: Tensor | None,
        positions: int,
        head_dim: int,
        unit: int,
        eps: float,
        out: Tensor,
    ) -> None:
        assert out.dtype == taps.dtype == torch.float32 and out.shape == x.shape and len(x) % positions == 0
        rows = None if starts is None else starts.view(-1, positions)
        mixed = short_convolution(x.float().reshape(-1, positions, x.shape[1]), taps, rows).flatten(0, 1)
        out.copy_(torch.nn.functional.silu(mixed))
        heads = out[:, :unit].reshape(len(out), -1, head_dim)
        out[:, :unit] = (heads * torch.rsqrt(heads.square().sum(-1, keepdim=True) + eps)).flatten(1)

    def gate(self, x: Tensor, z: Tensor, weight: Tensor, eps: float, out: Tensor) -> None:
        assert x.dtype == torch.float32 and x.is_contiguous() and out.is_contiguous() and out.dtype == z.dtype
        normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight
        out.copy_(normed.flatten(1) * torch.nn.functional.silu(z.float()))
