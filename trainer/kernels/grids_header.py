"""Makes the C++ header of the IQ types' grids from the one table that the CPU's decoders read too."""

from q4kd.trainer.formats.blocks.grids import GRIDS

GRIDS_HEADER = "grids.cuh"
_A_LINE = 15


def grids_header() -> str:
    """Return the header: ``GRID_<name>``, uint16 ``[points]`` at a multiple of 16 bytes, for each of ``GRIDS``."""
    lines = [
        "// The grids of the IQ types, 16 bits a point; made from formats/blocks/grids.py, which says what they mean.",
        "#pragma once",
        "#ifdef __CUDACC__",
        "#define Q4KD_TABLE __device__ const",
        "#else",
        "#define Q4KD_TABLE static const",
        "#endif",
    ]
    for name, grid in GRIDS.items():
        codes = [f"0x{code:04X}" for code in grid.codes()]
        lines.append(f"alignas(16) Q4KD_TABLE unsigned short GRID_{name}[{len(codes)}] = {{")
        lines += [f"    {', '.join(codes[at : at + _A_LINE])}," for at in range(0, len(codes), _A_LINE)]
        lines.append("};")
    return "\n".join(lines) + "\n"
