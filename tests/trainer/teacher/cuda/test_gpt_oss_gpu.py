"""gpt-oss on a GPU, against transformers' model of the same weights in float32. Run with ``-m gpu``."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

from q4kd.harness.inputs.models.synthetic_gpt_oss import write_gpt_oss
from q4kd.harness.oracles.families import read_family
from q4kd.harness.oracles.gpt_oss import gpt_oss_logits
from q4kd.trainer.bench.synthetic_gpt_oss import gpt_oss_20b, make_tensors
from q4kd.trainer.bench.teacher.cuda_errors import plain_float32, row_errors
from q4kd.trainer.bench.teacher.gpt_oss_twin import build_gpt_oss_twin
from q4kd.trainer.formats.open import open_model
from q4kd.trainer.kernels.attention import blocked_attention, window_starts
from q4kd.trainer.kernels.numerics import pinned_numerics
from q4kd.trainer.kernels.teacher_kernels import Kernels
from q4kd.trainer.kernels.windowed import Reach
from q4kd.trainer.teacher.cuda.forward import CudaForward
from q4kd.trainer.teacher.cuda.load import load_forward

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SMALL = dataclasses.replace(gpt_oss_20b(3), vocab_size=5000)
IDS = torch.randint(0, 5000, (2, 700), generator=torch.Generator().manual_seed(4))
STARTS = torch.zeros(2, 700, dtype=torch.int64)
STARTS[0, 333:], STARTS[1, 41:] = 333, 41


def cuda() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture(scope="module")
def exact() -> torch.Tensor:
    twin = build_gpt_oss_twin(SMALL, make_tensors(SMALL, cuda()), torch.float32)
    with plain_float32(), torch.no_grad():
        return twin(input_ids=IDS.cuda(), use_cache=False).logits.flatten(0, 1).double()


def errors(exact: torch.Tensor, **options: object) -> torch.Tensor:
    backend = str(options.pop("backend", "q4k"))
    forward = CudaForward(SMALL, make_tensors(SMALL, cuda()), backend, Kernels(cuda()), **options)  # type: ignore[arg-type]
    logits = [forward.head_logits(forward.hidden(IDS.cuda()).flatten(0, 1)) for _ in range(3)]
    assert all(torch.equal(logits[0], again) for again in logits[1:])  # a race would show here
    return row_errors(logits[0], exact)


@pytest.mark.parametrize("overlap", [True, False])
def test_float32_equals_transformers(exact: torch.Tensor, overlap: bool) -> None:
    # A choice between two experts of nearly equal weight may fall otherwise: at most one position in a thousand.
    found = errors(exact, dtype=torch.float32, overlap=overlap, slab_bytes=800_000_000, expert_rows=3000)
    assert float(found.quantile(0.999)) <= 1e-4


@pytest.mark.parametrize("options", [{}, {"overlap": False}, {"expert_rows": 999}, {"slab_bytes": 70_000_000}])
@pytest.mark.parametrize("backend", ["q4k", "dense"])
def test_bfloat16_is_as_near_as_transformers(exact: torch.Tensor, backend: str, options: dict[str, int]) -> None:
    twin = build_gpt_oss_twin(SMALL, make_tensors(SMALL, cuda()), torch.bfloat16)
    with torch.no_grad():
        theirs = row_errors(twin(input_ids=IDS.cuda(), use_cache=False).logits.flatten(0, 1), exact)
    found = errors(exact, backend=backend, **options)
    assert float(found.median()) <= 1.1 * float(theirs.median())
    assert float(found.quantile(0.99)) <= 1.5 * float(theirs.quantile(0.99))


@pytest.mark.parametrize("length", [1, 7, 97, 256, 700])
@pytest.mark.parametrize("window", [0, 1, 64, 128, 600])
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_beside_sinks_is_that_of_the_cpu(
    length: int, window: int, documents: bool, dtype: torch.dtype
) -> None:
    """Flash and memory-efficient kernels, of a causal mask and of biases whose rows are not aligned."""
    generator = torch.Generator().manual_seed(length)
    q, k, v = (torch.randn(2, heads, length, 64, generator=generator).to(dtype) for heads in (8, 2, 2))
    sinks = torch.randn(8, generator=generator) * 3
    starts = STARTS[:, :length].clamp(max=length - 1)
    first = window_starts(length, window, starts if documents else None).expand(2, -1) if window else None
    first = starts if documents and not window else first
    want = blocked_attention(q.float(), k.float(), v.float(), first, scale=0.2, sinks=sinks).flatten(2).flatten(0, 1)
    reach = Reach(2, length, starts.cuda() if documents else None, dtype, cuda())
    with pinned_numerics():
        found = reach.attend(q.cuda(), k.cuda(), v.cuda(), window=window, scale=0.2, cap=0.0, sinks=sinks.cuda())
    error = float((found.cpu().double() - want).norm() / want.double().norm())
    assert error <= (1e-5 if dtype == torch.float32 else 6e-3)


@pytest.mark.parametrize("backend", ["q4k", "dense"])
@pytest.mark.parametrize("part", ["whole", "attention", "experts"])
def test_a_file_is_within_1e_5_of_float64(tmp_path: Path, backend: str, part: str) -> None:
    path = tmp_path / "m.gguf"
    write_gpt_oss(path, part=part)
    forward = load_forward(open_model(path), backend, dtype=torch.float32)
    model = read_family(path)
    text = np.random.default_rng(6).integers(0, 160, 600)
    for ids in (text, np.full(300, 9), np.array([3])):
        exact = torch.from_numpy(gpt_oss_logits(model, ids)).cuda()
        found = forward.head_logits(forward.hidden(torch.from_numpy(ids)[None].cuda())[0])
        # A choice between two experts of nearly equal weight may fall otherwise.
        assert float(row_errors(found, exact).quantile(0.99)) <= 1e-5
    starts = torch.zeros(1, 600, dtype=torch.int64)
    starts[:, 41:] = 41
    alone = torch.from_numpy(np.concatenate([gpt_oss_logits(model, part) for part in np.split(text, [41])])).cuda()
    found = forward.head_logits(forward.hidden(torch.from_numpy(text)[None].cuda(), starts.cuda())[0])
    assert float(row_errors(found, alone).quantile(0.99)) <= 1e-5
