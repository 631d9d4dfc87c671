"""Block sizes of the GGML types; torch is not imported, so that a file can be inspected without it.

Sizes are those of llama.cpp's ``ggml-common.h``; a superblock is 256 weights.
"""

from dataclasses import dataclass

from q4kd.trainer.errors import InputError

SUPERBLOCK = 256


@dataclass(frozen=True)
class BlockFormat:
    """Storage of a GGML type: blocks of ``block_size`` weights in ``block_bytes`` bytes each."""

    name: str
    block_size: int
    block_bytes: int

    @property
    def is_quantized(self) -> bool:
        """Return whether decoding enlarges it, as it does every type with blocks; the harness forbids that."""
        return self.block_size > 1

    def row_bytes(self, cols: int) -> int:
        """Return the bytes of a row of ``cols`` weights.

        Raises:
            InputError: when ``cols`` is not a whole number of blocks.
        """
        if cols <= 0 or cols % self.block_size:
            expected = f"a multiple of {self.block_size} weights"
            raise InputError(f"{self.name} row", expected=expected, got=str(cols), remedy="store this tensor as F16")
        return cols // self.block_size * self.block_bytes


# type name: (weights, bytes) of a block
_SIZES = {"Q4_K": (SUPERBLOCK, 144), "Q5_K": (SUPERBLOCK, 176), "Q6_K": (SUPERBLOCK, 210)}
_SIZES |= {"Q8_0": (32, 34), "Q5_0": (32, 22), "Q4_0": (32, 18), "BF16": (1, 2), "F16": (1, 2), "F32": (1, 4)}
_SIZES |= {"Q4_1": (32, 20), "Q5_1": (32, 24), "IQ4_NL": (32, 18)}
_SIZES |= {"Q2_K": (SUPERBLOCK, 84), "Q3_K": (SUPERBLOCK, 110), "IQ4_XS": (SUPERBLOCK, 136)}
_SIZES |= {"IQ3_S": (SUPERBLOCK, 110), "IQ3_XXS": (SUPERBLOCK, 98), "IQ2_S": (SUPERBLOCK, 82)}
_SIZES |= {
    "IQ2_XS": (SUPERBLOCK, 74),
    "IQ2_XXS": (SUPERBLOCK, 66),
    "IQ1_S": (SUPERBLOCK, 50),
    "IQ1_M": (SUPERBLOCK, 56),
}
_SIZES |= {"MXFP4": (32, 17), "NVFP4": (64, 36), "TQ1_0": (SUPERBLOCK, 54), "TQ2_0": (SUPERBLOCK, 66)}
# The numbers that GGUF files give to these types.
GGML_TYPES = {0: "F32", 1: "F16", 2: "Q4_0", 6: "Q5_0", 8: "Q8_0", 12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 30: "BF16"}
GGML_TYPES |= {3: "Q4_1", 7: "Q5_1", 10: "Q2_K", 11: "Q3_K", 20: "IQ4_NL", 23: "IQ4_XS"}
GGML_TYPES |= {16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 21: "IQ3_S", 22: "IQ2_S", 29: "IQ1_M"}
GGML_TYPES |= {34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4", 40: "NVFP4"}
# The levels that IQ4_NL's and IQ4_XS's quants stand for (ggml's ``kvalues_iq4nl``, which the format fixes).
IQ4_LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
FORMATS = {name: BlockFormat(name, *size) for name, size in _SIZES.items()}


def block_format(name: str) -> BlockFormat:
    """Look a type up by its GGML name.

    Raises:
        InputError: when it is not supported.
    """
    if name not in FORMATS:
        remedy = "quantise the model to Q4_K_M or Q6_K"
        raise InputError(f"type {name}", expected=", ".join(FORMATS), got=name, remedy=remedy)
    return FORMATS[name]
