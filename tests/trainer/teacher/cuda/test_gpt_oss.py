"""gpt-oss on the CUDA path's own code, on the CPU: over reference kernels, and over the kernels' source."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from emulated_cuda import Recorder
from family_models import MIXTURES, exact_logits, make_family, write_family
from host_kernels import host_launcher
from reference_kernels import ReferenceExpertKernels, ReferenceKernels, device_tensors, widening_multiply

import q4kd.trainer.teacher.cuda.forward as forward_module
import q4kd.trainer.teacher.cuda.layers as layers_module
import q4kd.trainer.teacher.cuda.mixture as mixture_module
from q4kd.harness.inputs.models.synthetic_gpt_oss import write_gpt_oss
from q4kd.trainer.bench.synthetic_gpt_oss import gpt_oss_20b, make_tensors
from q4kd.trainer.bench.teacher.gpt_oss_twin import build_gpt_oss_twin
from q4kd.trainer.formats.open import open_model
from q4kd.trainer.kernels.teacher_kernels import Kernels
from q4kd.trainer.teacher.cuda.forward import CudaForward

TINY = dataclasses.replace(
    gpt_oss_20b(3),
    hidden_size=96,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    vocab_size=300,
    context_length=64,
    windows=(5, 0, 5),
    num_experts=6,
    experts_per_token=2,
    expert_ffn_size=64,
)
IDS = (torch.arange(2 * 24) * 11 % 300).view(2, 24)
EXPERT_BYTES = 4 * 2 * 64 * 96  # of gate and up in float32
STARTS = torch.tensor([[0] * 24, [0] * 9 + [9] * 15])


@pytest.fixture(autouse=True)
def product(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (forward_module, mixture_module):
        monkeypatch.setattr(module, "multiply", widening_multiply)
    monkeypatch.setattr(forward_module, "OVERLAP_MIN_TOKENS", 0)


def lively(config: object = TINY) -> dict[str, object]:
    """Synthetic tensors whose gates and products beside them reach the clamps."""
    tensors = make_tensors(config, torch.device("cpu"))
    for name, tensor in tensors.items():
        if tensor.type == "MXFP4" and "down" not in name:
            tensor.packed.view(-1, 17)[:, 0] += 5
    return tensors


def build(
    monkeypatch: pytest.MonkeyPatch, *, kernels: Kernels | None = None, backend: str = "q4k", **options: object
) -> CudaForward:
    if kernels is None:
        monkeypatch.setattr(layers_module, "ExpertKernels", ReferenceExpertKernels)
    options = {"dtype": torch.float32, "overlap": False} | options
    return CudaForward(TINY, lively(), backend, kernels or ReferenceKernels(), **options)


def twin_logits(ids_BT: torch.Tensor) -> torch.Tensor:
    """transformers' own model of the same weights in float32: logits ``[M, V]``."""
    pytest.importorskip("transformers")
    twin = build_gpt_oss_twin(TINY, lively(), torch.float32)
    with torch.no_grad():
        return twin(input_ids=ids_BT, use_cache=False).logits.flatten(0, 1)


def logits_of(forward: CudaForward, ids_BT: torch.Tensor, starts_BT: torch.Tensor | None = None) -> torch.Tensor:
    return forward.head_logits(forward.hidden(ids_BT, starts_BT).flatten(0, 1))


def worst_error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float(((found.double() - exact).norm(dim=1) / exact.double().norm(dim=1)).max())


@pytest.mark.parametrize(("slab", "rows"), [(1, 1000), (2, 5), (4, 16), (4, 1000), (100, 16)])
def test_every_cut_gives_transformers_logits(monkeypatch: pytest.MonkeyPatch, slab: int, rows: int) -> None:
    recorders: list[Recorder] = []
    monkeypatch.setattr(forward_module, "SideStream", lambda *_: recorders.append(Recorder()) or recorders[-1])
    forward = build(monkeypatch, overlap=True, slab_bytes=slab * EXPERT_BYTES, expert_rows=rows)
    assert worst_error(logits_of(forward, IDS), twin_logits(IDS)) <= 1e-5
    assert not recorders[1].in_use


def test_packed_documents_are_each_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    found = logits_of(build(monkeypatch), IDS, STARTS)
    alone = [twin_logits(IDS[:1]), twin_logits(IDS[1:, :9]), twin_logits(IDS[1:, 9:])]
    assert worst_error(found, torch.cat(alone)) <= 1e-5


@pytest.mark.parametrize("backend", ["q4k", "dense"])
def test_bfloat16_is_near_and_both_backends_agree(monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    found, exact = logits_of(build(monkeypatch, backend=backend, dtype=torch.bfloat16), IDS), twin_logits(IDS)
    error = (found.double() - exact).norm(dim=1) / exact.norm(dim=1)
    assert 1e-5 < float(error.median()) < 3e-2


def test_the_kernels_own_source_gives_the_same_logits(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    launcher = host_launcher(tmp_path_factory)
    forward = build(monkeypatch, kernels=Kernels("cpu", launcher), slab_bytes=4 * EXPERT_BYTES, expert_rows=20)
    ids = IDS[:1, :12]
    assert worst_error(logits_of(forward, ids), twin_logits(ids)) <= 1e-5
    assert {"clamped_swiglu_f32_v8", "experts_mxfp4_f32"} <= launcher.launched


def test_held_bytes_are_the_files(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = build(monkeypatch)
    packed = sum(tensor.packed.nbytes for tensor in lively().values())
    held = sum(matrix.resident_bytes for matrix in forward.matrices.values()) + sum(forward.vector_bytes.values())
    assert held == packed


@pytest.mark.parametrize("part", ["whole", "attention", "experts"])
def test_a_file_is_within_1e_5_of_float64(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, part: str) -> None:
    write_gpt_oss(tmp_path / "m.gguf", part=part)
    check_file(monkeypatch, tmp_path / "m.gguf", 160)


@pytest.mark.parametrize("name", ["gpt-oss", "gpt-oss-all"])
def test_an_independently_written_file_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str) -> None:
    pytest.importorskip("transformers")
    case = MIXTURES[name]
    check_file(monkeypatch, write_family(tmp_path / "m.gguf", case, make_family(case)), 320)


def check_file(monkeypatch: pytest.MonkeyPatch, path: Path, vocab: int) -> None:
    """A text longer than two windows of either length, one token again and again, and one alone."""
    monkeypatch.setattr(layers_module, "ExpertKernels", ReferenceExpertKernels)
    model = open_model(path)
    tensors = device_tensors(model)
    forward = CudaForward(
        model.config, tensors, "q4k", ReferenceKernels(), dtype=torch.float32, overlap=False, slab_bytes=EXPERT_BYTES
    )
    for ids in (np.random.default_rng(3).integers(0, vocab, 100), np.full(40, 9), np.array([3])):
        exact = torch.from_numpy(exact_logits(path, ids))
        assert worst_error(logits_of(forward, torch.from_numpy(ids)[None]), exact) <= 1e-5


def test_planned_bytes_are_those_that_are_held(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = build(monkeypatch)
    scratch, activations = mixture_module.mixture_bytes(TINY, 48, 4)
    assert scratch == forward._mixture.num_bytes
    assert activations >= 48 * 2 * 4 * (2 * 96 + 3 * 64) + 4 * 48 * 6
