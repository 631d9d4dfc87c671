"""The CUDA teacher on a GPU: the golden file and every way of running it against float64. Run there with ``-m gpu``."""

import dataclasses
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

from q4kd.harness.inputs.demo import GOLDEN_LOGITS, GOLDEN_TEACHER  # noqa: E402
from q4kd.harness.oracles.reference import read_gguf, reference_logits  # noqa: E402
from q4kd.trainer.bench.synthetic_7b import make_tensors, qwen2_5_7b  # noqa: E402
from q4kd.trainer.formats.open import open_model  # noqa: E402
from q4kd.trainer.kernels.numerics import attention  # noqa: E402
from q4kd.trainer.teacher.cuda.forward import CudaForward  # noqa: E402
from q4kd.trainer.teacher.cuda.load import load_forward  # noqa: E402

SMALL = dataclasses.replace(
    qwen2_5_7b(3), hidden_size=512, ffn_size=1280, num_heads=4, num_kv_heads=2, vocab_size=1003, context_length=4096
)


def golden_ids() -> torch.Tensor:
    with np.load(GOLDEN_LOGITS, allow_pickle=False) as arrays:
        return torch.from_numpy(arrays["ids"]).long()


def load(path: Path = GOLDEN_TEACHER, backend: str = "q4k", **options) -> CudaForward:
    return load_forward(open_model(path), backend, **options)


def logits_of(forward: CudaForward, ids_BT: torch.Tensor) -> np.ndarray:
    hidden = forward.hidden(ids_BT.cuda())
    assert hidden.is_cuda
    return forward.head_logits(hidden.flatten(0, 1)).view(*ids_BT.shape, -1).cpu().numpy()


def row_errors(found: np.ndarray, exact: np.ndarray) -> np.ndarray:
    return np.linalg.norm(found - exact, axis=-1) / np.linalg.norm(exact, axis=-1)


@pytest.fixture(scope="module")
def exact() -> np.ndarray:
    return reference_logits(read_gguf(GOLDEN_TEACHER), golden_ids().numpy())


@pytest.mark.parametrize("backend", ["q4k", "dense"])
@pytest.mark.parametrize("overlap", [True, False])
def test_float32_is_within_1e_5_of_float64(backend: str, overlap: bool, exact: np.ndarray) -> None:
    forward = load(backend=backend, dtype=torch.float32, overlap=overlap)
    assert row_errors(logits_of(forward, golden_ids()[None])[0], exact).max() <= 1e-5


def dense_bfloat16_logits(ids_ST: torch.Tensor) -> np.ndarray:
    """Logits of transformers' dense bfloat16 forward over the golden file's weights."""
    from q4kd.trainer.bench.teacher.dense_twin import build_twin
    from q4kd.trainer.teacher.cuda.weights import DeviceTensor

    model = open_model(GOLDEN_TEACHER)
    tensors = {
        name: DeviceTensor(
            name,
            tensor.type,
            tensor.shape,
            torch.from_numpy(tensor.data.copy()).cuda().view(tensor.shape[0] if len(tensor.shape) > 1 else 1, -1),
        )
        for name, tensor in model.tensors.items()
    }
    twin = build_twin(model.config, tensors, torch.bfloat16)
    with torch.no_grad():
        return twin(input_ids=ids_ST.cuda(), use_cache=False).logits.float().cpu().numpy()


def test_bfloat16_error_is_at_most_1_2_times_that_of_a_dense_model_at_every_position() -> None:
    # One sample of a position's error is a lottery; the root mean square over 256 sequences is not.
    ids_ST = torch.randint(0, 512, (256, 24), generator=torch.Generator().manual_seed(4))
    reference = read_gguf(GOLDEN_TEACHER)
    exact = np.stack([reference_logits(reference, ids.numpy()) for ids in ids_ST])
    ours, theirs = (
        np.sqrt(np.mean(row_errors(found, exact) ** 2, axis=0))
        for found in (logits_of(load(), ids_ST), dense_bfloat16_logits(ids_ST))
    )
    assert ours.max() <= 2e-2
    assert (ours / theirs).max() <= 1.2, f"worst {(ours / theirs).max():.3f}, median {np.median(ours / theirs):.3f}"


@pytest.mark.parametrize("backend", ["q4k", "dense"])
@pytest.mark.parametrize("tokens", [1, 16, 96, 640, 1024])
def test_a_replayed_pass_gives_the_bits_of_the_same_pass_launched(backend: str, tokens: int) -> None:
    forward, eager = synthetic(backend=backend), synthetic(backend=backend, graphs=False)
    for _ in range(4):
        ids = torch.randint(0, SMALL.vocab_size, (1, tokens), device="cuda")
        first = forward.hidden(ids)
        kept = first.clone()
        assert torch.equal(first, eager.hidden(ids))
        forward.hidden(torch.randint(0, SMALL.vocab_size, (1, tokens), device="cuda"))
        assert torch.equal(first, kept)  # a later replay does not write into an earlier output
    assert forward._graphs.shapes == [(1, tokens)]


def test_only_the_shapes_used_most_keep_a_graph() -> None:
    forward, eager = synthetic(), synthetic(graphs=False)
    for tokens in (8, 40, 500, 8, 2000, 40, 500, 8, 8, 500, 500, 500, 8):
        ids = torch.randint(0, SMALL.vocab_size, (2, tokens), device="cuda")
        assert torch.equal(forward.hidden(ids), eager.hidden(ids))
    assert forward._graphs.shapes == [(2, 8), (2, 500)]


@pytest.mark.parametrize("tokens", [1, 3, 8, 9, 16, 17])
def test_small_batches_are_as_close(tokens: int, exact: np.ndarray) -> None:
    assert row_errors(logits_of(load(), golden_ids()[None, :tokens])[0], exact[:tokens]).max() <= 2e-2


def synthetic(backend: str = "q4k", **options) -> CudaForward:
    from q4kd.trainer.kernels.teacher_kernels import Kernels

    device = torch.device("cuda", torch.cuda.current_device())
    return CudaForward(SMALL, make_tensors(SMALL, device), backend, Kernels(device), **options)


def test_overlapped_decoding_gives_the_same_bits_as_decoding_in_line() -> None:
    ids = torch.randint(0, SMALL.vocab_size, (4, 640), device="cuda")
    wanted = synthetic(overlap=False).hidden(ids)
    # Slabs far smaller than a group, and many passes: a buffer overwritten too early would show in some of them.
    for scratch_bytes in (50_000, 300_000, 300_000_000):
        forward = synthetic(overlap=True, scratch_bytes=scratch_bytes)
        for _ in range(10):
            found = forward.hidden(ids)
            assert (found.float() - wanted.float()).norm() / wanted.float().norm() <= 2e-2
        if scratch_bytes == 300_000_000:
            assert torch.equal(found, wanted)


def test_the_head_in_chunks_in_slabs_and_whole_is_the_same() -> None:
    ids = torch.randint(0, SMALL.vocab_size, (2, 300), device="cuda")
    forward, slabbed = synthetic(), synthetic(head_bytes=0, scratch_bytes=100_000)
    hidden = forward.hidden(ids).flatten(0, 1)
    whole = forward.head_logits(hidden)
    assert whole.dtype == torch.float32
    assert whole.shape == (600, 1003)
    for found in (torch.cat([forward.head_logits(part) for part in hidden.split(100)]), slabbed.head_logits(hidden)):
        assert torch.isfinite(found).all()
        assert (found - whole).norm() / whole.norm() <= 1e-5


def test_pinned_attention_agrees_with_the_plain_one() -> None:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from q4kd.trainer.kernels.numerics import pinned_numerics

    q = torch.randn(2, 28, 300, 128, device="cuda", dtype=torch.bfloat16)
    k, v = (torch.randn(2, 4, 300, 128, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    with pinned_numerics():
        pinned = attention(q, k, v).float()
    with sdpa_kernel([SDPBackend.MATH]):
        plain = attention(q.float(), k.float(), v.float())
    assert (pinned - plain).norm() / plain.norm() <= 5e-3


def test_outputs_do_not_depend_on_what_the_allocator_left_behind() -> None:
    ids = torch.randint(0, SMALL.vocab_size, (3, 257), device="cuda")
    forward = synthetic()
    wanted = forward.hidden(ids)
    for poison in (float("nan"), 1e30):
        junk = [torch.full((1 << 22,), poison, device="cuda") for _ in range(40)]
        del junk
        assert torch.equal(forward.hidden(ids), wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [96, 301, 1024])
def test_packed_documents_are_each_alone(dtype: torch.dtype, length: int) -> None:
    from q4kd.trainer.kernels.numerics import attention_bias, pinned_numerics

    q = torch.randn(2, 28, length, 128, device="cuda", dtype=dtype)
    k, v = (torch.randn(2, 4, length, 128, device="cuda", dtype=dtype) for _ in range(2))
    borders = [0, 40, 41, length]
    starts = torch.zeros(2, length, dtype=torch.int64, device="cuda")
    for first in borders[:-1]:
        starts[:, first:] = first
    with pinned_numerics():
        packed = attention(q, k, v, attention_bias(starts, dtype)).view(2, length, -1).float()
        spans = [slice(first, last) for first, last in itertools.pairwise(borders)]
        parts = [attention(*(part[:, :, span].contiguous() for part in (q, k, v))) for span in spans]
    alone = torch.cat([part.view(2, -1, packed.shape[-1]).float() for part in parts], 1)
    assert (packed - alone).norm() / alone.norm() <= (1e-5 if dtype == torch.float32 else 5e-3)


def test_packed_passes_leave_the_graphs_alone() -> None:
    forward = load(dtype=torch.float32)
    ids = golden_ids()[None].cuda()
    plain = [forward.hidden(ids) for _ in range(3)][-1]
    starts = torch.zeros_like(ids)
    starts[:, 50:] = 50
    packed = forward.hidden(ids, starts)
    alone = forward.hidden(ids[:, 50:])
    assert torch.equal(forward.hidden(ids), plain)
    assert float((packed[:, 50:] - alone).norm() / alone.norm()) <= 1e-5
