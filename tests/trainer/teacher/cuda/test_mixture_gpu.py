"""Mixtures of experts on a GPU, against transformers' model of the same weights in float32. Run with ``-m gpu``."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

from q4kd.harness.inputs.models.synthetic_mixtures import VOCAB, write_mixture
from q4kd.harness.oracles.families import family_logits, read_family
from q4kd.trainer.bench.synthetic_30b_a3b import make_tensors, qwen3_30b_a3b
from q4kd.trainer.bench.teacher.cuda_errors import plain_float32, row_errors
from q4kd.trainer.bench.teacher.mixture_twin import build_mixture_twin
from q4kd.trainer.formats.open import open_model
from q4kd.trainer.kernels.teacher_kernels import Kernels
from q4kd.trainer.teacher.cuda.forward import CudaForward
from q4kd.trainer.teacher.cuda.load import load_forward

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SMALL = dataclasses.replace(qwen3_30b_a3b(3), vocab_size=5000)
IDS = torch.randint(0, 5000, (2, 700), generator=torch.Generator().manual_seed(4))


def cuda() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture(scope="module")
def exact() -> torch.Tensor:
    twin = build_mixture_twin(SMALL, make_tensors(SMALL, cuda()), torch.float32)
    with plain_float32(), torch.no_grad():
        return twin(input_ids=IDS.cuda(), use_cache=False).logits.flatten(0, 1).double()


def errors(exact: torch.Tensor, **options: object) -> torch.Tensor:
    backend = str(options.pop("backend", "q4k"))
    forward = CudaForward(SMALL, make_tensors(SMALL, cuda()), backend, Kernels(cuda()), **options)  # type: ignore[arg-type]
    logits = [forward.head_logits(forward.hidden(IDS.cuda()).flatten(0, 1)) for _ in range(3)]
    assert all(torch.equal(logits[0], again) for again in logits[1:])  # a race would show here
    return row_errors(logits[0], exact)


@pytest.mark.parametrize("slab_bytes", [7_000_000, 202_000_000])
@pytest.mark.parametrize("overlap", [True, False])
def test_float32_equals_transformers(exact: torch.Tensor, overlap: bool, slab_bytes: int) -> None:
    # A choice between two experts of nearly equal weight may fall otherwise: at most one position in a thousand.
    found = errors(exact, dtype=torch.float32, overlap=overlap, slab_bytes=2 * slab_bytes, expert_rows=3000)
    assert float(found.quantile(0.999)) <= 1e-4


@pytest.mark.parametrize("options", [{}, {"overlap": False}, {"expert_rows": 999}, {"slab_bytes": 7_000_000}])
@pytest.mark.parametrize("backend", ["q4k", "dense"])
def test_bfloat16_is_as_near_as_transformers(exact: torch.Tensor, backend: str, options: dict[str, int]) -> None:
    twin = build_mixture_twin(SMALL, make_tensors(SMALL, cuda()), torch.bfloat16)
    with torch.no_grad():
        theirs = row_errors(twin(input_ids=IDS.cuda(), use_cache=False).logits.flatten(0, 1), exact)
    found = errors(exact, backend=backend, **options)
    assert float(found.median()) <= 1.1 * float(theirs.median())
    assert float(found.quantile(0.99)) <= 1.5 * float(theirs.quantile(0.99))


def test_a_single_token_and_a_few_are_computed(exact: torch.Tensor) -> None:
    forward = CudaForward(SMALL, make_tensors(SMALL, cuda()), "q4k", Kernels(cuda()))
    many = forward.head_logits(forward.hidden(IDS[:1, :40].cuda())[0])
    for length in (1, 7):
        few = forward.head_logits(forward.hidden(IDS[:1, :length].cuda())[0])
        assert float(row_errors(few, many[:length].double()).median()) < 3e-2


@pytest.mark.parametrize("backend", ["q4k", "dense"])
def test_a_file_of_many_types_is_within_1e_5_of_float64(tmp_path: Path, backend: str) -> None:
    write_mixture(tmp_path / "m.gguf")
    forward = load_forward(open_model(tmp_path / "m.gguf"), backend, dtype=torch.float32)
    model = read_family(tmp_path / "m.gguf")
    for ids in (np.random.default_rng(6).integers(0, VOCAB, 600), np.full(300, 9), np.array([3])):
        exact = torch.from_numpy(family_logits(model, ids)).cuda()
        found = forward.head_logits(forward.hidden(torch.from_numpy(ids)[None].cuda())[0])
        # A choice between two experts of nearly equal weight may fall otherwise.
        assert float(row_errors(found, exact).quantile(0.99)) <= 1e-5
