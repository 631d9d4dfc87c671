"""Products of packed matrices: right over any tiling, within one bounded scratch."""

import os
import platform
import subprocess
import sys

import gguf
import numpy as np
import pytest
import torch
from teachers import load_quietly

from q4kd.harness.inputs.demo import GOLDEN_TEACHER
from q4kd.trainer.bench.synthetic import random_blocks
from q4kd.trainer.errors import FrozenTeacherError, InputError
from q4kd.trainer.formats.model_file import PackedTensor
from q4kd.trainer.teacher.cpu.weights import DenseMatrix, PackedMatrix, Scratch, decode_vector
from q4kd.trainer.teacher.teacher import Teacher


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


@pytest.mark.parametrize("tile_rows", [1, 3, 100])
def test_bfloat16_products_round_each_weight_once(tile_rows: int) -> None:
    tensor = packed("Q4_K", 37, 512)
    x = torch.randn(9, 512, generator=torch.Generator().manual_seed(0)).bfloat16()
    weight = torch.from_numpy(dense(tensor)).float().bfloat16()
    matrix = PackedMatrix(tensor, Scratch(tile_rows * 512 * 4))
    exact = x.double() @ weight.double().T
    for found in (matrix.product(x), DenseMatrix(tensor, torch.bfloat16).product(x)):
        assert found.dtype == torch.bfloat16
        # Half a unit in the last place of bfloat16, and what cancellation leaves of float32 sums.
        assert torch.allclose(found.double(), exact, rtol=2.0**-8, atol=1e-5)
    assert DenseMatrix(tensor, torch.bfloat16).resident_bytes == 37 * 512 * 2
    assert DenseMatrix(tensor, torch.bfloat16).held_as == "BF16"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_large_result_made_in_parts_is_the_product_in_float32(dtype: torch.dtype) -> None:
    tensor = packed("Q6_K", 2100, 256)
    x = torch.randn(3, 256, generator=torch.Generator().manual_seed(0)).to(dtype)
    for matrix in (PackedMatrix(tensor, Scratch(700 * 256 * 4)), DenseMatrix(tensor, dtype)):
        found = matrix.project(x)
        assert found.dtype == torch.float32
        assert torch.allclose(found, matrix.product(x).float(), rtol=2.0**-7, atol=1e-5)


def test_the_scratch_of_a_bfloat16_tile_does_not_overlap() -> None:
    scratch = Scratch(3 * 512 * 4)
    tile, piece = scratch.halves(3, 512)
    tile.fill_(1)
    piece.fill_(2)
    assert tile.shape == (3, 512)
    assert piece.shape[1] == 512
    assert (tile == 1).all()
    assert scratch.num_bytes == 3 * 512 * 4
    wide_tile, wide_piece = scratch.halves(1, 4095)
    wide_piece.fill_(2)
    wide_tile.fill_(1)
    assert (wide_piece == 2).all()


def golden(backend: str) -> Teacher:
    return load_quietly(GOLDEN_TEACHER, backend=backend, dtype="float32")


@pytest.mark.parametrize("backend", ["q4k", "dense"])
def test_logits_are_written_to_a_buffer_used_again(backend: str) -> None:
    teacher = golden(backend)
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    fresh = teacher.logits(ids)
    out = torch.full(fresh.shape, torch.nan)
    assert teacher.logits(ids, out=out) is out
    assert torch.equal(out, fresh)
    teacher.logits(ids + 1, out=out)
    assert not torch.equal(out, fresh)
    # What is returned without a buffer is the caller's own: no later pass changes it.
    kept = fresh.clone()
    hidden = teacher.hidden(ids)
    kept_hidden = hidden.clone()
    teacher.logits(ids + 1)
    assert torch.equal(fresh, kept)
    assert torch.equal(hidden, kept_hidden)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda out: out[:, :2], r"got .*\(1, 2, "),
        (lambda out: out.double(), "got torch.float64"),
        (lambda out: out.transpose(1, 2).contiguous().transpose(1, 2), "got strided"),
        (lambda out: out.to("meta"), "on meta"),
    ],
)
def test_a_buffer_that_does_not_fit_is_refused(change: object, words: str) -> None:
    teacher = golden("q4k")
    assert callable(change)
    with pytest.raises(InputError, match=words):
        teacher.logits(torch.tensor([[1, 2, 3]]), out=change(torch.zeros(1, 3, teacher.vocab_size)))


def test_a_buffer_that_wants_a_gradient_is_refused() -> None:
    teacher = golden("q4k")
    with pytest.raises(FrozenTeacherError, match="requires a gradient"):
        teacher.logits(torch.tensor([[1]]), out=torch.zeros(1, 1, teacher.vocab_size, requires_grad=True))


# Three results of 1,024 x 3,072 are alive at once in a feed-forward. The heap grows until it has room for them wherever
# they fall, which takes a few rounds; the faults of the tenth are counted.
_FAULTS = """
import resource, sys, torch
from q4kd.trainer.kernels.gemm import keep_freed_memory

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

torch.set_num_threads(1)
before = faults()
if sys.argv[1] == "keep":
    keep_freed_memory()
taken = faults() - before
for _ in range(10):
    before = faults()
    for part in [torch.empty(12 << 20, dtype=torch.uint8) for _ in range(3)]:
        part.zero_()
    del part
print(taken, faults() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the thresholds are glibc's")
def test_freed_results_are_kept_for_the_next_product() -> None:
    def count(mode: str, **environment: str) -> tuple[int, int]:
        command = [sys.executable, "-c", _FAULTS, mode]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, **environment})
        taken, faults = map(int, done.stdout.split())
        return taken, faults

    # 36 MiB are 9,216 pages of 4 KiB; the freed block itself is never touched.
    taken, kept = count("keep")
    assert taken < 100
    assert kept < 500
    # Left alone, glibc raises the threshold by itself in some runs; held at its default it never does.
    assert count("plain", MALLOC_MMAP_THRESHOLD_="131072")[1] > 5000
