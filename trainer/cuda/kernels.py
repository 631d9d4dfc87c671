"""The CUDA kernels as typed methods: shapes, types, strides and devices are checked, then one launch on torch's stream.

Nothing is allocated but the outputs torch is asked for. Letters in shapes: M tokens, R rows (outputs), K columns
(inputs), H hidden size, F feed-forward size, N query heads, D head dimension, T positions.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from q4kd.trainer.cuda.launch import THREADS, Argument, CudaLauncher, Launcher
from q4kd.trainer.formats import SUPERBLOCK, block_format

Q6_K_SOA = "Q6_K_SOA"  # Q6_K repacked by ``repack_q6_k``: the same bytes, every part aligned
MAX_MATVEC_TOKENS = 16

_DTYPES = {torch.bfloat16: "bf16", torch.float32: "f32"}
# Types without blocks go sixteen elements at a time where rows allow it: weights of one such step, threads it takes.
_STEPS = {"F16": (16, 1), "BF16": (16, 1), "F32": (16, 1), "Q8_0": (32, 2), "Q4_0": (32, 2), "Q5_0": (32, 2)}
_SUPERBLOCK_STEP = (SUPERBLOCK, 16)
_ALIGNED_TYPES = ("Q4_K", "Q5_K", Q6_K_SOA)
# From this many rows, blocks of four row tiles fill an H200's 132 multiprocessors and share what they read of x.
_MANY_ROWS = 8192


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _is_wide(*tensors: Tensor | None) -> bool:
    """Whether eight elements at a time may be read from each: 16-byte addresses, and rows whole multiples of eight."""
    return all(
        tensor is None
        or (tensor.data_ptr() % 16 == 0 and all(stride % 8 == 0 or stride == 1 for stride in tensor.stride()))
        for tensor in tensors
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

    def _check(self, name: str, tensor: Tensor, dtypes: Sequence[torch.dtype], shape: Sequence[int | None]) -> None:
        """Require a device, a dtype and a shape (``None``: any length)."""
        fits = tensor.dim() == len(shape) and all(
            want is None or want == have for want, have in zip(shape, tensor.shape, strict=True)
        )
        _require(
            fits and tensor.dtype in dtypes and tensor.device == self.device,
            f"{name}: expected {[str(dtype) for dtype in dtypes]} {list(shape)} on {self.device}, "
            f"got {tensor.dtype} {list(tensor.shape)} on {tensor.device}",
        )

    def _check_contiguous(self, name: str, tensor: Tensor, dtypes: Sequence[torch.dtype], *shape: int | None) -> None:
        self._check(name, tensor, dtypes, shape)
        _require(tensor.is_contiguous(), f"{name}: expected a contiguous tensor, got strides {tensor.stride()}")

    def _check_rows(self, name: str, tensor: Tensor, dtypes: Sequence[torch.dtype], *shape: int | None) -> None:
        """Require rows that are contiguous in themselves and do not overlap; the stride between them is free."""
        self._check(name, tensor, dtypes, shape)
        inner = math.prod(tensor.shape[1:])
        whole = tensor.numel() == 0 or tensor[0].is_contiguous()
        _require(
            whole and (tensor.shape[0] <= 1 or tensor.stride(0) >= inner),
            f"{name}: expected rows contiguous in themselves, got strides {tensor.stride()}",
        )

    def _packed_rows(self, type_name: str, packed: Tensor, cols: int) -> int:
        """Check packed bytes and return how many rows of ``cols`` weights they are."""
        row_bytes = block_format("Q6_K" if type_name == Q6_K_SOA else type_name).row_bytes(cols)
        if type_name == Q6_K_SOA:
            _require(packed.is_contiguous() and packed.dtype == torch.uint8, "packed: expected contiguous uint8")
            _require(packed.device == self.device, f"packed: expected {self.device}, got {packed.device}")
            _require(packed.numel() % row_bytes == 0, f"packed: expected whole rows of {row_bytes} bytes")
        else:
            self._check_contiguous("packed", packed, [torch.uint8], None, row_bytes)
        if type_name in _ALIGNED_TYPES:
            _require(packed.data_ptr() % 16 == 0, "packed: expected an address that is a multiple of 16")
        return packed.numel() // row_bytes

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
        rows = self._packed_rows(type_name, packed, cols)
        _require(0 <= row_start <= row_stop <= rows, f"rows {row_start}:{row_stop} of {rows}")
        self._check_contiguous("out", out, list(_DTYPES), row_stop - row_start, cols)
        if row_start == row_stop:
            return
        weights, tasks = _STEPS.get(type_name, _SUPERBLOCK_STEP)
        name, suffix = f"decode_{type_name.lower()}", _DTYPES[out.dtype]
        if cols % weights or not _is_wide(out) or (weights == 16 and packed.data_ptr() % 16):
            _require(weights == 16, "out: expected an address that is a multiple of 16")
            first, count = row_start * cols, (row_stop - row_start) * cols
            self._run(f"{name}_elements_{suffix}", count, [packed, first, count, out], [out])
            return
        steps = cols // weights
        first, count = row_start * steps, (row_stop - row_start) * steps
        if type_name == "Q8_0" and first % 8 == 0 and count % 8 == 0 and packed.data_ptr() % 16 == 0:
            self._run(f"{name}_run_{suffix}", count, [packed, first, count, out], [out])
            return
        self._run(f"{name}_{suffix}", count * tasks, [packed, rows * steps, first, count, out], [out])

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
        rows = self._packed_rows(type_name, packed, cols)
        self._check_contiguous("ids", ids, [torch.int64], None)
        count = ids.numel()
        self._check_contiguous("out", out, list(_DTYPES), count, cols)
        if count == 0:
            return
        weights, tasks = _STEPS.get(type_name, _SUPERBLOCK_STEP)
        name, suffix = f"gather_{type_name.lower()}", _DTYPES[out.dtype]
        if cols % weights or not _is_wide(out) or (weights == 16 and packed.data_ptr() % 16):
            _require(weights == 16, "out: expected an address that is a multiple of 16")
            self._run(f"{name}_elements_{suffix}", count * cols, [packed, rows, cols, ids, count, out], [out])
            return
        steps = cols // weights
        self._run(f"{name}_{suffix}", count * steps * tasks, [packed, rows * steps, steps, ids, count, out], [out])

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
        form = block_format("Q6_K")
        out = torch.empty_like(packed) if out is None else out
        for name, tensor in (("packed", packed), ("out", out)):
            _require(
                tensor.dtype == torch.uint8 and tensor.is_contiguous() and tensor.device == self.device,
                f"{name}: expected contiguous uint8 on {self.device}",
            )
            _require(tensor.numel() % form.block_bytes == 0, f"{name}: expected whole superblocks of 210 bytes")
        count, total = packed.numel() // form.block_bytes, out.numel() // form.block_bytes
        _require(0 <= first_block <= total - count, f"superblocks {first_block}:{first_block + count} of {total}")
        _require(out.data_ptr() % 16 == 0 and packed.data_ptr() % 2 == 0, "expected addresses aligned to 16 and to 2")
        _require(out.data_ptr() != packed.data_ptr() or count == 0, "out: expected other memory than packed")
        if count:
            self._run("repack_q6_k", count * 105, [packed, count, total, first_block, out], [out])
        return out

    def unpack_q6_k(self, soa: Tensor) -> Tensor:
        """Undo ``repack_q6_k`` on a whole tensor: the file's bytes, in the shape of ``soa``."""
        self._packed_rows(Q6_K_SOA, soa, SUPERBLOCK)
        out = torch.empty_like(soa)
        blocks = soa.numel() // block_format("Q6_K").block_bytes
        if blocks:
            self._run("unpack_q6_k", blocks * 105, [soa, blocks, out], [out])
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
        _require(type_name in ("Q4_K", Q6_K_SOA), f"matvec of {type_name}: expected Q4_K or {Q6_K_SOA}")
        self._check_contiguous("x", x_MK, [torch.bfloat16], None, None)
        tokens, cols = x_MK.shape
        _require(1 <= tokens <= MAX_MATVEC_TOKENS, f"x: expected 1 to {MAX_MATVEC_TOKENS} rows, got {tokens}")
        _require(x_MK.data_ptr() % 16 == 0, "x: expected an address that is a multiple of 16")
        held = self._packed_rows(type_name, packed, cols)
        _require(held == rows and rows > 0, f"packed: expected {rows} rows of {cols} weights, got {held}")
        self._check_rows("out", out_MR, list(_DTYPES), tokens, rows)
        row_tiles = 4 if rows >= _MANY_ROWS else 1
        name = f"matvec_{type_name.lower()}_r{row_tiles}_t{1 if tokens <= 8 else 2}_{_DTYPES[out_MR.dtype]}"
        steps = cols // SUPERBLOCK
        arguments: list[Argument] = [packed, rows * steps, steps, x_MK, tokens, rows, out_MR.stride(0), out_MR]
        self._launch(name, -(-rows // (16 * row_tiles)), arguments, [out_MR])

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
        self._check_contiguous("x", x_MH, list(_DTYPES), None, None)
        tokens, hidden = x_MH.shape
        self._check_contiguous("weight", weight_H, [torch.float32], hidden)
        self._check_contiguous("out", out_MH, list(_DTYPES), tokens, hidden)
        width = 8 if hidden % 8 == 0 and _is_wide(x_MH, weight_H, out_MH) else 1
        name = f"rms_norm_{_DTYPES[x_MH.dtype]}_{_DTYPES[out_MH.dtype]}_v{width}"
        if x_MH.numel():
            self._launch(name, tokens, [x_MH, weight_H, hidden, float(eps), out_MH], [out_MH])

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
        self._check_contiguous("residual", residual_MH, list(_DTYPES), None, None)
        tokens, hidden = residual_MH.shape
        self._check_contiguous("delta", delta_MH, list(_DTYPES), tokens, hidden)
        self._check_contiguous("weight", weight_H, [torch.float32], hidden)
        self._check_contiguous("out", out_MH, list(_DTYPES), tokens, hidden)
        width = 8 if hidden % 8 == 0 and _is_wide(residual_MH, delta_MH, weight_H, out_MH) else 1
        types = "_".join(_DTYPES[tensor.dtype] for tensor in (residual_MH, delta_MH, out_MH))
        arguments: list[Argument] = [residual_MH, delta_MH, weight_H, hidden, float(eps), out_MH]
        if residual_MH.numel():
            self._launch(f"add_rms_norm_{types}_v{width}", tokens, arguments, [residual_MH, out_MH])

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
        _require(layout in ("split", "interleaved"), f"layout {layout}: expected split or interleaved")
        _require(q_MND.dtype in _DTYPES, f"q: expected bfloat16 or float32, got {q_MND.dtype}")
        self._check_rows("q", q_MND, [q_MND.dtype], None, None, None)
        tokens, q_heads, head_dim = q_MND.shape
        self._check_rows("k", k_MKD, [q_MND.dtype], tokens, None, head_dim)
        k_heads = k_MKD.shape[1]
        _require(head_dim % 2 == 0, f"head dimension {head_dim}: expected an even one")
        self._check_contiguous("cos", cos_TD, [torch.float32], None, head_dim // 2)
        self._check_contiguous("sin", sin_TD, [torch.float32], len(cos_TD), head_dim // 2)
        _require(len(cos_TD) > 0 and tokens % len(cos_TD) == 0, f"{tokens} rows of {len(cos_TD)} positions")
        for name, vector, length in (
            ("q_bias", q_bias, q_heads * head_dim),
            ("k_bias", k_bias, k_heads * head_dim),
            ("q_norm", q_norm, head_dim),
            ("k_norm", k_norm, head_dim),
        ):
            if vector is not None:
                self._check_contiguous(name, vector, [torch.float32], length)
        if q_MND.numel() + k_MKD.numel() == 0:
            return
        lanes = head_dim // 16
        wide = head_dim % 16 == 0 and lanes <= 32 and lanes & (lanes - 1) == 0
        wide = wide and _is_wide(q_MND, k_MKD, cos_TD, sin_TD, q_bias, k_bias, q_norm, k_norm)
        name = f"rope_{layout}_{_DTYPES[q_MND.dtype]}_v{8 if wide else 1}"
        threads = tokens * (q_heads + k_heads) * (lanes if wide else 32)
        arguments: list[Argument] = [q_MND, q_MND.stride(0), q_heads, q_bias, q_norm]
        arguments += [k_MKD, k_MKD.stride(0), k_heads, k_bias, k_norm]
        arguments += [cos_TD, sin_TD, len(cos_TD), head_dim, float(eps), tokens]
        self._run(name, threads, arguments, [q_MND, k_MKD])

    def swiglu(self, gate_up: Tensor, out_MF: Tensor) -> None:
        """Write ``silu(gate) * up``.

        Args:
            gate_up: bfloat16 or float32 ``[M, 2F]``, contiguous: gate columns, then up columns.
            out_MF: same type, ``[M, F]``, contiguous.

        Raises:
            ValueError: for tensors that do not fit.
        """
        self._check_contiguous("out", out_MF, list(_DTYPES), None, None)
        tokens, ffn = out_MF.shape
        self._check_contiguous("gate_up", gate_up, [out_MF.dtype], tokens, 2 * ffn)
        width = 8 if ffn % 8 == 0 and _is_wide(gate_up, out_MF) else 1
        if tokens * ffn:
            name = f"swiglu_{_DTYPES[out_MF.dtype]}_v{width}"
            self._run(name, tokens * ffn // width, [gate_up, tokens, ffn, out_MF], [out_MF])

    def add_bias(self, x_MC: Tensor, bias_C: Tensor) -> None:
        """Add a float32 ``[C]`` to every row of bfloat16 or float32 ``[M, C]``, in place; rows may be apart.

        Raises:
            ValueError: for tensors that do not fit.
        """
        self._check_rows("x", x_MC, list(_DTYPES), None, None)
        tokens, columns = x_MC.shape
        self._check_contiguous("bias", bias_C, [torch.float32], columns)
        width = 8 if columns % 8 == 0 and _is_wide(x_MC, bias_C) else 1
        if tokens * columns:
            name = f"add_bias_{_DTYPES[x_MC.dtype]}_v{width}"
            self._run(name, tokens * columns // width, [x_MC, x_MC.stride(0), bias_C, tokens, columns], [x_MC])

    def _run(self, kernel: str, threads: int, arguments: Sequence[Argument], writes: Sequence[Tensor]) -> None:
        self._launch(kernel, -(-threads // THREADS), arguments, writes)
