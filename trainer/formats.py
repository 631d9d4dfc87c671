"""How GGML types store weights: block sizes only, so that a file can be inspected without torch.

Sizes are those of llama.cpp's ``ggml-common.h``; a superblock is 256 weights.
"""

from dataclasses import dataclass

from q4kd.trainer.errors import InputError

SUPERBLOCK = 256


@dataclass(frozen=True)
class BlockFormat:
    """Storage of one GGML type.

    Attributes:
        name: GGML type name.
        block_size: weights per block.
        block_bytes: bytes per block.
        is_k_quant: whether decoding it to a dense tensor would enlarge it (what the harness forbids).
    """

    name: str
    block_size: int
    block_bytes: int
    is_k_quant: bool

    def row_bytes(self, cols: int) -> int:
        """Return the bytes of a row of ``cols`` weights.

        Raises:
            InputError: when ``cols`` is not a whole number of blocks.
        """
        if cols <= 0 or cols % self.block_size:
            raise InputError(
                f"{self.name} row",
                expected=f"a multiple of {self.block_size} weights",
                got=str(cols),
                remedy="store this tensor as F16",
            )
        return cols // self.block_size * self.block_bytes


FORMATS = {
    form.name: form
    for form in (
        BlockFormat("Q4_K", SUPERBLOCK, 144, is_k_quant=True),
        BlockFormat("Q6_K", SUPERBLOCK, 210, is_k_quant=True),
        BlockFormat("F16", 1, 2, is_k_quant=False),
        BlockFormat("F32", 1, 4, is_k_quant=False),
    )
}


def block_format(name: str) -> BlockFormat:
    """Look a type up by its GGML name.

    Raises:
        InputError: when it is not supported.
    """
    if name not in FORMATS:
        raise InputError(
            f"type {name}", expected=", ".join(FORMATS), got=name, remedy="quantise the model to Q4_K_M or Q6_K"
        )
    return FORMATS[name]
