"""The CUDA kernels of the teacher, each declared once as a typed method (see ``plans.py``), on torch's current stream.

Nothing is allocated but the outputs torch is asked for. Letters in shapes: M tokens, R rows (outputs), K columns
(inputs), H hidden size, F feed-forward size, N query heads, D head dimension, T positions.
"""

import torch
from torch import Tensor

from q4kd.trainer.formats.blocks.layout import SUPERBLOCK, block_format
from q4kd.trainer.kernels.launch import Argument
from q4kd.trainer.kernels.plans import DTYPES, KernelSet, Launch, blocks, is_wide, kernel, offset, require

Q6_K_SOA = "Q6_K_SOA"  # Q6_K repacked by ``repack_q6_k``: the same bytes, every part aligned
MAX_MATVEC_TOKENS = 16
# From this many rows, blocks of four row tiles fill an H200's 132 multiprocessors and share what they read of x.
MANY_ROWS = 8192

_ANY = tuple(DTYPES)
_BF16, _F32 = (torch.bfloat16,), (torch.float32,)
# Types without blocks go sixteen elements at a time where rows allow it: weights of one such step, threads it takes.
_STEPS = {"F16": (16, 1), "BF16": (16, 1), "F32": (16, 1), "Q8_0": (32, 2), "Q4_0": (32, 2), "Q5_0": (32, 2)}
_STEPS |= {"Q4_1": (32, 2), "Q5_1": (32, 2), "IQ4_NL": (32, 2)}
_STEPS |= {"MXFP4": (32, 2), "NVFP4": (64, 4)}
_SUPERBLOCK_STEP = (SUPERBLOCK, 16)
_ALIGNED_TYPES = ("Q4_K", "Q5_K", Q6_K_SOA, "Q4_1", "Q5_1", "Q2_K", "IQ4_XS")
_Q6_K_BYTES = block_format("Q6_K").block_bytes
_Q6_K_WORDS = _Q6_K_BYTES // 2  # a thread moves one


class Kernels(KernelSet):
    """Every kernel of the teacher, for one device.

    Every method raises ``ValueError`` for arguments that do not fit: another shape, dtype, type, layout, device or
    alignment than it says.
    """

    @kernel
    def decode(
        self,
        type_name: str,
        packed: Tensor,
        row_start: int,
        row_stop: int,
        cols: int,
        out: Tensor,
        *,
        scale: float = 1.0,
    ) -> Launch:
        """Decode rows ``row_start`` to ``row_stop``, in float32, rounded once if ``out`` is bfloat16.

        Args:
            type_name: a GGML type, or ``Q6_K_SOA``.
            packed: uint8 ``[R, row_bytes]``, contiguous (``Q6_K_SOA``: any shape of as many bytes).
            row_start, row_stop: 0 to R.
            cols: K.
            out: bfloat16 or float32 ``[row_stop - row_start, K]``, contiguous; every element is written.
            scale: factor of every weight; only NVFP4 has one.

        Raises:
            InputError: for a type that is not supported.
        """
        rows = self._packed_rows(type_name, packed, cols)
        require(0 <= row_start <= row_stop <= rows, f"rows {row_start}:{row_stop} of {rows}")
        self._check("out", out, _ANY, row_stop - row_start, cols)
        require(scale == 1.0 or type_name == "NVFP4", f"scale {scale} of {type_name}: expected 1")
        weights, tasks = _STEPS.get(type_name, _SUPERBLOCK_STEP)
        name, suffix = f"decode_{type_name.lower()}", DTYPES[out.dtype]
        if _by_elements(weights, cols, packed, out):
            first, count = row_start * cols, (row_stop - row_start) * cols
            return Launch(f"{name}_elements_{suffix}", blocks(count), [packed, first, count, out], [out])
        steps = cols // weights
        first, count = row_start * steps, (row_stop - row_start) * steps
        if type_name == "Q8_0" and first % 8 == 0 and count % 8 == 0 and offset(packed) == 0:
            return Launch(f"{name}_run_{suffix}", blocks(count), [packed, first, count, out], [out])
        arguments: list[Argument] = [packed, rows * steps, first, count, out]
        arguments += [float(scale)] if type_name == "NVFP4" else []
        return Launch(f"{name}_{suffix}", blocks(count * tasks), arguments, [out])

    @kernel
    def gather(self, type_name: str, packed: Tensor, cols: int, ids: Tensor, out: Tensor) -> Launch:
        """Decode the rows of ``ids``; a row that does not exist becomes NaN.

        Args:
            type_name: a GGML type, or ``Q6_K_SOA``.
            packed: uint8 ``[R, row_bytes]`` contiguous (``Q6_K_SOA``: any shape of as many bytes).
            cols: K.
            ids: int64 ``[n]``, contiguous.
            out: bfloat16 or float32 ``[n, K]``, contiguous; every element is written.

        Raises:
            InputError: for a type that is not supported.
        """
        rows = self._packed_rows(type_name, packed, cols)
        self._check("ids", ids, (torch.int64,), None)
        count = len(ids)
        self._check("out", out, _ANY, count, cols)
        weights, tasks = _STEPS.get(type_name, _SUPERBLOCK_STEP)
        name, suffix = f"gather_{type_name.lower()}", DTYPES[out.dtype]
        if _by_elements(weights, cols, packed, out):
            elements: list[Argument] = [packed, rows, cols, ids, count, out]
            return Launch(f"{name}_elements_{suffix}", blocks(count * cols), elements, [out])
        steps = cols // weights
        arguments: list[Argument] = [packed, rows * steps, steps, ids, count, out]
        return Launch(f"{name}_{suffix}", blocks(count * steps * tasks), arguments, [out])

    def repack_q6_k(self, packed: Tensor, out: Tensor | None = None, first_block: int = 0) -> Tensor:
        """Move Q6_K superblocks from the file's layout into the aligned one (drawn in ``src/blocks.cuh``).

        Args:
            packed: uint8, contiguous, whole superblocks of 210 bytes: a tensor, or a part of it.
            out: uint8, contiguous, the whole tensor's bytes; made with the shape of ``packed`` when absent.
            first_block: the superblock of ``out`` at which the part begins.

        Returns:
            ``out``: the same bytes in another order, type ``Q6_K_SOA``.
        """
        out = torch.empty_like(packed) if out is None else out
        require(out.data_ptr() != packed.data_ptr() or not packed.numel(), "out: expected other memory than packed")
        self._repack_q6_k(packed, out, first_block)
        return out

    @kernel
    def _repack_q6_k(self, packed: Tensor, out: Tensor, first_block: int) -> Launch:
        count, total = self._superblocks("packed", packed), self._superblocks("out", out)
        require(0 <= first_block <= total - count, f"superblocks {first_block}:{first_block + count} of {total}")
        require(offset(out) == 0 and packed.data_ptr() % 2 == 0, "expected addresses aligned to 16 and to 2")
        return Launch("repack_q6_k", blocks(count * _Q6_K_WORDS), [packed, count, total, first_block, out], [out])

    def unpack_q6_k(self, soa: Tensor) -> Tensor:
        """Undo ``repack_q6_k`` on a whole tensor: the file's bytes, in the shape of ``soa``."""
        out = torch.empty_like(soa)
        self._unpack_q6_k(soa, out)
        return out

    @kernel
    def _unpack_q6_k(self, soa: Tensor, out: Tensor) -> Launch:
        count = self._packed_rows(Q6_K_SOA, soa, SUPERBLOCK)
        return Launch("unpack_q6_k", blocks(count * _Q6_K_WORDS), [soa, count, out], [out])

    @kernel
    def matvec(self, type_name: str, packed: Tensor, x_MK: Tensor, rows: int, out_MR: Tensor) -> Launch:
        """Write ``x @ W.T`` for at most 16 tokens, reading packed blocks; no weight is rounded to bfloat16.

        Args:
            type_name: ``Q4_K`` or ``Q6_K_SOA``.
            packed: the blocks of W ``[R, K]``.
            x_MK: bfloat16 ``[M, K]``, contiguous, M from 1 to 16.
            rows: R.
            out_MR: bfloat16 or float32 ``[M, R]``; rows may be apart (columns of a wider tensor).
        """
        require(type_name in ("Q4_K", Q6_K_SOA), f"matvec of {type_name}: expected Q4_K or {Q6_K_SOA}")
        self._check("x", x_MK, _BF16, None, None)
        tokens, cols = x_MK.shape
        require(1 <= tokens <= MAX_MATVEC_TOKENS, f"x: expected 1 to {MAX_MATVEC_TOKENS} rows, got {tokens}")
        require(offset(x_MK) == 0, "x: expected an address that is a multiple of 16")
        held = self._packed_rows(type_name, packed, cols)
        require(held == rows and rows > 0, f"packed: expected {rows} rows of {cols} weights, got {held}")
        self._check("out", out_MR, _ANY, tokens, rows, rows=True)
        row_tiles = 4 if rows >= MANY_ROWS else 1
        name = f"matvec_{type_name.lower()}_r{row_tiles}_t{1 if tokens <= 8 else 2}_{DTYPES[out_MR.dtype]}"
        steps = cols // SUPERBLOCK
        arguments: list[Argument] = [packed, rows * steps, steps, x_MK, tokens, rows, out_MR.stride(0), out_MR]
        return Launch(name, -(-rows // (16 * row_tiles)), arguments, [out_MR])

    @kernel
    def rms_norm(self, x_MH: Tensor, weight_H: Tensor, eps: float, out_MH: Tensor) -> Launch:
        """Write ``x / sqrt(mean(x^2) + eps) * weight``, in float32, rounded once; a block takes a row.

        Args:
            x_MH: bfloat16 or float32 ``[M, H]``, contiguous.
            weight_H: float32 ``[H]``.
            out_MH: bfloat16 or float32 ``[M, H]``, contiguous; may be ``x_MH``.
        """
        self._check("x", x_MH, _ANY, None, None)
        tokens, hidden = x_MH.shape
        self._check("weight", weight_H, _F32, hidden)
        self._check("out", out_MH, _ANY, tokens, hidden)
        width = 8 if hidden % 8 == 0 and is_wide(x_MH, weight_H, out_MH) else 1
        name = f"rms_norm_{DTYPES[x_MH.dtype]}_{DTYPES[out_MH.dtype]}_v{width}"
        return Launch(name, tokens if hidden else 0, [x_MH, weight_H, hidden, float(eps), out_MH], [out_MH])

    @kernel
    def add_rms_norm(
        self, residual_MH: Tensor, delta_MH: Tensor, weight_H: Tensor, eps: float, out_MH: Tensor
    ) -> Launch:
        """Add ``delta`` to ``residual`` in place, rounded to its type, and write the norm of the result.

        Args:
            residual_MH: bfloat16 or float32 ``[M, H]``, contiguous; updated.
            delta_MH: bfloat16 or float32 ``[M, H]``, contiguous.
            weight_H: float32 ``[H]``.
            out_MH: bfloat16 or float32 ``[M, H]``, contiguous.
        """
        self._check("residual", residual_MH, _ANY, None, None)
        tokens, hidden = residual_MH.shape
        self._check("delta", delta_MH, _ANY, tokens, hidden)
        self._check("weight", weight_H, _F32, hidden)
        self._check("out", out_MH, _ANY, tokens, hidden)
        width = 8 if hidden % 8 == 0 and is_wide(residual_MH, delta_MH, weight_H, out_MH) else 1
        types = "_".join(DTYPES[tensor.dtype] for tensor in (residual_MH, delta_MH, out_MH))
        arguments: list[Argument] = [residual_MH, delta_MH, weight_H, hidden, float(eps), out_MH]
        return Launch(f"add_rms_norm_{types}_v{width}", tokens if hidden else 0, arguments, [residual_MH, out_MH])

    @kernel
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
    ) -> Launch:
        """Rotate q and k in place, after an optional bias and an optional RMSNorm of each head, in that order.

        A head takes D / 16 lanes where that is a power of two, else a warp.

        Args:
            q_MND: bfloat16 or float32 ``[M, N, D]``; heads contiguous, rows may be apart (a fused product's columns).
            k_MKD: same type, ``[M, K, D]``.
            cos_TD, sin_TD: float32 ``[T, D/2]``, contiguous; row m is position ``m % T``.
            layout: ``split`` pairs (i, i + D/2), ``interleaved`` pairs (2i, 2i + 1).
            q_bias, k_bias: float32 ``[N * D]`` and ``[K * D]``.
            q_norm, k_norm: float32 ``[D]``.
            eps: added to the mean squares of the norms.
        """
        require(layout in ("split", "interleaved"), f"layout {layout}: expected split or interleaved")
        self._check("q", q_MND, _ANY, None, None, None, rows=True)
        tokens, q_heads, head_dim = q_MND.shape
        self._check("k", k_MKD, [q_MND.dtype], tokens, None, head_dim, rows=True)
        k_heads = k_MKD.shape[1]
        require(head_dim % 2 == 0, f"head dimension {head_dim}: expected an even one")
        self._check("cos", cos_TD, _F32, None, head_dim // 2)
        positions = len(cos_TD)
        self._check("sin", sin_TD, _F32, positions, head_dim // 2)
        require(positions > 0 and tokens % positions == 0, f"{tokens} rows of {positions} positions")
        for name, vector, length in (
            ("q_bias", q_bias, q_heads * head_dim),
            ("k_bias", k_bias, k_heads * head_dim),
            ("q_norm", q_norm, head_dim),
            ("k_norm", k_norm, head_dim),
        ):
            if vector is not None:
                self._check(name, vector, _F32, length)
        lanes = head_dim // 16
        wide = head_dim % 16 == 0 and lanes <= 32 and lanes & (lanes - 1) == 0
        wide = wide and is_wide(q_MND, k_MKD, cos_TD, sin_TD, q_bias, k_bias, q_norm, k_norm)
        threads = tokens * (q_heads + k_heads) * (lanes if wide else 32) if head_dim else 0
        arguments: list[Argument] = [q_MND, q_MND.stride(0), q_heads, q_bias, q_norm]
        arguments += [k_MKD, k_MKD.stride(0), k_heads, k_bias, k_norm]
        arguments += [cos_TD, sin_TD, positions, head_dim, float(eps), tokens]
        name = f"rope_{layout}_{DTYPES[q_MND.dtype]}_v{8 if wide else 1}"
        return Launch(name, blocks(threads), arguments, [q_MND, k_MKD])

    @kernel
    def swiglu(self, gate_up: Tensor, out_MF: Tensor) -> Launch:
        """Write ``silu(gate) * up``.

        Args:
            gate_up: bfloat16 or float32 ``[M, 2F]``, contiguous: gate columns, then up columns.
            out_MF: same type, ``[M, F]``, contiguous.
        """
        return self._gated("swiglu", gate_up, out_MF)

    @kernel
    def geglu(self, gate_up: Tensor, out_MF: Tensor) -> Launch:
        """Write ``gelu(gate) * up`` (by the tanh formula); tensors as ``swiglu``."""
        return self._gated("geglu", gate_up, out_MF)

    @kernel
    def add_bias(self, x_MC: Tensor, bias_C: Tensor) -> Launch:
        """Add a float32 ``[C]`` to every row of bfloat16 or float32 ``[M, C]``, in place; rows may be apart."""
        self._check("x", x_MC, _ANY, None, None, rows=True)
        tokens, columns = x_MC.shape
        self._check("bias", bias_C, _F32, columns)
        width = 8 if columns % 8 == 0 and is_wide(x_MC, bias_C) else 1
        name = f"add_bias_{DTYPES[x_MC.dtype]}_v{width}"
        return Launch(name, blocks(tokens * columns // width), [x_MC, x_MC.stride(0), bias_C, tokens, columns], [x_MC])

    def _gated(self, name: str, gate_up: Tensor, out_MF: Tensor) -> Launch:
        self._check("out", out_MF, _ANY, None, None)
        tokens, ffn = out_MF.shape
        self._check("gate_up", gate_up, [out_MF.dtype], tokens, 2 * ffn)
        width = 8 if ffn % 8 == 0 and is_wide(gate_up, out_MF) else 1
        entry = f"{name}_{DTYPES[out_MF.dtype]}_v{width}"
        return Launch(entry, blocks(tokens * ffn // width), [gate_up, tokens, ffn, out_MF], [out_MF])

    def _packed_rows(self, type_name: str, packed: Tensor, cols: int) -> int:
        """Check packed bytes and return how many rows of ``cols`` weights they are."""
        row_bytes = block_format("Q6_K" if type_name == Q6_K_SOA else type_name).row_bytes(cols)
        if type_name == Q6_K_SOA:
            self._check("packed", packed, (torch.uint8,), *[None] * packed.dim())
            require(packed.numel() % row_bytes == 0, f"packed: expected whole rows of {row_bytes} bytes")
        else:
            self._check("packed", packed, (torch.uint8,), None, row_bytes)
        if type_name in _ALIGNED_TYPES:
            require(offset(packed) == 0, "packed: expected an address that is a multiple of 16")
        return packed.numel() // row_bytes

    def _superblocks(self, name: str, packed: Tensor) -> int:
        """Check bytes of Q6_K and return how many superblocks they are."""
        self._check(name, packed, (torch.uint8,), *[None] * packed.dim())
        require(packed.numel() % _Q6_K_BYTES == 0, f"{name}: expected whole superblocks of {_Q6_K_BYTES} bytes")
        return packed.numel() // _Q6_K_BYTES


def _by_elements(weights: int, cols: int, packed: Tensor, out: Tensor) -> bool:
    """Return whether rows are decoded one element at a time, as only types without blocks can be."""
    if cols % weights == 0 and is_wide(out) and not (weights == 16 and offset(packed)):
        return False
    require(weights == 16, "out: expected an address that is a multiple of 16")
    return True
