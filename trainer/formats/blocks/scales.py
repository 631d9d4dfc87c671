"""Finds scales that are not finite: one NaN in a block's float16 scale makes every logit NaN, so a load checks them.

Only the scales' own bytes are read, and nothing is decoded. A weight is finite when its block's scales are, since the
largest product of a float16 scale, a stored integer scale and a quant is below 1e9.
"""

import numpy as np
import numpy.typing as npt

from q4kd.trainer.formats.blocks.layout import block_format

# So many bytes are checked at once, which bounds what a check allocates whatever the tensor's size.
_CHUNK_BYTES = 8 << 20
# Each type has the offsets of a block's floating-point numbers, their unsigned storage, and the bits of their exponent.
FLOATS: dict[str, tuple[tuple[int, ...], type[np.unsignedinteger], int]] = {
    "Q4_K": ((0, 2), np.uint16, 0x7C00),
    "Q5_K": ((0, 2), np.uint16, 0x7C00),
    "Q6_K": ((208,), np.uint16, 0x7C00),
    "Q8_0": ((0,), np.uint16, 0x7C00),
    "Q5_0": ((0,), np.uint16, 0x7C00),
    "Q4_0": ((0,), np.uint16, 0x7C00),
    "Q4_1": ((0, 2), np.uint16, 0x7C00),
    "Q5_1": ((0, 2), np.uint16, 0x7C00),
    "Q2_K": ((80, 82), np.uint16, 0x7C00),
    "Q3_K": ((108,), np.uint16, 0x7C00),
    "IQ4_NL": ((0,), np.uint16, 0x7C00),
    "IQ4_XS": ((0,), np.uint16, 0x7C00),
    "BF16": ((0,), np.uint16, 0x7F80),
    "F16": ((0,), np.uint16, 0x7C00),
    "F32": ((0,), np.uint32, 0x7F800000),
}


def check_scales(type_name: str, packed: npt.NDArray[np.uint8]) -> int:
    """Return how many blocks have a scale that is NaN or infinite; for F32, F16 and BF16, how many values are.

    ``packed`` is uint8, contiguous, a whole number of blocks.

    Raises:
        InputError: when the type is not supported.
    """
    size = block_format(type_name).block_bytes
    offsets, storage, exponent = FLOATS[type_name]
    blocks = packed.reshape(-1, size)
    width = np.dtype(storage).itemsize
    count, step = 0, _CHUNK_BYTES // size
    for start in range(0, len(blocks), step):
        piece = blocks[start : start + step]
        # An exponent of all ones is an infinity or a NaN.
        bad = [(piece[:, at : at + width].view(storage)[:, 0] & exponent) == exponent for at in offsets]
        count += int(np.count_nonzero(bad[0] if len(bad) == 1 else np.logical_or(*bad)))
    return count
