"""A mixture of experts of any size as a GGUF, written at the speed of the disk: blocks are tiled, threads write them.

Random blocks are made once for each type and scale, a few tens of megabytes of each; a tensor is those blocks over and
over, begun at a place of its own, so that neither tensors nor experts are equal. Memory is bounded by these tiles.
"""

import itertools
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
from numpy.typing import NDArray

from q4kd.trainer.bench.synthetic import random_blocks
from q4kd.trainer.bench.synthetic_30b_a3b import tensor_types
from q4kd.trainer.formats.architecture import TeacherConfig
from q4kd.trainer.formats.blocks.layout import block_format
from q4kd.trainer.formats.tensor_shapes import expected_shapes

# Blocks of a tile: a prime, so that no row of a tensor lies in a tile as another does.
TILE_BLOCKS = 300_007
WRITERS = 16
_ALIGNMENT, _PIECE_BYTES = 32, 8 << 20
Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class _Piece:
    """Bytes that go to one place of the file."""

    at: int
    data: memoryview


def write_large_mixture(
    path: Path, config: TeacherConfig, *, tokens: Sequence[str] = (), tile_blocks: int = TILE_BLOCKS, seed: int = 0
) -> None:
    """Write a qwen3moe with random weights in these dimensions and the types of a Q4_K_M file.

    Every matrix but a router has columns in multiples of 256. Its weights are as large as keeps a token's states alive
    through all layers, see ``write_large_teacher``; a router's logits have a standard deviation of about one.

    Args:
        path: file to write.
        config: dimensions of a qwen3moe.
        tokens: the first token strings of the vocabulary, which is filled up with names of padding.
        tile_blocks: blocks that are random, for each type and scale.
        seed: seed of the weights.

    Raises:
        OSError: when the disk has no room for the file, before its weights are written.
    """
    shapes = expected_shapes(config)
    types = tensor_types(config)
    sizes = {name: _num_bytes(kind, shapes[name]) for name, kind in types.items()}
    first = _padded(_write_header(path, config, shapes, types, sizes, tokens))
    ends = list(itertools.accumulate((_padded(size) for size in sizes.values()), initial=first))
    tiles = _Tiles(np.random.default_rng(seed), tile_blocks, config)
    with path.open("r+b") as file:
        os.posix_fallocate(file.fileno(), 0, ends[-1])
        with ThreadPoolExecutor(WRITERS) as pool:
            # A tensor's pieces are written before those of the next are made, so that what waits stays small.
            for (name, kind), at in zip(types.items(), ends, strict=False):
                pieces = tiles.pieces(name, kind, shapes[name], at)
                for done in [pool.submit(_write, file.fileno(), piece) for piece in pieces]:
                    done.result()


def _num_bytes(kind: str, shape: tuple[int, ...]) -> int:
    return math.prod(shape[:-1]) * block_format(kind).row_bytes(shape[-1])


def _padded(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _write(descriptor: int, piece: _Piece) -> None:
    done = 0
    while done < len(piece.data):
        done += os.pwrite(descriptor, piece.data[done:], piece.at + done)


def _write_header(
    path: Path,
    config: TeacherConfig,
    shapes: Mapping[str, tuple[int, ...]],
    types: Mapping[str, str],
    sizes: Mapping[str, int],
    tokens: Sequence[str],
) -> int:
    """Write everything but the weights; return the bytes written."""
    from q4kd.trainer.formats.gguf.writer import add_hyperparameters

    writer = gguf.GGUFWriter(path, config.architecture)
    add_hyperparameters(writer, config)
    writer.add_expert_count(config.num_experts)
    writer.add_expert_used_count(config.experts_per_token)
    writer.add_expert_feed_forward_length(config.expert_ffn_size)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_K_M)
    writer.add_tokenizer_model("none")
    if tokens:
        writer.add_token_list([*tokens, *(f"[PAD {number}]" for number in range(len(tokens), config.vocab_size))])
    for name, kind in types.items():
        shape, raw = shapes[name], gguf.GGMLQuantizationType[kind]
        if kind == "F32":
            writer.add_tensor_info(name, shape, np.dtype(np.float32), sizes[name])
        else:
            packed = (*shape[:-1], block_format(kind).row_bytes(shape[-1]))
            writer.add_tensor_info(name, packed, np.dtype(np.uint8), sizes[name], raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    return path.stat().st_size


class _Tiles:
    """Random blocks by type and scale, and the pieces of every tensor, cut from them."""

    def __init__(self, rng: np.random.Generator, blocks: int, config: TeacherConfig) -> None:
        self._rng, self._blocks, self._config = rng, blocks, config
        self._made: dict[tuple[str, float], Bytes] = {}

    def pieces(self, name: str, kind: str, shape: tuple[int, ...], at: int) -> Iterator[_Piece]:
        """Yield a tensor's bytes, which begin at byte ``at`` of the file."""
        if kind == "F32":
            yield _Piece(at, memoryview(self._plain(name, shape).view(np.uint8).reshape(-1)))  # type: ignore[arg-type]
            return
        tile = self._tile(kind, _sigma(name, shape[-1], self._config))
        whole, end = memoryview(tile.reshape(-1)), at + _num_bytes(kind, shape)  # type: ignore[arg-type]
        begin = int(self._rng.integers(len(tile))) * tile.shape[1]
        while at < end:
            data = whole[begin : begin + min(end - at, _PIECE_BYTES)]
            yield _Piece(at, data)
            at, begin = at + len(data), (begin + len(data)) % len(whole)

    def _plain(self, name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
        if len(shape) == 1:
            return np.ones(shape, np.float32)
        return (self._rng.standard_normal(shape) * shape[-1] ** -0.5).astype(np.float32)  # type: ignore[no-any-return]

    def _tile(self, kind: str, sigma: float) -> Bytes:
        if (kind, sigma) not in self._made:
            self._made[kind, sigma] = random_blocks(self._rng, kind, self._blocks, 256, sigma)
        return self._made[kind, sigma]


def _sigma(name: str, cols: int, config: TeacherConfig) -> float:
    """Return the standard deviation of a matrix's weights."""
    if name == "token_embd.weight":
        return 0.7
    into_the_stream = "attn_output" in name or "ffn_down" in name
    gain = (2 * config.num_layers) ** -0.5 if into_the_stream else 1.0
    return float(0.7 * gain * cols**-0.5)
