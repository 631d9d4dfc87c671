"""Makes the C++ header of the IQ types' grids from the one table that the CPU's decoders read too."""

import numpy as np
import numpy.typing as npt

from q4kd.trainer.formats.blocks.grids import GRIDS

GRIDS_HEADER = "grids.cuh"
_A_LINE = 15


def grids_header() -> str:
    """Return the header: ``GRID_<name>``, at a multiple of 16 bytes, for each of ``GRIDS``.

    uint16 ``[points]`` of eight levels; for IQ3 uint16 ``[4 points]``, the four values of a point as bfloat16, which
    holds them exactly: its grids are small enough to be spread out in shared memory.
    """
    lines = [
        "// The grids of the IQ types; made from formats/blocks/grids.py, which says what they mean.",
        "#pragma once",
        "#ifdef __CUDACC__",
        "#define Q4KD_TABLE __device__ const",
        "#else",
        "#define Q4KD_TABLE static const",
        "#endif",
    ]
    for name, grid in GRIDS.items():
        codes = [f"0x{code:04X}" for code in (_bfloat16(grid.points()) if grid.width == 4 else grid.codes())]
        lines.append(f"alignas(16) Q4KD_TABLE unsigned short GRID_{name}[{len(codes)}] = {{")
        lines += [f"    {', '.join(codes[at : at + _A_LINE])}," for at in range(0, len(codes), _A_LINE)]
        lines.append("};")
    return "\n".join(lines) + "\n"


def _bfloat16(values: npt.NDArray[np.int8]) -> npt.NDArray[np.uint16]:
    """Return whole numbers below 2^8 as the upper halves of their float32, uint16, flat."""
    return np.asarray(values.astype(np.float32).view(np.uint32).ravel() >> 16, np.uint16)
