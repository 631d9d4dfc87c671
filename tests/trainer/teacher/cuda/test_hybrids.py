"""Hybrid decoders on the CUDA path's own code, on the CPU: over reference kernels, and over the kernels' source."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from emulated_cuda import Recorder, build, product  # noqa: F401
from host_kernels import host_launcher
from reference_kernels import ReferenceExpertKernels, ReferenceKernels, ReferenceStateKernels, widening_multiply

pytest.importorskip("transformers")
from hybrid_models import HYBRIDS as CASES
from hybrid_models import make_hybrid, write_hybrid

import q4kd.trainer.teacher.cuda.layers as layers_module
import q4kd.trainer.teacher.cuda.mixture as mixture_module
import q4kd.trainer.teacher.cuda.recurrent as recurrent_module
from q4kd.harness.inputs.models.synthetic_hybrids import HYBRIDS, VOCAB, write_hybrid_model
from q4kd.harness.oracles.families import family_logits, read_family
from q4kd.trainer.formats.open import open_model
from q4kd.trainer.kernels.state_kernels import StateKernels
from q4kd.trainer.kernels.teacher_kernels import Kernels
from q4kd.trainer.teacher.cuda.forward import CudaForward

IDS = np.random.default_rng(5).integers(0, VOCAB, (3, 150))
EDGES = (37, 63, 64, 65, 127, 149)
STARTS = torch.from_numpy(np.tile(np.repeat([0, *EDGES], np.diff([0, *EDGES, 150])), (3, 1)))


@pytest.fixture(autouse=True)
def experts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mixture_module, "multiply", widening_multiply)
    monkeypatch.setattr(layers_module, "ExpertKernels", ReferenceExpertKernels)
    monkeypatch.setattr(layers_module, "StateKernels", ReferenceStateKernels)


@pytest.fixture(scope="module", params=HYBRIDS)
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("hybrids") / f"{request.param}.gguf"
    write_hybrid_model(made, request.param)
    return made


def logits_of(forward: CudaForward, ids: np.ndarray, starts: torch.Tensor | None = None) -> np.ndarray:
    hidden = forward.hidden(torch.from_numpy(ids), starts)
    return forward.head_logits(hidden.flatten(0, 1)).view(*ids.shape, -1).numpy()


def row_errors(found: np.ndarray, exact: np.ndarray) -> np.ndarray:
    return np.linalg.norm(found - exact, axis=-1) / np.linalg.norm(exact, axis=-1)


@pytest.mark.parametrize("backend", ["q4k", "dense"])
def test_float32_is_within_1e_5_of_float64(path: Path, backend: str) -> None:
    model = read_family(path)
    found = logits_of(build(path=path, backend=backend, dtype=torch.float32), IDS)
    assert row_errors(found, np.stack([family_logits(model, row) for row in IDS])).max() <= 1e-5


@pytest.mark.parametrize(("tokens", "run_bytes"), [(8192, 1), (8192, 256 << 20), (300, 256 << 20), (1, 1)])
def test_packed_documents_are_each_alone_however_the_work_is_cut(
    path: Path, monkeypatch: pytest.MonkeyPatch, tokens: int, run_bytes: int
) -> None:
    monkeypatch.setattr(recurrent_module, "STATE_TOKENS", tokens)
    monkeypatch.setattr(recurrent_module, "RUN_BYTES", run_bytes)
    model = read_family(path)
    alone = np.stack([np.concatenate([family_logits(model, part) for part in np.split(row, EDGES)]) for row in IDS])
    recorder = Recorder()
    found = logits_of(build(path=path, recorder=recorder, dtype=torch.float32), IDS, STARTS)
    assert row_errors(found, alone).max() <= 1e-5
    assert recorder.ahead > 0 and not recorder.in_use


@pytest.mark.parametrize("backend", ["q4k", "dense"])
def test_bfloat16_is_near(path: Path, backend: str) -> None:
    model = read_family(path)
    found = logits_of(build(path=path, backend=backend), IDS)
    errors = row_errors(found, np.stack([family_logits(model, row) for row in IDS]))
    assert 1e-5 < np.median(errors) <= 3e-2


@pytest.mark.parametrize("name", CASES)
def test_the_teacher_is_the_model_that_transformers_runs(tmp_path: Path, name: str) -> None:
    model = make_hybrid(CASES[name])
    made = write_hybrid(tmp_path / "m.gguf", CASES[name], model, predictors=1)
    with torch.no_grad():
        exact = model(torch.from_numpy(IDS)).logits.numpy()
    assert row_errors(logits_of(build(path=made, dtype=torch.float32), IDS), exact).max() <= 1e-5


def test_the_bench_times_the_same_function_in_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    from q4kd.trainer.bench.synthetic_30b_a3b import make_tensors
    from q4kd.trainer.bench.synthetic_35b_a3b import qwen36_35b_a3b
    from q4kd.trainer.bench.teacher.mixture_twin import build_mixture_twin

    config = dataclasses.replace(
        qwen36_35b_a3b(4), hidden_size=256, num_heads=2, num_kv_heads=1, vocab_size=VOCAB, context_length=256,
        num_experts=6, experts_per_token=2, expert_ffn_size=256, shared_ffn_size=256,
        recurrence=recurrent_module.Recurrence(
            key_heads=2, value_heads=4, head_dim=64, taps=4, layers=(True, True, True, False)
        ),
    )  # fmt: skip
    cpu, ids = torch.device("cpu"), torch.from_numpy(IDS[:1])
    twin = build_mixture_twin(config, make_tensors(config, cpu), torch.float32)
    forward = CudaForward(
        config, make_tensors(config, cpu), "q4k", ReferenceKernels(), dtype=torch.float32, overlap=False
    )
    with torch.no_grad():
        exact = twin(input_ids=ids, use_cache=False).logits.numpy()
    assert row_errors(logits_of(forward, IDS[:1]), exact).max() <= 3e-5  # both are float32


def test_a_few_tokens_take_the_small_batch_products(path: Path) -> None:
    forward = build(path=path)
    few, many = logits_of(forward, IDS[:1, :9])[0], logits_of(forward, IDS[:1, :40])[0, :9]
    assert "matvec" in forward._kernels.calls
    assert np.median(row_errors(few, many)) <= 3e-2


def test_the_kernels_own_source_gives_the_same_logits(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layers_module, "StateKernels", StateKernels)
    write_hybrid_model(tmp_path / "m.gguf", "qwen35")
    kernels = Kernels("cpu", host_launcher(tmp_path_factory))
    ids, starts = IDS[:2, :7], torch.tensor([[0, 0, 0, 3, 3, 3, 3], [0, 1, 1, 1, 1, 1, 1]])
    found = logits_of(build(path=tmp_path / "m.gguf", kernels=kernels, dtype=torch.float32), ids, starts)
    model = read_family(tmp_path / "m.gguf")
    for row, edge in enumerate((3, 1)):
        alone = np.concatenate([family_logits(model, part) for part in np.split(ids[row], [edge])])
        assert row_errors(found[row], alone).max() <= 1e-5


def test_held_bytes_are_the_files(path: Path) -> None:
    forward, model = build(path=path, dtype=torch.float32), open_model(path)
    held = sum(matrix.resident_bytes for matrix in forward.matrices.values()) + sum(forward.vector_bytes.values())
    assert held == model.tensor_bytes


def test_planned_bytes_are_no_less_than_those_of_the_largest_tensors() -> None:
    sizes = open_sizes()
    found = recurrent_module.recurrent_bytes(sizes, 4, 2048)
    assert found >= 4 * 8192 * (sizes.conv_size + sizes.value_size) + recurrent_module.RUN_BYTES // 2
    assert recurrent_module.recurrent_bytes(sizes, 8, 2048) == found  # sequences are taken by 8,192 tokens


def open_sizes() -> recurrent_module.Recurrence:
    return recurrent_module.Recurrence(key_heads=16, value_heads=32, head_dim=128, taps=4, layers=(True,))
