"""A GGUF in float64, one matrix at a time, with activations as they are or rounded as llama.cpp rounds them.

llama.cpp multiplies packed rows with activations of 8 bits: Q8_K, blocks of 256 with a float32 scale, for types of 256
weights, and Q8_0, blocks of 32 with a float16 scale, for the others (``ggml-quants.c``: ``quantize_row_q8_K_ref``,
``quantize_row_q8_0_ref``; Q8_1 for Q4_1 and Q5_1, which adds the sum of a block and rounds alike).
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from q4kd.harness.oracles.families import FamilyModel


class LazyWeights(Mapping[str, Any]):
    """Float64 weights, decoded by the gguf package each time that they are asked for."""

    def __init__(self, reader: gguf.GGUFReader, *, rounded: bool) -> None:
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        self._rounded = rounded

    def __getitem__(self, name: str) -> Any:
        tensor = self._tensors[name]
        decoded = gguf.quants.dequantize(np.asarray(tensor.data), tensor.tensor_type)
        weights = decoded.reshape(tuple(reversed(tensor.shape.tolist())))
        block, _ = gguf.GGML_QUANT_SIZES[tensor.tensor_type]
        if self._rounded and block > 1:
            return _Packed(weights, block)
        return weights.astype(np.float64)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


class _Packed:
    """Float32 ``[rows, cols]`` that round what they are multiplied with: ``x @ packed.T``."""

    __array_ufunc__ = None  # NumPy leaves the product to this class

    def __init__(self, weights: np.ndarray, block: int) -> None:
        self._weights, self._round = weights, _round_q8_k if block == 256 else _round_q8_0

    @property
    def T(self) -> "_Packed":  # noqa: N802 - NumPy's name
        return self

    def __getitem__(self, ids: np.ndarray) -> np.ndarray:
        return self._weights[ids].astype(np.float64)

    def __rmatmul__(self, x: np.ndarray) -> np.ndarray:
        return self._round(x.astype(np.float32)) @ self._weights.T.astype(np.float64)


def _round_q8_k(x: np.ndarray) -> np.ndarray:
    blocks = x.reshape(len(x), -1, 256)
    largest = np.take_along_axis(blocks, np.abs(blocks).argmax(-1, keepdims=True), -1)
    scale = np.where(largest == 0, 1, largest) / np.float32(-127)
    quants = np.minimum(127, np.rint(blocks / scale))
    return (quants * scale.astype(np.float64)).reshape(x.shape)


def _round_q8_0(x: np.ndarray) -> np.ndarray:
    blocks = x.reshape(len(x), -1, 32)
    scale = np.abs(blocks).max(-1, keepdims=True) / np.float32(127)
    quants = np.rint(blocks / np.where(scale == 0, 1, scale))
    return (quants * scale.astype(np.float16).astype(np.float64)).reshape(x.shape)


def open_in_float64(path: Path, *, rounded: bool = False) -> FamilyModel:
    """Open a GGUF for ``family_logits``; with ``rounded``, products with packed weights round their activations."""
    reader = gguf.GGUFReader(path)
    architecture = reader.fields["general.architecture"].contents()
    prefix = f"{architecture}."
    settings = {
        key.removeprefix(prefix): field.contents() for key, field in reader.fields.items() if key.startswith(prefix)
    }
    return FamilyModel(architecture, LazyWeights(reader, rounded=rounded), settings)
