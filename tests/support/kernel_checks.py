"""What every kernel must compute, whatever runs it: the host (test_kernels_host.py) or a GPU (test_kernels_gpu.py).

References are gguf's decoders and float64 arithmetic. Outputs are poisoned with NaN and surrounded by guard elements.
"""

import gguf
import numpy as np
import torch
from torch import Tensor

from q4kd.trainer.formats.blocks.layout import FORMATS
from q4kd.trainer.kernels.teacher_kernels import Kernels

BLOCK_TYPES = ("Q4_K", "Q5_K", "Q6_K", "Q8_0", "Q4_0", "Q5_0")
BLOCK_TYPES += ("Q4_1", "Q5_1", "Q2_K", "Q3_K", "IQ4_NL", "IQ4_XS")
BLOCK_TYPES += ("IQ3_S", "IQ3_XXS", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_S", "IQ1_M", "MXFP4", "NVFP4", "TQ1_0", "TQ2_0")
ELEMENT_TYPES = ("F16", "BF16", "F32")
TYPES = (*BLOCK_TYPES, *ELEMENT_TYPES)
DTYPES = (torch.bfloat16, torch.float32)
GUARD = 24
# Where a block's f16 numbers lie.
D_OFFSETS = {"Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "Q8_0": (0,), "Q4_0": (0,), "Q5_0": (0,)}
D_OFFSETS |= {"Q4_1": (0, 2), "Q5_1": (0, 2), "Q2_K": (80, 82), "Q3_K": (108,), "IQ4_NL": (0,), "IQ4_XS": (0,)}
D_OFFSETS |= dict.fromkeys(("IQ3_S", "IQ3_XXS", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_S"), (0,))
D_OFFSETS |= {"TQ1_0": (52,), "TQ2_0": (64,), "IQ1_M": (), "MXFP4": (), "NVFP4": ()}  # all bytes of the last are scales
EXTREME_SCALES = (0x0000, 0x8000, 0x0001, 0x8001, 0x03FF, 0x0400, 0x7BFF, 0xFBFF, 0x7C00, 0xFC00, 0x7E01, 0x3C00)


def random_blocks(name: str, rows: int, cols: int, seed: int, *, extreme: bool = True) -> np.ndarray:
    """Random bytes ``[rows, row_bytes]``; with ``extreme``, a third of the scales are 0, tiny, infinite or NaN.

    Without it, scales are ordinary numbers near 2^-6 so that sums stay finite.
    """
    rng = np.random.default_rng(seed)
    form = FORMATS[name]
    packed = rng.integers(0, 256, (rows, form.row_bytes(cols)), dtype=np.uint8)
    if name in ELEMENT_TYPES:
        return packed
    blocks = packed.reshape(-1, form.block_bytes)
    for offset in D_OFFSETS[name]:
        scales = blocks[:, offset : offset + 2]
        if extreme:
            chosen = rng.random(len(blocks)) < 1 / 3
            values = rng.choice(np.array(EXTREME_SCALES, np.uint16), len(blocks))
        else:
            chosen = np.ones(len(blocks), bool)
            values = (rng.normal(0.0, 2.0**-6, len(blocks))).astype(np.float16).view(np.uint16)
        scales[chosen] = values[chosen, None].view(np.uint8)
    if extreme and name in ("MXFP4", "NVFP4"):  # scales that are subnormal, infinite with some quants, or no number
        blocks[::3, 0] = np.resize(np.array([0, 1, 2, 0x7F, 0xFD, 0xFF], np.uint8), len(blocks[::3]))
    return packed


def expected(name: str, packed: np.ndarray) -> np.ndarray:
    """gguf's own decoding, float32 ``[rows, cols]``."""
    with np.errstate(all="ignore"):
        decoded = gguf.quants.dequantize(packed, getattr(gguf.GGMLQuantizationType, name))
    return decoded.reshape(len(packed), -1)


def poisoned(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """An output full of NaN and, as a second tensor, the buffer it lies in, with guard elements around it."""
    size = int(np.prod(shape))
    buffer = torch.full((size + 2 * GUARD,), torch.nan, dtype=dtype, device=device)
    buffer[:GUARD] = 7.0
    buffer[GUARD + size :] = 7.0
    return buffer[GUARD : GUARD + size].view(shape), buffer


def assert_guarded(buffer: Tensor) -> None:
    assert (buffer[:GUARD] == 7.0).all()
    assert (buffer[-GUARD:] == 7.0).all()


def assert_same_bits(got: Tensor, want_f32: np.ndarray) -> None:
    """Equal to the last bit, after rounding to nearest even if ``got`` is bfloat16; NaN payloads aside."""
    if got.dtype == torch.float32:
        have, bits = got.cpu().numpy().view(np.uint32), want_f32.view(np.uint32)
        nan = np.isnan(got.cpu().numpy())
    else:
        words = want_f32.view(np.uint32).astype(np.uint64)
        bits = ((words + 0x7FFF + ((words >> 16) & 1)) >> 16).astype(np.uint16)
        have = got.cpu().view(torch.int16).numpy().view(np.uint16)
        nan = got.cpu().isnan().numpy()
    want_nan = np.isnan(want_f32)
    assert (nan == want_nan).all()
    wrong = (have != bits) & ~want_nan
    assert not wrong.any(), f"{wrong.sum()} of {wrong.size} differ, first at {np.argwhere(wrong)[0]}"


def relative_error(got: Tensor, want: Tensor) -> float:
    """‖got - want‖ / ‖want‖ in float64; NaN if anything is."""
    got, want = got.double().cpu(), want.double().cpu()
    return float((got - want).norm() / want.norm())


def decode_rows_match(kernels: Kernels, name: str, rows: int, cols: int, dtype: torch.dtype, seed: int) -> None:
    packed = random_blocks(name, rows, cols, seed)
    on_device = torch.from_numpy(packed).to(kernels.device)
    start, stop = rows // 3, rows - rows // 4
    for first, last in ((0, rows), (start, stop), (rows - 1, rows)):
        out, buffer = poisoned((last - first, cols), dtype, kernels.device)
        kernels.decode(name, on_device, first, last, cols, out)
        assert_same_bits(out, expected(name, packed)[first:last])
        assert_guarded(buffer)


def decode_repacked_matches(kernels: Kernels, rows: int, cols: int, dtype: torch.dtype, seed: int) -> None:
    packed = random_blocks("Q6_K", rows, cols, seed)
    on_device = torch.from_numpy(packed).to(kernels.device)
    soa = kernels.repack_q6_k(on_device)
    assert soa.shape == on_device.shape
    assert torch.equal(kernels.unpack_q6_k(soa), on_device)
    in_parts = torch.full_like(soa, 0xA5)
    cut = rows // 2
    kernels.repack_q6_k(on_device[:cut], in_parts, 0)
    kernels.repack_q6_k(on_device[cut:], in_parts, cut * cols // 256)
    assert torch.equal(in_parts, soa)
    for first, last in ((0, rows), (1, rows), (rows - 1, rows)):
        out, buffer = poisoned((last - first, cols), dtype, kernels.device)
        kernels.decode("Q6_K_SOA", soa, first, last, cols, out)
        assert_same_bits(out, expected("Q6_K", packed)[first:last])
        assert_guarded(buffer)


def gather_matches(kernels: Kernels, name: str, rows: int, cols: int, dtype: torch.dtype, seed: int) -> None:
    packed = random_blocks(name, rows, cols, seed)
    on_device = torch.from_numpy(packed).to(kernels.device)
    ids = np.array([rows - 1, 0, 0, rows // 2, -1, rows, 1 << 40], np.int64)
    inside = (ids >= 0) & (ids < rows)
    want = np.full((len(ids), cols), np.nan, np.float32)
    want[inside] = expected(name, packed)[ids[inside]]
    layouts = [(name, on_device)] + ([("Q6_K_SOA", kernels.repack_q6_k(on_device))] if name == "Q6_K" else [])
    for layout, data in layouts:
        out, buffer = poisoned((len(ids), cols), dtype, kernels.device)
        out[~torch.from_numpy(inside)] = 0.0  # ids that do not exist must be overwritten with NaN
        kernels.gather(layout, data, cols, torch.from_numpy(ids).to(kernels.device), out)
        assert_same_bits(out, want)
        assert_guarded(buffer)


def rounding_matches(kernels: Kernels, step: int) -> None:
    """float32 to bfloat16 over bit patterns ``step`` apart, and the ties around every one of them."""
    bits = np.arange(0, 1 << 32, step, dtype=np.uint64)
    patterns = np.unique(np.concatenate([bits, bits | 0x7FFF, bits | 0x8000, bits | 0x8001]) & 0xFFFFFFFF)
    patterns = patterns[: len(patterns) // 16 * 16].astype(np.uint32)
    packed = patterns.view(np.uint8).reshape(1, -1)
    out, buffer = poisoned((1, len(patterns)), torch.bfloat16, kernels.device)
    kernels.decode("F32", torch.from_numpy(packed).to(kernels.device), 0, 1, len(patterns), out)
    assert_same_bits(out, patterns.view(np.float32).reshape(1, -1))
    assert_guarded(buffer)


def matvec_matches(
    kernels: Kernels, name: str, tokens: int, rows: int, cols: int, dtype: torch.dtype, seed: int
) -> None:
    packed = random_blocks(name, rows, cols, seed, extreme=False)
    data = torch.from_numpy(packed).to(kernels.device)
    layout = name
    if name == "Q6_K":
        layout, data = "Q6_K_SOA", kernels.repack_q6_k(data)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, cols, generator=generator).bfloat16()
    x[:, 0] = 30.0  # a sum far from zero: minimums and offsets must cancel exactly
    want = x.double() @ torch.from_numpy(expected(name, packed)).double().T
    wide = torch.full((tokens, rows + 10), 7.0, dtype=dtype, device=kernels.device)
    out = wide[:, 5 : 5 + rows]
    out.fill_(torch.nan)
    kernels.matvec(layout, data, x.to(kernels.device), rows, out)
    bound = 2e-3 if dtype == torch.float32 else 5e-3  # one more rounding to 8 bits
    error = relative_error(out, want)
    assert error <= bound, error
    if dtype == torch.float32:
        # Quants enter exactly, so only float32 accumulation is left.
        assert relative_error(out, want) <= 1e-5
        assert float((out.cpu() - want).abs().max() / want.abs().max()) <= 1e-5
    assert (wide[:, :5] == 7.0).all()
    assert (wide[:, 5 + rows :] == 7.0).all()


def norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x = x.double()
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()


# Rounding to bfloat16's 8 significant bits is at most 2^-8 relative;
# float32 sums of a few thousand terms stay near 1e-6.
BOUNDS = {torch.bfloat16: 2.0**-8, torch.float32: 3e-6}


def within_rounding(got: Tensor, want: Tensor) -> None:
    """Every element within its type's rounding of the float64 reference; NaN never passes."""
    bound = BOUNDS[got.dtype]
    got, want = got.double().cpu(), want.double().cpu()
    # Where the reference nearly cancels, float32's own error is relative to the terms, not to their difference.
    error = (got - want).abs() - 1.01 * bound * want.abs() - 4e-6 * want.abs().max()
    assert bool((error <= 0).all()), f"{float(error.max())} over the bound"


def norms_match(
    kernels: Kernels, tokens: int, hidden: int, x_type: torch.dtype, delta_type: torch.dtype, out_type: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(hidden)
    x = (torch.randn(tokens, hidden, generator=generator) * 3).to(x_type)
    x[0] *= 1e-4  # where eps matters
    delta = torch.randn(tokens, hidden, generator=generator).to(delta_type)
    weight = torch.randn(hidden, generator=generator)
    eps = 1e-6
    device = kernels.device
    out, buffer = poisoned((tokens, hidden), out_type, device)
    kernels.rms_norm(x.to(device), weight.to(device), eps, out)
    within_rounding(out, norm_reference(x, weight, eps))
    assert_guarded(buffer)

    residual, residual_buffer = poisoned((tokens, hidden), x_type, device)
    residual.copy_(x)
    out, buffer = poisoned((tokens, hidden), out_type, device)
    kernels.add_rms_norm(residual, delta.to(device), weight.to(device), eps, out)
    summed = (x.float() + delta.float()).to(x_type)
    assert torch.equal(residual.cpu(), summed)
    within_rounding(out, norm_reference(summed, weight, eps))
    assert_guarded(buffer)
    assert_guarded(residual_buffer)


def rotate_reference(x_MND: Tensor, cos_TD: Tensor, sin_TD: Tensor, layout: str) -> Tensor:
    tokens, _, head_dim = x_MND.shape
    repeats = tokens // len(cos_TD)
    cos, sin = (table.double().repeat(repeats, 1)[:, None] for table in (cos_TD, sin_TD))
    x = x_MND.double()
    if layout == "split":
        a, b = x[..., : head_dim // 2], x[..., head_dim // 2 :]
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)


def rope_matches(
    kernels: Kernels,
    layout: str,
    head_dim: int,
    dtype: torch.dtype,
    *,
    bias: bool,
    norm: bool,
    heads: tuple[int, int] = (3, 1),
    positions: int = 5,
    batch: int = 2,
    pad: int = 0,
) -> None:
    q_heads, k_heads = heads
    tokens, eps = batch * positions, 1e-6
    generator = torch.Generator().manual_seed(head_dim)
    width = (q_heads + 2 * k_heads) * head_dim + pad
    fused = torch.randn(tokens, width, generator=generator).to(dtype)
    angles = torch.rand(positions, head_dim // 2, generator=generator) * 6.3
    cos, sin = angles.cos(), angles.sin()
    vectors = [torch.randn(length * head_dim, generator=generator) for length in (q_heads, k_heads, 1, 1)]
    chosen = [vectors[0] if bias else None, vectors[1] if bias else None]
    chosen += [vectors[2] if norm else None, vectors[3] if norm else None]

    on_device = fused.clone().to(kernels.device)
    ends = q_heads * head_dim, (q_heads + k_heads) * head_dim
    q = on_device[:, : ends[0]].unflatten(1, (q_heads, head_dim))
    k = on_device[:, ends[0] : ends[1]].unflatten(1, (k_heads, head_dim))
    q_bias, k_bias, q_norm, k_norm = (None if vector is None else vector.to(kernels.device) for vector in chosen)
    tables = cos.to(kernels.device), sin.to(kernels.device)
    kernels.rope(q, k, *tables, layout, q_bias=q_bias, k_bias=k_bias, q_norm=q_norm, k_norm=k_norm, eps=eps)

    for got, start, count, added, weight in (
        (q, 0, q_heads, chosen[0], chosen[2]),
        (k, ends[0], k_heads, chosen[1], chosen[3]),
    ):
        want = fused[:, start : start + count * head_dim].double()
        if added is not None:
            want = want + added.double()
        want = want.unflatten(1, (count, head_dim))
        if weight is not None:
            want = norm_reference(want, weight, eps)
        within_rounding(got, rotate_reference(want, cos, sin, layout))
    assert torch.equal(on_device[:, ends[1] :].cpu(), fused[:, ends[1] :])


def swiglu_matches(kernels: Kernels, tokens: int, ffn: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(ffn)
    gate_up = (torch.randn(tokens, 2 * ffn, generator=generator) * 4).to(dtype)
    gate_up[0, 0] = -200.0  # exp overflows float32: silu is zero there
    gate, up = gate_up.double().chunk(2, -1)
    out, buffer = poisoned((tokens, ffn), dtype, kernels.device)
    kernels.swiglu(gate_up.to(kernels.device), out)
    within_rounding(out, gate * torch.sigmoid(gate) * up)
    assert_guarded(buffer)
    kernels.geglu(gate_up.to(kernels.device), out)
    wide = 1 + torch.tanh((2 / torch.pi) ** 0.5 * (gate + 0.044715 * gate**3))
    within_rounding(out, 0.5 * gate * wide * up)
    assert_guarded(buffer)


def bias_matches(kernels: Kernels, tokens: int, columns: int, offset: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(columns)
    wide = torch.randn(tokens, offset + columns + 8, generator=generator).to(dtype)
    bias = torch.randn(columns, generator=generator)
    on_device = wide.clone().to(kernels.device)
    kernels.add_bias(on_device[:, offset : offset + columns], bias.to(kernels.device))
    want = wide.clone()
    want[:, offset : offset + columns] = (wide[:, offset : offset + columns].float() + bias).to(dtype)
    assert torch.equal(on_device.cpu(), want)
