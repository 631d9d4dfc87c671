"""What a kernel call needs to know besides addresses, checked once: which kernel, how many blocks, which arguments.

A plan is made from ``Facts``, everything about a tensor but its address, so it holds for every call with equal facts.
The public description of each call is in ``kernels.py``. Letters in shapes: M tokens, R rows (outputs), K columns
(inputs), H hidden size, F feed-forward size, N query heads, D head dimension, T positions.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from q4kd.trainer.cuda.launch import THREADS
from q4kd.trainer.formats import SUPERBLOCK, block_format

Q6_K_SOA = "Q6_K_SOA"  # Q6_K repacked by ``repack_q6_k``: the same bytes, every part aligned
MAX_MATVEC_TOKENS = 16

DTYPES = {torch.bfloat16: "bf16", torch.float32: "f32"}
# Types without blocks go sixteen elements at a time where rows allow it: weights of one such step, threads it takes.
_STEPS = {"F16": (16, 1), "BF16": (16, 1), "F32": (16, 1), "Q8_0": (32, 2), "Q4_0": (32, 2), "Q5_0": (32, 2)}
_SUPERBLOCK_STEP = (SUPERBLOCK, 16)
_ALIGNED_TYPES = ("Q4_K", "Q5_K", Q6_K_SOA)
# From this many rows, blocks of four row tiles fill an H200's 132 multiprocessors and share what they read of x.
MANY_ROWS = 8192


class Facts(NamedTuple):
    """A tensor without its address; ``offset`` is that address modulo 16."""

    dtype: torch.dtype
    shape: torch.Size
    strides: tuple[int, ...]
    device: torch.device
    offset: int

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def is_contiguous(self, first_dim: int = 0) -> bool:
        """Whether the dimensions from ``first_dim`` on are contiguous."""
        expected = 1
        for length, stride in zip(reversed(self.shape[first_dim:]), reversed(self.strides[first_dim:]), strict=True):
            if length != 1 and stride != expected:
                return self.size == 0
            expected *= length
        return True


Planned = Facts | int | float | None


@dataclass(frozen=True)
class Plan:
    """A checked call; ``Facts`` among the arguments stand for the tensors they describe.

    Attributes:
        kernel: its name.
        grid: blocks of 256 threads; 0 where there is nothing to do.
        arguments: in the kernel's order.
        writes: those of ``arguments`` that the kernel writes.
    """

    kernel: str
    grid: int
    arguments: Sequence[Planned]
    writes: Sequence[Facts]


def require(condition: bool, message: str) -> None:
    """Raise ``ValueError`` with ``message`` unless ``condition``."""
    if not condition:
        raise ValueError(message)


def _blocks(threads: int) -> int:
    return -(-threads // THREADS)


def _is_wide(*tensors: Facts | None) -> bool:
    """Whether eight elements at a time may be read from each: 16-byte addresses, and rows whole multiples of eight."""
    return all(
        tensor is None or (tensor.offset == 0 and all(stride % 8 == 0 or stride == 1 for stride in tensor.strides))
        for tensor in tensors
    )


def _check(
    device: torch.device,
    name: str,
    tensor: Facts,
    dtypes: Sequence[torch.dtype],
    *shape: int | None,
    rows: bool = False,
) -> None:
    """Require a device, a dtype, a shape (``None``: any length) and contiguity.

    With ``rows``, only every row must be contiguous; the stride between them is free, as long as they do not overlap.
    """
    fits = len(tensor.shape) == len(shape) and all(
        want is None or want == have for want, have in zip(shape, tensor.shape, strict=True)
    )
    require(
        fits and tensor.dtype in dtypes and tensor.device == device,
        f"{name}: expected {[str(dtype) for dtype in dtypes]} {list(shape)} on {device}, "
        f"got {tensor.dtype} {list(tensor.shape)} on {tensor.device}",
    )
    apart = not rows or tensor.shape[0] <= 1 or tensor.size == 0 or tensor.strides[0] >= math.prod(tensor.shape[1:])
    require(
        tensor.is_contiguous(1 if rows else 0) and apart,
        f"{name}: expected {'rows contiguous in themselves' if rows else 'a contiguous tensor'}, "
        f"got strides {tensor.strides}",
    )


def packed_rows(device: torch.device, type_name: str, packed: Facts, cols: int) -> int:
    """Check packed bytes and return how many rows of ``cols`` weights they are."""
    row_bytes = block_format("Q6_K" if type_name == Q6_K_SOA else type_name).row_bytes(cols)
    if type_name == Q6_K_SOA:
        require(packed.is_contiguous() and packed.dtype == torch.uint8, "packed: expected contiguous uint8")
        require(packed.device == device, f"packed: expected {device}, got {packed.device}")
        require(packed.size % row_bytes == 0, f"packed: expected whole rows of {row_bytes} bytes")
    else:
        _check(device, "packed", packed, [torch.uint8], None, row_bytes)
    if type_name in _ALIGNED_TYPES:
        require(packed.offset == 0, "packed: expected an address that is a multiple of 16")
    return packed.size // row_bytes


def decode(
    device: torch.device, type_name: str, packed: Facts, row_start: int, row_stop: int, cols: int, out: Facts
) -> Plan:
    """Plan ``Kernels.decode``: in runs, by blocks or steps, or one element at a time."""
    rows = packed_rows(device, type_name, packed, cols)
    require(0 <= row_start <= row_stop <= rows, f"rows {row_start}:{row_stop} of {rows}")
    _check(device, "out", out, list(DTYPES), row_stop - row_start, cols)
    weights, tasks = _STEPS.get(type_name, _SUPERBLOCK_STEP)
    name, suffix = f"decode_{type_name.lower()}", DTYPES[out.dtype]
    if cols % weights or not _is_wide(out) or (weights == 16 and packed.offset):
        require(weights == 16, "out: expected an address that is a multiple of 16")
        first, count = row_start * cols, (row_stop - row_start) * cols
        return Plan(f"{name}_elements_{suffix}", _blocks(count), [packed, first, count, out], [out])
    steps = cols // weights
    first, count = row_start * steps, (row_stop - row_start) * steps
    if type_name == "Q8_0" and first % 8 == 0 and count % 8 == 0 and packed.offset == 0:
        return Plan(f"{name}_run_{suffix}", _blocks(count), [packed, first, count, out], [out])
    return Plan(f"{name}_{suffix}", _blocks(count * tasks), [packed, rows * steps, first, count, out], [out])


def gather(device: torch.device, type_name: str, packed: Facts, cols: int, ids: Facts, out: Facts) -> Plan:
    """Plan ``Kernels.gather``."""
    rows = packed_rows(device, type_name, packed, cols)
    _check(device, "ids", ids, [torch.int64], None)
    count = ids.size
    _check(device, "out", out, list(DTYPES), count, cols)
    weights, tasks = _STEPS.get(type_name, _SUPERBLOCK_STEP)
    name, suffix = f"gather_{type_name.lower()}", DTYPES[out.dtype]
    if cols % weights or not _is_wide(out) or (weights == 16 and packed.offset):
        require(weights == 16, "out: expected an address that is a multiple of 16")
        return Plan(f"{name}_elements_{suffix}", _blocks(count * cols), [packed, rows, cols, ids, count, out], [out])
    steps = cols // weights
    threads = count * steps * tasks
    return Plan(f"{name}_{suffix}", _blocks(threads), [packed, rows * steps, steps, ids, count, out], [out])


def repack_q6_k(device: torch.device, packed: Facts, out: Facts, first_block: int) -> Plan:
    """Plan ``Kernels.repack_q6_k``."""
    block_bytes = block_format("Q6_K").block_bytes
    for name, tensor in (("packed", packed), ("out", out)):
        require(
            tensor.dtype == torch.uint8 and tensor.is_contiguous() and tensor.device == device,
            f"{name}: expected contiguous uint8 on {device}",
        )
        require(tensor.size % block_bytes == 0, f"{name}: expected whole superblocks of {block_bytes} bytes")
    count, total = packed.size // block_bytes, out.size // block_bytes
    require(0 <= first_block <= total - count, f"superblocks {first_block}:{first_block + count} of {total}")
    require(out.offset == 0 and packed.offset % 2 == 0, "expected addresses aligned to 16 and to 2")
    return Plan("repack_q6_k", _blocks(count * 105), [packed, count, total, first_block, out], [out])


def unpack_q6_k(device: torch.device, soa: Facts, out: Facts) -> Plan:
    """Plan ``Kernels.unpack_q6_k``; ``out`` has the facts of ``soa``."""
    blocks = packed_rows(device, Q6_K_SOA, soa, SUPERBLOCK)
    return Plan("unpack_q6_k", _blocks(blocks * 105), [soa, blocks, out], [out])


def matvec(device: torch.device, type_name: str, packed: Facts, x_MK: Facts, rows: int, out_MR: Facts) -> Plan:
    """Plan ``Kernels.matvec``."""
    require(type_name in ("Q4_K", Q6_K_SOA), f"matvec of {type_name}: expected Q4_K or {Q6_K_SOA}")
    _check(device, "x", x_MK, [torch.bfloat16], None, None)
    tokens, cols = x_MK.shape
    require(1 <= tokens <= MAX_MATVEC_TOKENS, f"x: expected 1 to {MAX_MATVEC_TOKENS} rows, got {tokens}")
    require(x_MK.offset == 0, "x: expected an address that is a multiple of 16")
    held = packed_rows(device, type_name, packed, cols)
    require(held == rows and rows > 0, f"packed: expected {rows} rows of {cols} weights, got {held}")
    _check(device, "out", out_MR, list(DTYPES), tokens, rows, rows=True)
    row_tiles = 4 if rows >= MANY_ROWS else 1
    name = f"matvec_{type_name.lower()}_r{row_tiles}_t{1 if tokens <= 8 else 2}_{DTYPES[out_MR.dtype]}"
    steps = cols // SUPERBLOCK
    arguments: list[Planned] = [packed, rows * steps, steps, x_MK, tokens, rows, out_MR.strides[0], out_MR]
    return Plan(name, -(-rows // (16 * row_tiles)), arguments, [out_MR])


def rms_norm(device: torch.device, x_MH: Facts, weight_H: Facts, eps: float, out_MH: Facts) -> Plan:
    """Plan ``Kernels.rms_norm``: a block a row."""
    _check(device, "x", x_MH, list(DTYPES), None, None)
    tokens, hidden = x_MH.shape
    _check(device, "weight", weight_H, [torch.float32], hidden)
    _check(device, "out", out_MH, list(DTYPES), tokens, hidden)
    width = 8 if hidden % 8 == 0 and _is_wide(x_MH, weight_H, out_MH) else 1
    name = f"rms_norm_{DTYPES[x_MH.dtype]}_{DTYPES[out_MH.dtype]}_v{width}"
    return Plan(name, tokens if hidden else 0, [x_MH, weight_H, hidden, float(eps), out_MH], [out_MH])


def add_rms_norm(
    device: torch.device, residual_MH: Facts, delta_MH: Facts, weight_H: Facts, eps: float, out_MH: Facts
) -> Plan:
    """Plan ``Kernels.add_rms_norm``: a block a row."""
    _check(device, "residual", residual_MH, list(DTYPES), None, None)
    tokens, hidden = residual_MH.shape
    _check(device, "delta", delta_MH, list(DTYPES), tokens, hidden)
    _check(device, "weight", weight_H, [torch.float32], hidden)
    _check(device, "out", out_MH, list(DTYPES), tokens, hidden)
    width = 8 if hidden % 8 == 0 and _is_wide(residual_MH, delta_MH, weight_H, out_MH) else 1
    types = "_".join(DTYPES[tensor.dtype] for tensor in (residual_MH, delta_MH, out_MH))
    arguments: list[Planned] = [residual_MH, delta_MH, weight_H, hidden, float(eps), out_MH]
    return Plan(f"add_rms_norm_{types}_v{width}", tokens if hidden else 0, arguments, [residual_MH, out_MH])


def rope(
    device: torch.device,
    q_MND: Facts,
    k_MKD: Facts,
    cos_TD: Facts,
    sin_TD: Facts,
    layout: str,
    q_bias: Facts | None,
    k_bias: Facts | None,
    q_norm: Facts | None,
    k_norm: Facts | None,
    eps: float,
) -> Plan:
    """Plan ``Kernels.rope``: D / 16 lanes a head where that is a power of two, else a warp a head."""
    require(layout in ("split", "interleaved"), f"layout {layout}: expected split or interleaved")
    require(q_MND.dtype in DTYPES, f"q: expected bfloat16 or float32, got {q_MND.dtype}")
    _check(device, "q", q_MND, [q_MND.dtype], None, None, None, rows=True)
    tokens, q_heads, head_dim = q_MND.shape
    _check(device, "k", k_MKD, [q_MND.dtype], tokens, None, head_dim, rows=True)
    k_heads = k_MKD.shape[1]
    require(head_dim % 2 == 0, f"head dimension {head_dim}: expected an even one")
    _check(device, "cos", cos_TD, [torch.float32], None, head_dim // 2)
    positions = cos_TD.shape[0]
    _check(device, "sin", sin_TD, [torch.float32], positions, head_dim // 2)
    require(positions > 0 and tokens % positions == 0, f"{tokens} rows of {positions} positions")
    for name, vector, length in (
        ("q_bias", q_bias, q_heads * head_dim),
        ("k_bias", k_bias, k_heads * head_dim),
        ("q_norm", q_norm, head_dim),
        ("k_norm", k_norm, head_dim),
    ):
        if vector is not None:
            _check(device, name, vector, [torch.float32], length)
    lanes = head_dim // 16
    wide = head_dim % 16 == 0 and lanes <= 32 and lanes & (lanes - 1) == 0
    wide = wide and _is_wide(q_MND, k_MKD, cos_TD, sin_TD, q_bias, k_bias, q_norm, k_norm)
    name = f"rope_{layout}_{DTYPES[q_MND.dtype]}_v{8 if wide else 1}"
    threads = tokens * (q_heads + k_heads) * (lanes if wide else 32) if head_dim else 0
    arguments: list[Planned] = [q_MND, q_MND.strides[0], q_heads, q_bias, q_norm]
    arguments += [k_MKD, k_MKD.strides[0], k_heads, k_bias, k_norm]
    arguments += [cos_TD, sin_TD, positions, head_dim, float(eps), tokens]
    return Plan(name, _blocks(threads), arguments, [q_MND, k_MKD])


def swiglu(device: torch.device, gate_up: Facts, out_MF: Facts) -> Plan:
    """Plan ``Kernels.swiglu``."""
    _check(device, "out", out_MF, list(DTYPES), None, None)
    tokens, ffn = out_MF.shape
    _check(device, "gate_up", gate_up, [out_MF.dtype], tokens, 2 * ffn)
    width = 8 if ffn % 8 == 0 and _is_wide(gate_up, out_MF) else 1
    name = f"swiglu_{DTYPES[out_MF.dtype]}_v{width}"
    return Plan(name, _blocks(tokens * ffn // width), [gate_up, tokens, ffn, out_MF], [out_MF])


def add_bias(device: torch.device, x_MC: Facts, bias_C: Facts) -> Plan:
    """Plan ``Kernels.add_bias``."""
    _check(device, "x", x_MC, list(DTYPES), None, None, rows=True)
    tokens, columns = x_MC.shape
    _check(device, "bias", bias_C, [torch.float32], columns)
    width = 8 if columns % 8 == 0 and _is_wide(x_MC, bias_C) else 1
    name = f"add_bias_{DTYPES[x_MC.dtype]}_v{width}"
    arguments: list[Planned] = [x_MC, x_MC.strides[0], bias_C, tokens, columns]
    return Plan(name, _blocks(tokens * columns // width), arguments, [x_MC])
