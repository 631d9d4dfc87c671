"""The CUDA forward's own logic (groups, slabs, views, buffer order, head) on the CPU, over reference kernels."""

from pathlib import Path

import numpy as np
import pytest
import torch
from architecture_models import CASES, make_model, make_tokenizer
from emulated_cuda import Recorder, build, product  # noqa: F401
from reference_kernels import ReferenceKernels

import q4kd.trainer.teacher.cuda.forward as forward_module
from q4kd.harness.inputs.demo import GOLDEN_LOGITS, GOLDEN_TEACHER
from q4kd.harness.inputs.models.synthetic_models import MODELS, model_ids, write_small_model
from q4kd.harness.oracles.reference import read_gguf, reference_logits
from q4kd.trainer.formats.gguf.writer import write_gguf
from q4kd.trainer.formats.open import open_model
from q4kd.trainer.teacher.cpu.forward import CpuForward
from q4kd.trainer.teacher.cuda.forward import CudaForward
from q4kd.trainer.teacher.cuda.stream import WeightStream, cut_slabs
from q4kd.trainer.teacher.cuda.weights import CudaMatrix, DeviceTensor, Group


def golden_ids() -> torch.Tensor:
    with np.load(GOLDEN_LOGITS, allow_pickle=False) as arrays:
        return torch.from_numpy(arrays["ids"]).long()


def logits_of(forward: CudaForward, ids_BT: torch.Tensor) -> np.ndarray:
    return forward.head_logits(forward.hidden(ids_BT).flatten(0, 1)).view(*ids_BT.shape, -1).numpy()


def row_errors(found: np.ndarray, exact: np.ndarray) -> np.ndarray:
    return np.linalg.norm(found - exact, axis=-1) / np.linalg.norm(exact, axis=-1)


@pytest.fixture(scope="module")
def exact() -> np.ndarray:
    return reference_logits(read_gguf(GOLDEN_TEACHER), golden_ids().numpy())


@pytest.mark.parametrize("backend", ["q4k", "dense"])
@pytest.mark.parametrize("overlap", [False, True])
def test_float32_is_within_1e_5_of_float64_at_every_position(backend: str, overlap: bool, exact: np.ndarray) -> None:
    recorder = Recorder() if overlap else None
    forward = build(backend=backend, recorder=recorder, dtype=torch.float32)
    assert row_errors(logits_of(forward, golden_ids()[None])[0], exact).max() <= 1e-5
    if recorder is not None and backend == "q4k":
        assert recorder.ahead > 0
        assert not recorder.in_use


@pytest.mark.parametrize("case", ["qwen2-tied", "qwen3", "llama3-tied"])
def test_other_architectures_are_within_1e_5_of_float64(tmp_path: Path, case: str) -> None:
    model, path = make_model(CASES[case], intermediate_size=256), tmp_path / "model.gguf"
    write_gguf(
        path, config=model.config, state=model.state_dict(), tokenizer=make_tokenizer(), recipe="q4_k_m", name=case
    )
    ids = torch.arange(24).view(2, 12) * 7
    found = logits_of(build(path=path, recorder=Recorder(), dtype=torch.float32), ids)
    reference = read_gguf(path)
    for row in range(2):
        assert row_errors(found[row], reference_logits(reference, ids[row].numpy())).max() <= 1e-5


@pytest.mark.parametrize("backend", ["q4k", "dense"])
def test_types_of_codes_and_the_scale_of_a_tensor_are_within_1e_5_of_float64(tmp_path: Path, backend: str) -> None:
    path, ids = tmp_path / "model.gguf", torch.from_numpy(model_ids(40))
    write_small_model(path, MODELS["qwen3"])
    assert any(tensor.scale != 1.0 for tensor in open_model(path).tensors.values())
    found = logits_of(build(path=path, backend=backend, dtype=torch.float32), ids[None])[0]
    assert row_errors(found, reference_logits(read_gguf(path), ids.numpy())).max() <= 1e-5


@pytest.mark.parametrize(
    ("scratch_bytes", "head_bytes"), [(1, 1 << 30), (30_000, 0), (30_000, 1 << 30), (300_000, 0), (300_000, 1 << 30)]
)
def test_slabs_of_any_height_give_the_same_logits(scratch_bytes: int, head_bytes: int, exact: np.ndarray) -> None:
    recorder = Recorder()
    options = {"scratch_bytes": scratch_bytes, "head_bytes": head_bytes, "dtype": torch.float32}
    forward = build(recorder=recorder, **options)
    ids = golden_ids()[None]
    # Twice, the head between: the order of buffers must survive the end of a pass.
    for _ in range(2):
        assert row_errors(logits_of(forward, ids)[0], exact).max() <= 1e-5
    row = forward.config.ffn_size * 4
    assert forward.scratch.num_bytes <= 2 * max(scratch_bytes, row) + min(head_bytes, forward._head.rows * 256 * 4)


def test_bfloat16_is_closer_to_float64_than_two_in_a_hundred(exact: np.ndarray) -> None:
    assert row_errors(logits_of(build(), golden_ids()[None])[0], exact).max() <= 2e-2


def test_feed_forward_in_token_chunks_changes_nothing(monkeypatch: pytest.MonkeyPatch, exact: np.ndarray) -> None:
    monkeypatch.setattr(forward_module, "MLP_TOKENS", 7)
    forward = build(recorder=Recorder(), dtype=torch.float32)
    assert row_errors(logits_of(forward, golden_ids()[None])[0], exact).max() <= 1e-5


def test_a_group_in_slabs_is_finished_for_every_token_before_swiglu(
    monkeypatch: pytest.MonkeyPatch, exact: np.ndarray
) -> None:
    monkeypatch.setattr(forward_module, "MLP_TOKENS", 7)
    forward = build(recorder=Recorder(), dtype=torch.float32, scratch_bytes=300_000)
    assert row_errors(logits_of(forward, golden_ids()[None])[0], exact).max() <= 1e-5


def test_an_aborted_pass_leaves_nothing_behind(exact: np.ndarray) -> None:
    recorder = Recorder()
    forward = build(recorder=recorder, dtype=torch.float32, scratch_bytes=300_000)
    kernels, whole = forward._kernels, forward._kernels.swiglu
    kernels.swiglu = None  # the pass stops in the first layer, with a slab decoded ahead
    with pytest.raises(TypeError):
        forward.hidden(golden_ids()[None])
    kernels.swiglu = whole
    recorder.in_use.clear()
    assert row_errors(logits_of(forward, golden_ids()[None])[0], exact).max() <= 1e-5


def test_short_passes_decode_in_line(monkeypatch: pytest.MonkeyPatch, exact: np.ndarray) -> None:
    monkeypatch.setattr(forward_module, "OVERLAP_MIN_TOKENS", 97)
    recorder = Recorder()
    forward = build(recorder=recorder, dtype=torch.float32)
    assert row_errors(logits_of(forward, golden_ids()[None])[0], exact).max() <= 1e-5
    assert not recorder.written
    forward.hidden(torch.cat([golden_ids(), golden_ids()])[None])
    assert recorder.written


def test_a_small_batch_takes_the_fused_products_and_agrees(exact: np.ndarray) -> None:
    forward = build(recorder=Recorder())
    kernels = forward._kernels
    assert row_errors(logits_of(forward, golden_ids()[None, :16])[0], exact[:16]).max() <= 2e-2
    assert "matvec" in kernels.calls
    assert row_errors(logits_of(forward, golden_ids()[None, :17])[0], exact[:17]).max() <= 2e-2
    assert row_errors(logits_of(forward, golden_ids()[None, :5])[0], exact[:5]).max() <= 2e-2


def test_a_batch_is_its_sequences() -> None:
    forward = build(dtype=torch.float32)
    ids = golden_ids().view(4, -1)
    together = logits_of(forward, ids)
    for row in range(4):
        assert np.allclose(together[row], logits_of(forward, ids[row : row + 1])[0], atol=1e-4)


def test_the_head_is_decoded_once_for_all_chunks_of_a_pass() -> None:
    forward = build()
    hidden_MH = forward.hidden(golden_ids()[None])[0]
    assert forward.scratch.num_bytes == forward._stream.num_bytes
    whole = forward.head_logits(hidden_MH)
    before = len(forward._kernels.calls)
    parts = torch.cat([forward.head_logits(part) for part in hidden_MH.split(24)])
    assert len(forward._kernels.calls) == before
    assert torch.equal(whole, parts)
    assert forward.scratch.num_bytes > forward._stream.num_bytes
    forward.hidden(golden_ids()[None])
    assert forward.scratch.num_bytes == forward._stream.num_bytes
    forward.head_logits(hidden_MH)
    forward.release_head()
    assert forward.scratch.num_bytes == forward._stream.num_bytes


def test_every_matrix_is_held_in_the_bytes_of_its_file() -> None:
    forward, model = build(), open_model(GOLDEN_TEACHER)
    held = sum(matrix.resident_bytes for matrix in forward.matrices.values()) + sum(forward.vector_bytes.values())
    assert held == model.tensor_bytes
    assert not any(matrix.is_dense for matrix in forward.matrices.values())
    assert set(forward.matrices) == {name for name, tensor in model.tensors.items() if len(tensor.shape) == 2}


def test_dense_holds_every_matrix_decoded() -> None:
    forward = build(backend="dense")
    assert all(matrix.is_dense and matrix.held_as == "BF16" for matrix in forward.matrices.values())
    assert forward.scratch.num_bytes == 0
    weights = sum(matrix.rows * matrix.cols for matrix in forward.matrices.values())
    assert sum(matrix.resident_bytes for matrix in forward.matrices.values()) == 2 * weights


def test_embedding_rows_are_those_of_the_cpu() -> None:
    ids = torch.tensor([3, 0, 511, 3])
    assert torch.equal(build().embed(ids), CpuForward(open_model(GOLDEN_TEACHER), "q4k").embed(ids))


def test_slabs_cover_every_row_of_every_matrix_once() -> None:
    tensors = [
        DeviceTensor(str(rows), "F32", (rows, 4), torch.randn(rows, 4).view(torch.uint8)) for rows in (5, 1, 9, 2)
    ]
    kernels = ReferenceKernels()
    group = Group([CudaMatrix(tensor, kernels) for tensor in tensors])
    dense = torch.cat([tensor.packed.view(torch.float32) for tensor in tensors])
    for height in range(1, 20):
        assert all(stop - start <= height for start, stop, _ in cut_slabs(group, height))
        stream = WeightStream(
            [[group]], dtype=torch.float32, device=torch.device("cpu"), scratch_bytes=16 * height, timeline=Recorder()
        )
        stream.begin(look_ahead=True)
        found = torch.full((17, 4), float("nan"))
        for rows, weights in stream.decoded(group):
            found[rows] = weights
        assert torch.equal(found, dense)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_documents_are_each_alone(dtype: torch.dtype) -> None:
    forward = build("q4k", dtype=dtype)
    ids, lengths = golden_ids(), [40, 1, 55]
    starts = torch.repeat_interleave(torch.tensor([0, 40, 41]), torch.tensor(lengths))[None]
    packed, joined = forward.hidden(ids[None], starts)[0].float(), forward.hidden(ids[None])[0].float()
    alone = torch.cat([forward.hidden(part[None])[0].float() for part in ids.split(lengths)])
    error = (packed - alone).norm(dim=-1) / alone.norm(dim=-1)
    assert float(error.max()) <= (1e-5 if dtype == torch.float32 else 3e-2)
    assert float(((joined - alone).norm(dim=-1) / alone.norm(dim=-1))[40:].max()) > 0.1
