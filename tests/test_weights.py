"""Products of packed matrices: right over any tiling, within one bounded scratch."""

import gguf
import numpy as np
import pytest
import torch

from q4kd.trainer.synthetic import random_blocks
from q4kd.trainer.model_file import PackedTensor
from q4kd.trainer.weights import DenseMatrix, PackedMatrix, Scratch, decode_vector


def packed(name: str, rows: int, cols: int) -> PackedTensor:
    data = random_blocks(np.random.default_rng(5), name, rows, cols, 0.05)
    return PackedTensor("w", name, (rows, cols), data)


def dense(tensor: PackedTensor) -> np.ndarray:
    return gguf.quants.dequantize(tensor.data, getattr(gguf.GGMLQuantizationType, tensor.type)).astype(np.float64)


@pytest.mark.parametrize("name", ["Q4_K", "Q6_K"])
@pytest.mark.parametrize("tile_rows", [1, 3, 16, 100])
def test_product_is_exact_whatever_the_tile(name: str, tile_rows: int) -> None:
    tensor = packed(name, 37, 512)
    matrix = PackedMatrix(tensor, Scratch(tile_rows * 512 * 4))
    x = torch.randn(9, 512, generator=torch.Generator().manual_seed(0))
    exact = x.double().numpy() @ dense(tensor).T
    error = np.linalg.norm(matrix.product(x).numpy() - exact) / np.linalg.norm(exact)
    assert error < 1e-6


def test_scratch_stays_bounded_and_is_reported() -> None:
    scratch = Scratch(8192)
    matrix = PackedMatrix(packed("Q4_K", 64, 512), scratch)
    matrix.product(torch.ones(2, 512))
    assert scratch.num_bytes == 8192
    # One row longer than the scratch enlarges it to that row, and says so.
    PackedMatrix(packed("Q4_K", 2, 4096), scratch).product(torch.ones(1, 4096))
    assert scratch.num_bytes == 4096 * 4


def test_a_packed_matrix_holds_the_files_bytes_only() -> None:
    tensor = packed("Q6_K", 8, 512)
    matrix = PackedMatrix(tensor, Scratch())
    assert matrix.resident_bytes == tensor.num_bytes == 8 * 2 * 210
    assert not matrix.is_dense
    assert DenseMatrix(tensor).resident_bytes == 8 * 512 * 4
    assert np.shares_memory(tensor.data, matrix._packed.numpy())


def test_gather_decodes_the_rows_asked_for() -> None:
    tensor = packed("Q4_K", 10, 256)
    rows = torch.tensor([7, 0, 7])
    assert np.array_equal(PackedMatrix(tensor, Scratch()).gather(rows).numpy(), dense(tensor)[[7, 0, 7]])
    assert np.array_equal(DenseMatrix(tensor).gather(rows).numpy(), dense(tensor)[[7, 0, 7]])


def test_vectors_are_float32_copies() -> None:
    values = np.array([1.5, -2.25, 3.0], np.float16)
    tensor = PackedTensor("bias", "F16", (3,), values.view(np.uint8).reshape(1, -1))
    assert decode_vector(tensor).tolist() == [1.5, -2.25, 3.0]
