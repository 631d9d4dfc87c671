"""Gemma 4 on the CUDA path's own code, on the CPU: over reference kernels, and over the kernels' source."""

import functools
from pathlib import Path

import numpy as np
import pytest
import torch
from emulated_cuda import Recorder, build, product  # noqa: F401 - the fixture stands in for the CUDA product
from host_kernels import host_launcher
from reference_kernels import ReferenceExpertKernels, widening_multiply

import q4kd.trainer.teacher.cuda.layers as layers_module
import q4kd.trainer.teacher.cuda.mixture as mixture_module
from q4kd.harness.inputs.models.synthetic_gemma4 import VOCAB, write_gemma4_model
from q4kd.harness.oracles.families import read_family
from q4kd.harness.oracles.gemma4 import gemma4_logits
from q4kd.trainer.formats.open import open_model
from q4kd.trainer.kernels.expert_kernels import ExpertKernels
from q4kd.trainer.kernels.teacher_kernels import Kernels
from q4kd.trainer.teacher.cuda.forward import CudaForward

IDS = np.random.default_rng(13).integers(0, VOCAB, 150)
BORDERS = (37, 41)
EXPERT_BYTES = 4 * 2 * 256 * 256  # of gate and up in float32


@pytest.fixture(scope="module", params=["dense", "mixture"])
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("gemma4") / f"{request.param}.gguf"
    write_gemma4_model(made, mixture=request.param == "mixture")
    return made


@pytest.fixture(autouse=True)
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mixture_module, "multiply", widening_multiply)
    monkeypatch.setattr(layers_module, "ExpertKernels", lambda *_: ReferenceExpertKernels())


def logits_of(forward: CudaForward, ids: np.ndarray, starts: np.ndarray | None = None) -> np.ndarray:
    starts_1T = None if starts is None else torch.from_numpy(starts)[None]
    hidden = forward.hidden(torch.from_numpy(ids)[None], starts_1T)
    return forward.head_logits(hidden[0]).numpy()


def worst_error(found: np.ndarray, exact: np.ndarray) -> float:
    return float((np.linalg.norm(found - exact, axis=1) / np.linalg.norm(exact, axis=1)).max())


@functools.cache
def exact_logits(path: Path, first: int = 0, last: int = len(IDS)) -> np.ndarray:
    return gemma4_logits(read_family(path), IDS[first:last])


@pytest.mark.parametrize("backend", ["q4k", "dense"])
def test_float32_is_within_1e_5_of_float64(path: Path, backend: str) -> None:
    forward = build(backend, path=path, dtype=torch.float32)
    for length in (1, 7, len(IDS)):
        assert worst_error(logits_of(forward, IDS[:length]), exact_logits(path)[:length]) <= 1e-5


def test_packed_documents_are_each_alone(path: Path) -> None:
    starts = np.repeat([0, *BORDERS], np.diff([0, *BORDERS, len(IDS)]))
    alone = np.concatenate([exact_logits(path, a, b) for a, b in ((0, 37), (37, 41), (41, len(IDS)))])
    forward = build(path=path, dtype=torch.float32)
    assert worst_error(logits_of(forward, IDS, starts), alone) <= 1e-5


@pytest.mark.parametrize("options", [{"slab_bytes": 3 * EXPERT_BYTES, "expert_rows": 20}, {"scratch_bytes": 1 << 16}])
def test_every_cut_gives_the_same_logits(path: Path, options: dict[str, int]) -> None:
    recorder = Recorder()
    forward = build(path=path, dtype=torch.float32, recorder=recorder, **options)
    assert worst_error(logits_of(forward, IDS), exact_logits(path)) <= 1e-5
    assert not recorder.in_use


def test_bfloat16_is_near(path: Path) -> None:
    found, exact = logits_of(build(path=path), IDS), exact_logits(path)
    errors = np.linalg.norm(found - exact, axis=1) / np.linalg.norm(exact, axis=1)
    # Rounded states move some tokens of a mixture to other experts.
    assert 1e-5 < float(np.median(errors)) < (3e-2 if path.stem == "dense" else 3e-1)


def test_the_kernels_own_source_gives_the_same_logits(
    path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layers_module, "ExpertKernels", ExpertKernels)
    forward = build(path=path, dtype=torch.float32, kernels=Kernels("cpu", host_launcher(tmp_path_factory)))
    assert worst_error(logits_of(forward, IDS[:45]), exact_logits(path)[:45]) <= 1e-5


def test_held_bytes_are_the_files(path: Path) -> None:
    forward, model = build(path=path), open_model(path)
    held = sum(matrix.resident_bytes for matrix in forward.matrices.values()) + sum(forward.vector_bytes.values())
    assert held == model.tensor_bytes
