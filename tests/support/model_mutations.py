"""What can be wrong with a model file: changes of its bytes, drawn by a seeded generator.

Each takes the file, the generator and the length of its header, and returns the changed file.
"""

import math
import random
import re
import struct
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from q4kd.harness.inputs.models.split_models import KEYS
from q4kd.trainer.errors import InputError
from q4kd.trainer.formats.gguf.header import read_header

_EXTREMES = (0, 1, 3, 255, *(2**power - 1 for power in (16, 31, 32, 63, 64)), 2**31, 2**40, 2**48, 2**63, 2**64 - 64)
_Mutation = Callable[[bytearray, random.Random, int], bytearray]


def _flip(data: bytearray, rng: random.Random, header: int) -> bytearray:
    for _ in range(rng.randint(1, 8)):
        at = rng.randrange(header)
        data[at] ^= 1 << rng.randrange(8)
    return data


def _flip_anywhere(data: bytearray, rng: random.Random, header: int) -> bytearray:
    return _flip(data, rng, len(data))


def _extreme(data: bytearray, rng: random.Random, header: int) -> bytearray:
    form = rng.choice("HIQ")
    at = rng.randrange(header - 8)
    struct.pack_into(f"<{form}", data, at, rng.choice(_EXTREMES) % (1 << 8 * struct.calcsize(form)))
    return data


def _truncate(data: bytearray, rng: random.Random, header: int) -> bytearray:
    return data[: rng.randrange(len(data)) if rng.random() < 0.5 else rng.randrange(header)]


def _drop(data: bytearray, rng: random.Random, header: int) -> bytearray:
    at = rng.randrange(header)
    del data[at : at + rng.randint(1, 64)]
    return data


def _repeat(data: bytearray, rng: random.Random, header: int) -> bytearray:
    start = rng.randrange(header)
    piece = data[start : start + rng.randint(1, 256)]
    at = rng.randrange(header)
    return data[:at] + piece * rng.choice((1, 2, 50)) + data[at:]


def _grow(data: bytearray, rng: random.Random, header: int) -> bytearray:
    return data + rng.randbytes(rng.randint(1, 4096))


def _split_key(data: bytearray, rng: random.Random, header: int) -> bytearray:
    """Give one of the three numbers of a shard another value, or another type."""
    key = rng.choice(KEYS).encode()
    at = data.find(struct.pack("<Q", len(key)) + key)
    if at < 0:
        return data
    at += 8 + len(key)
    if rng.random() < 0.2:
        struct.pack_into("<I", data, at, rng.randrange(14))
    else:
        struct.pack_into("<H", data, at + 4, rng.choice((*range(6), 512, 513, 0x8000, 0xFFFF)))
    return data


_FLOATS = (0.0, -0.0, -1.0, 1e-45, 1e-30, 0.5, 1.0, 3e38, float("inf"), float("-inf"), float("nan"))


def _metadata_value(data: bytearray, rng: random.Random, header: int) -> bytearray:
    """Give one key that describes the model (its architecture's, or an array's length) another value or type."""
    keys = list(re.finditer(rb"[a-z0-9]+\.[a-z0-9_.]+(?=[\x00-\x0c]\x00\x00\x00)", data[:header]))
    if not keys:
        return data
    at = rng.choice(keys).end()
    if rng.random() < 0.15:
        struct.pack_into("<I", data, at, rng.randrange(14))
    elif rng.random() < 0.5:
        struct.pack_into("<f", data, at + 4, rng.choice(_FLOATS))
    else:
        struct.pack_into("<I", data, at + 4, rng.choice((*range(10), 16, 64, 255, 2**15, 2**31, 2**32 - 1)))
    return data


def _float_tensor(data: bytearray, rng: random.Random, header: int) -> bytearray:
    """Put special numbers into a float32 tensor of few: a scale beside a matrix, divisors, a norm, sums, a count."""
    try:
        entries = float_tensors(bytes(data))
    except InputError:
        return data
    small = [(start, count) for start, count in entries if 4 * count + start <= len(data)]
    if small:
        start, count = rng.choice(small)
        for _ in range(rng.choice((1, 1, 4))):
            struct.pack_into("<f", data, start + 4 * rng.randrange(count), rng.choice(_FLOATS))
    return data


def float_tensors(data: bytes) -> list[tuple[int, int]]:
    """Return the first byte and the number of elements of every F32 tensor."""
    header = read_header(Path("case"), np.frombuffer(data, np.uint8))
    return [(header.data_start + one.offset, math.prod(one.shape)) for one in header.tensors if one.type_id == 0]


_BYTES: tuple[_Mutation, ...] = (_flip, _flip, _flip_anywhere, _extreme, _extreme, _truncate, _drop, _repeat, _grow)
MUTATIONS: tuple[_Mutation, ...] = (*_BYTES, _metadata_value, _metadata_value, _float_tensor, _float_tensor)
SHARD_MUTATIONS: tuple[_Mutation, ...] = (*MUTATIONS, *(_split_key,) * 6)


def mutate(
    changed: bytearray, rng: random.Random, header: int, mutations: Sequence[_Mutation]
) -> tuple[bytearray, list[str]]:
    """Apply one to three mutations; return the file and their names."""
    words = []
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        mutation = rng.choice(mutations)
        words.append(mutation.__name__.strip("_"))
        if len(changed) > 200:
            changed = mutation(changed, rng, min(header, len(changed) - 8))
    return changed, words
