"""Queries and keys of a layer on the device: biases, norms of heads and rotary embedding, and the tables of the latter.

The kernel rotates whole heads after a norm of each. What it has not (a rotation of the first elements in split halves,
a norm over all heads at once) goes through torch's own operations, several passes over queries and keys instead of one.

Letters in shapes: M tokens, B sequences, T positions, N query heads, K key-value heads, D head size, R elements of a
head that are rotated.
"""

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor

from q4kd.trainer.formats.architecture import TeacherConfig
from q4kd.trainer.teacher.cpu.forward import rotate
from q4kd.trainer.teacher.cuda.layers import Layer
from q4kd.trainer.teacher.rope import Rope, RopeFactors

if TYPE_CHECKING:
    from q4kd.trainer.kernels.teacher_kernels import Kernels

Tables = tuple[Tensor, Tensor]
_KERNEL_LAYOUTS = {"split_halves": "split", "interleaved": "interleaved"}


class Heads:
    """Prepares queries and keys for attention, in place.

    Args:
        config: the model's dimensions.
        factors: what its file divides rotary frequencies by.
        kernels: kernels of the device.
        device: where tables are kept.
    """

    def __init__(self, config: TeacherConfig, factors: RopeFactors, kernels: "Kernels", device: torch.device) -> None:
        self._config, self._kernels, self._device = config, kernels, device
        self._rope = Rope(config, factors)
        self._half = (config.rotary_dim or config.head_dim) // 2
        # A pair of split halves that is not rotated has no place in the kernel's tables; a gate behind each query head
        # has none in its rows.
        self._is_plain = config.rope_layout == "split_halves" and 0 < config.rotary_dim < config.head_dim
        self._is_plain |= config.family.gated_attention
        self._tables: dict[tuple[int, str], Tables] = {}

    def begin(self, length: int, starts_BT: Tensor | None) -> "HeadsPass":
        """Return the tables of a pass of T positions; ``starts_BT`` as in ``Reach``."""
        plain = self._kept(length, "plain", starts_BT)
        window = self._kept(length, "window", None) if self._config.window_rope_base else plain
        none = self._kept(length, "none", None) if self._config.no_rope_step else plain
        scales = self._rope.query_scales(length, starts_BT, self._device)
        return HeadsPass(self, plain, window, none, scales)

    def _kept(self, length: int, kind: str, starts_BT: Tensor | None) -> Tables:
        if kind == "plain" and self._rope.depends_on_length:
            if starts_BT is not None:  # as documents are, every time another
                return self._on_device(self._rope.tables(length, starts_BT.cpu()))
            positions = length
        else:
            # There is one table for each power of two, and none is dropped: captured passes go on reading them.
            positions = 1 << (length - 1).bit_length()
        key = positions, kind
        if key not in self._tables:
            if kind == "none":
                tables = torch.ones(positions, self._half), torch.zeros(positions, self._half)
            else:
                make = self._rope.window_tables if kind == "window" else lambda count: self._rope.tables(count, None)
                tables = make(positions)
            self._tables[key] = self._on_device(tables)
        cos_TR, sin_TR = self._tables[key]
        return cos_TR[:length], sin_TR[:length]

    def _on_device(self, tables: Tables) -> Tables:
        """Return tables as the kernel reads them, ``[T, D / 2]`` or ``[B T, D / 2]``, or as they are without it."""
        cos, sin = (table.flatten(0, -2) for table in tables)
        missing = self._config.head_dim // 2 - self._half
        if missing and not self._is_plain:
            cos, sin = F.pad(cos, (0, missing), value=1.0), F.pad(sin, (0, missing))
        return cos.to(self._device), sin.to(self._device)

    def prepare(self, layer: Layer, q_MND: Tensor, k_MKD: Tensor, tables: Tables) -> None:
        """Add biases, normalise and rotate, in place."""
        config = self._config
        q_bias, k_bias, q_norm, k_norm = layer.q_bias, layer.k_bias, layer.q_norm, layer.k_norm
        if self._is_plain or config.family.head_norms == "all":
            for x_MND, bias, norm in ((q_MND, q_bias, q_norm), (k_MKD, k_bias, k_norm)):
                self._plain(x_MND, bias, norm, tables)
            q_bias = k_bias = q_norm = k_norm = None
        if not self._is_plain:
            self._kernels.rope(
                q_MND,
                k_MKD,
                *tables,
                _KERNEL_LAYOUTS[config.rope_layout],
                q_bias=q_bias,
                k_bias=k_bias,
                q_norm=q_norm,
                k_norm=k_norm,
                eps=config.rms_eps,
            )

    def _plain(self, x_MND: Tensor, bias: Tensor | None, norm: Tensor | None, tables: Tables) -> None:
        """Do what the kernel has not: biases and norms, and the rotation too where it is of a part in split halves."""
        x_MA = x_MND.float().flatten(1)
        if bias is not None:
            x_MA = x_MA + bias
        if norm is not None:
            x_MA = F.rms_norm(x_MA.reshape(-1, len(norm)), (len(norm),), norm, self._config.rms_eps)
        wide_MND = x_MA.view(x_MND.shape)
        if self._is_plain:
            positions = len(tables[0])
            wide_BNTD = wide_MND.view(-1, positions, *x_MND.shape[1:]).transpose(1, 2)
            wide_MND = rotate(wide_BNTD, *tables, self._config.rope_layout).transpose(1, 2).flatten(0, 1)
        x_MND.copy_(wide_MND)


class HeadsPass:
    """The tables of one pass."""

    def __init__(self, heads: Heads, plain: Tables, window: Tables, none: Tables, scales_BT: Tensor | None) -> None:
        self._heads, self._plain, self._window, self._none = heads, plain, window, none
        self._scales_BT = scales_BT

    def prepare(self, layer: Layer, q_MND: Tensor, k_MKD: Tensor, batch: int) -> None:
        """Prepare a layer's queries ``[M, N, D]`` and keys ``[M, K, D]`` of B sequences, in place."""
        tables = self._none if not layer.is_rotated else self._window if layer.window else self._plain
        self._heads.prepare(layer, q_MND, k_MKD, tables)
        if self._scales_BT is not None:
            scales_M = self._scales_BT.expand(batch, -1).reshape(-1)
            q_MND.copy_(q_MND * scales_M[:, None, None])
