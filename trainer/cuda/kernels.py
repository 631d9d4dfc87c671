"""The CUDA kernels as typed methods: shapes, types, strides and devices are checked, then one launch on torch's stream.

Nothing is allocated but the outputs torch is asked for. A call is checked and planned once (``plans.py``); calls that
differ only in addresses, the usual ones, find that plan again and cost a few microseconds. Letters in shapes: M tokens,
R rows (outputs), K columns (inputs), H hidden size, F feed-forward size, N query heads, D head dimension, T positions.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from q4kd.trainer.cuda import plans
from q4kd.trainer.cuda.launch import Argument, CudaLauncher, Launcher
from q4kd.trainer.cuda.plans import MAX_MATVEC_TOKENS, Q6_K_SOA, Facts, Plan, require

__all__ = ["MAX_MATVEC_TOKENS", "Q6_K_SOA", "Kernels"]

# A model needs some tens of plans for every number of tokens it is given.
_MAX_PLANS = 4096


class _Prepared(NamedTuple):
    """A plan whose tensors are places in a call's arguments."""

    kernel: str
    grid: int
    arguments: list[Argument]  # None where a tensor goes
    tensors: list[tuple[int, int]]  # (place among the kernel's arguments, place among the call's)
    writes: list[int]  # places among the call's


def _prepare(plan: Plan, described: list[Any]) -> _Prepared:
    # By identity: two tensors of a call may have equal facts.
    def place(facts: Facts) -> int:
        return next(index for index, value in enumerate(described) if value is facts)

    return _Prepared(
        plan.kernel,
        plan.grid,
        [None if isinstance(argument, Facts) else argument for argument in plan.arguments],
        [(index, place(argument)) for index, argument in enumerate(plan.arguments) if isinstance(argument, Facts)],
        [place(facts) for facts in plan.writes],
    )


class Kernels:
    """Every kernel of the teacher, for one device.

    Args:
        device: of every tensor passed in.
        launcher: how kernels are run; by default on the CUDA device.

    Raises:
        InputError: when CuPy is missing or the device is too old.
    """

    def __init__(self, device: torch.device | str, launcher: Launcher | None = None) -> None:
        self.device = torch.empty(0, device=device).device  # with its index
        self._launch: Launcher = CudaLauncher(self.device) if launcher is None else launcher
        self._prepared: dict[tuple[Any, ...], _Prepared] = {}

    def _run(self, planner: Callable[..., Plan], *call: Any) -> None:
        """Launch what ``planner`` makes of a call: tensors and scalars, tensors described by their facts."""
        key = (
            planner,
            *[
                (value.dtype, value.shape, value.stride(), value.device, value.data_ptr() % 16)
                if isinstance(value, Tensor)
                else value
                for value in call
            ],
        )
        prepared = self._prepared.get(key)
        if prepared is None:
            described = [Facts(*value) if isinstance(value, tuple) else value for value in key[1:]]
            prepared = _prepare(planner(self.device, *described), described)
            if len(self._prepared) >= _MAX_PLANS:
                self._prepared.clear()
            self._prepared[key] = prepared
        kernel, grid, arguments, tensors, writes = prepared
        if grid == 0:
            return
        arguments = arguments.copy()
        for place, index in tensors:
            arguments[place] = call[index]
        self._launch(kernel, grid, arguments, [call[index] for index in writes])

    def decode(self, type_name: str, packed: Tensor, row_start: int, row_stop: int, cols: int, out: Tensor) -> None:
        """Decode rows ``row_start`` to ``row_stop``, in float32, rounded once if ``out`` is bfloat16.

        Args:
            type_name: a GGML type, or ``Q6_K_SOA``.
            packed: uint8 ``[R, row_bytes]`` contiguous (``Q6_K_SOA``: any shape of as many bytes).
            row_start: first row.
            row_stop: end, at most R.
            cols: K.
            out: bfloat16 or float32 ``[row_stop - row_start, K]``, contiguous; every element is written.

        Raises:
            InputError: for a type that is not supported.
            ValueError: for tensors that do not fit.
        """
        self._run(plans.decode, type_name, packed, row_start, row_stop, cols, out)

    def gather(self, type_name: str, packed: Tensor, cols: int, ids: Tensor, out: Tensor) -> None:
        """Decode the rows of ``ids``; a row that does not exist becomes NaN.

        Args:
            type_name: a GGML type, or ``Q6_K_SOA``.
            packed: uint8 ``[R, row_bytes]`` contiguous (``Q6_K_SOA``: any shape of as many bytes).
            cols: K.
            ids: int64 ``[n]``, contiguous.
            out: bfloat16 or float32 ``[n, K]``, contiguous; every element is written.

        Raises:
            InputError: for a type that is not supported.
            ValueError: for tensors that do not fit.
        """
        self._run(plans.gather, type_name, packed, cols, ids, out)

    def repack_q6_k(self, packed: Tensor, out: Tensor | None = None, first_block: int = 0) -> Tensor:
        """Move Q6_K superblocks from the file's layout into the aligned one (drawn in ``kernels/blocks.cuh``).

        Args:
            packed: uint8, contiguous, whole superblocks of 210 bytes: a tensor, or a part of it.
            out: uint8, contiguous, the whole tensor's bytes; made with the shape of ``packed`` when absent.
            first_block: the superblock of ``out`` at which the part begins.

        Returns:
            ``out``: the same bytes in another order, type ``Q6_K_SOA``.

        Raises:
            ValueError: for tensors that do not fit.
        """
        out = torch.empty_like(packed) if out is None else out
        require(out.data_ptr() != packed.data_ptr() or not packed.numel(), "out: expected other memory than packed")
        self._run(plans.repack_q6_k, packed, out, first_block)
        return out

    def unpack_q6_k(self, soa: Tensor) -> Tensor:
        """Undo ``repack_q6_k`` on a whole tensor: the file's bytes, in the shape of ``soa``."""
        out = torch.empty_like(soa)
        self._run(plans.unpack_q6_k, soa, out)
        return out

    def matvec(self, type_name: str, packed: Tensor, x_MK: Tensor, rows: int, out_MR: Tensor) -> None:
        """Write ``x @ W.T`` for at most 16 tokens, reading packed blocks; no weight is rounded to bfloat16.

        Args:
            type_name: ``Q4_K`` or ``Q6_K_SOA``.
            packed: the blocks of W ``[R, K]``.
            x_MK: bfloat16 ``[M, K]``, contiguous, M from 1 to 16.
            rows: R.
            out_MR: bfloat16 or float32 ``[M, R]``; rows may be apart (columns of a wider tensor).

        Raises:
            ValueError: for another type, or tensors that do not fit.
        """
        self._run(plans.matvec, type_name, packed, x_MK, rows, out_MR)

    def rms_norm(self, x_MH: Tensor, weight_H: Tensor, eps: float, out_MH: Tensor) -> None:
        """Write ``x / sqrt(mean(x^2) + eps) * weight``, in float32, rounded once.

        Args:
            x_MH: bfloat16 or float32 ``[M, H]``, contiguous.
            weight_H: float32 ``[H]``.
            eps: added to the mean square.
            out_MH: bfloat16 or float32 ``[M, H]``, contiguous; may be ``x_MH``.

        Raises:
            ValueError: for tensors that do not fit.
        """
        self._run(plans.rms_norm, x_MH, weight_H, eps, out_MH)

    def add_rms_norm(self, residual_MH: Tensor, delta_MH: Tensor, weight_H: Tensor, eps: float, out_MH: Tensor) -> None:
        """Add ``delta`` to ``residual`` in place, rounded to its type, and write the norm of the result.

        Args:
            residual_MH: bfloat16 or float32 ``[M, H]``, contiguous; updated.
            delta_MH: bfloat16 or float32 ``[M, H]``, contiguous.
            weight_H: float32 ``[H]``.
            eps: added to the mean square.
            out_MH: bfloat16 or float32 ``[M, H]``, contiguous.

        Raises:
            ValueError: for tensors that do not fit.
        """
        self._run(plans.add_rms_norm, residual_MH, delta_MH, weight_H, eps, out_MH)

    def rope(
        self,
        q_MND: Tensor,
        k_MKD: Tensor,
        cos_TD: Tensor,
        sin_TD: Tensor,
        layout: str,
        *,
        q_bias: Tensor | None = None,
        k_bias: Tensor | None = None,
        q_norm: Tensor | None = None,
        k_norm: Tensor | None = None,
        eps: float = 0.0,
    ) -> None:
        """Rotate q and k in place, after an optional bias and an optional RMSNorm of each head, in that order.

        Args:
            q_MND: bfloat16 or float32 ``[M, N, D]``; heads contiguous, rows may be apart (a fused product's columns).
            k_MKD: same type, ``[M, K, D]``.
            cos_TD: float32 ``[T, D/2]``, contiguous; row m is position ``m % T``.
            sin_TD: likewise.
            layout: ``split`` pairs (i, i + D/2), ``interleaved`` pairs (2i, 2i + 1).
            q_bias: float32 ``[N * D]``.
            k_bias: float32 ``[K * D]``.
            q_norm: float32 ``[D]``.
            k_norm: float32 ``[D]``.
            eps: of the norms.

        Raises:
            ValueError: for another layout, or tensors that do not fit.
        """
        self._run(plans.rope, q_MND, k_MKD, cos_TD, sin_TD, layout, q_bias, k_bias, q_norm, k_norm, eps)

    def swiglu(self, gate_up: Tensor, out_MF: Tensor) -> None:
        """Write ``silu(gate) * up``.

        Args:
            gate_up: bfloat16 or float32 ``[M, 2F]``, contiguous: gate columns, then up columns.
            out_MF: same type, ``[M, F]``, contiguous.

        Raises:
            ValueError: for tensors that do not fit.
        """
        self._run(plans.swiglu, gate_up, out_MF)

    def add_bias(self, x_MC: Tensor, bias_C: Tensor) -> None:
        """Add a float32 ``[C]`` to every row of bfloat16 or float32 ``[M, C]``, in place; rows may be apart.

        Raises:
            ValueError: for tensors that do not fit.
        """
        self._run(plans.add_bias, x_MC, bias_C)
