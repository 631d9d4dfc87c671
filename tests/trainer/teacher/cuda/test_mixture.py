"""Products of experts on the CUDA path's own code, on the CPU: over reference kernels, and over the kernels' source."""

import dataclasses
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import pytest
import torch
from emulated_cuda import Recorder
from host_kernels import host_launcher
from reference_kernels import ReferenceExpertKernels, ReferenceKernels, device_tensors, widening_multiply

import q4kd.trainer.teacher.cuda.forward as forward_module
import q4kd.trainer.teacher.cuda.layers as layers_module
import q4kd.trainer.teacher.cuda.mixture as mixture_module
from q4kd.harness.inputs.models.synthetic_mixtures import VOCAB, write_mixture
from q4kd.harness.oracles.families import family_logits, read_family
from q4kd.trainer.bench.synthetic_30b_a3b import make_tensors, qwen3_30b_a3b
from q4kd.trainer.errors import InputError
from q4kd.trainer.formats.architecture import TeacherConfig
from q4kd.trainer.formats.blocks.decode import decode_rows
from q4kd.trainer.formats.blocks.layout import FORMATS
from q4kd.trainer.formats.open import open_model
from q4kd.trainer.kernels.teacher_kernels import Kernels
from q4kd.trainer.teacher.cuda.experts import ExpertMatrix
from q4kd.trainer.teacher.cuda.forward import CudaForward
from q4kd.trainer.teacher.cuda.mixture import cut_runs
from q4kd.trainer.teacher.cuda.weights import DeviceTensor

TINY = dataclasses.replace(
    qwen3_30b_a3b(2),
    hidden_size=256,
    num_heads=2,
    num_kv_heads=1,
    vocab_size=300,
    context_length=64,
    num_experts=6,
    experts_per_token=2,
    expert_ffn_size=256,
)
IDS = (torch.arange(2 * 12) * 11 % 300).view(2, 12)
EXPERT_BYTES = 4 * 2 * 256 * 256  # of gate and up in float32


@pytest.fixture(autouse=True)
def product(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (forward_module, mixture_module):
        monkeypatch.setattr(module, "multiply", widening_multiply)
    monkeypatch.setattr(forward_module, "OVERLAP_MIN_TOKENS", 0)


def build(
    monkeypatch: pytest.MonkeyPatch,
    config: TeacherConfig = TINY,
    backend: str = "q4k",
    *,
    kernels: Kernels | None = None,
    recorders: list[Recorder] | None = None,
    dtype: torch.dtype = torch.float32,
    **options: int,
) -> tuple[CudaForward, ReferenceExpertKernels]:
    """The forward over synthetic weights, and the reference kernels of its experts."""
    made = ReferenceExpertKernels()
    if kernels is None:
        monkeypatch.setattr(layers_module, "ExpertKernels", lambda *_: made)
    if recorders is not None:
        monkeypatch.setattr(forward_module, "SideStream", lambda *_: recorders.append(Recorder()) or recorders[-1])
    tensors = make_tensors(config, torch.device("cpu"))
    forward = CudaForward(
        config,
        tensors,
        backend,
        kernels or ReferenceKernels(),
        dtype=dtype,
        overlap=recorders is not None,
        **options,
    )
    return forward, made


def twin_logits(config: TeacherConfig, ids_BT: torch.Tensor) -> torch.Tensor:
    """transformers' own model of the same weights in float32: logits ``[M, V]``."""
    from q4kd.trainer.bench.teacher.mixture_twin import build_mixture_twin

    twin = build_mixture_twin(config, make_tensors(config, torch.device("cpu")), torch.float32)
    with torch.no_grad():
        return twin(input_ids=ids_BT, use_cache=False).logits.flatten(0, 1)


def logits_of(forward: CudaForward, ids_BT: torch.Tensor = IDS) -> torch.Tensor:
    return forward.head_logits(forward.hidden(ids_BT).flatten(0, 1))


def worst_error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float(((found.double() - exact).norm(dim=1) / exact.double().norm(dim=1)).max())


def test_runs_cover_every_row_once_with_its_experts() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        counts = torch.randint(0, 9, (12,), generator=generator) * torch.randint(0, 2, (12,), generator=generator)
        ends = counts.cumsum(0).tolist()
        rows = []
        for first, last in ((0, 5), (5, 8), (8, 12)):
            runs = cut_runs(ends, first, last, 7)
            assert all(0 < run.stop - run.start <= 7 for run in runs)
            for run in runs:
                assert first <= run.first < run.last <= last and run.ends[-1] == run.stop - run.start
                begin = 0
                for expert, end in zip(range(run.first, run.last), run.ends, strict=True):
                    rows += [(expert, row) for row in range(run.start + begin, run.start + end)]
                    begin = end
        start, want = 0, []
        for expert, end in enumerate(ends):
            want += [(expert, row) for row in range(start, end)]
            start = end
        assert rows == want


@pytest.mark.parametrize(("slab", "rows"), [(1, 1000), (2, 5), (4, 16), (4, 1000), (100, 16)])
def test_every_cut_gives_transformers_logits(monkeypatch: pytest.MonkeyPatch, slab: int, rows: int) -> None:
    pytest.importorskip("transformers")
    recorders: list[Recorder] = []
    forward, _ = build(monkeypatch, recorders=recorders, slab_bytes=slab * EXPERT_BYTES, expert_rows=rows)
    assert worst_error(logits_of(forward), twin_logits(TINY, IDS)) <= 1e-5
    assert not recorders[1].in_use


class Order(Recorder):
    """A recorder that says in which order buffers are decoded into, and read."""

    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []

    def begin(self) -> None:
        super().begin()
        self.said.append("begin")

    def writing(self, buffer: int) -> AbstractContextManager[None]:
        self.said.append(f"decode {buffer}")
        return super().writing(buffer)

    def reading(self, buffer: int) -> None:
        super().reading(buffer)
        self.said.append(f"multiply {buffer}")


def test_each_buffer_is_decoded_ahead_of_the_product_with_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    recorders: list[Recorder] = []
    forward, _ = build(
        monkeypatch, dataclasses.replace(TINY, num_layers=1), recorders=recorders, slab_bytes=2 * EXPERT_BYTES
    )
    order = forward._mixture._timeline = Order()
    forward.hidden(IDS)
    ahead = ["decode 1", "multiply 0", "decode 0", "multiply 1"]
    assert order.said == ["begin", "decode 0", *ahead, *ahead, "decode 1", "multiply 0", "multiply 1"]


@pytest.mark.parametrize("backend", ["q4k", "dense"])
def test_bfloat16_is_near_and_both_backends_agree(monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    pytest.importorskip("transformers")
    forward, _ = build(monkeypatch, backend=backend, dtype=torch.bfloat16)
    error = (logits_of(forward).double() - twin_logits(TINY, IDS)).norm(dim=1) / twin_logits(TINY, IDS).norm(dim=1)
    assert 1e-5 < float(error.median()) < 3e-2


def test_experts_that_no_token_chose_are_not_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    config = dataclasses.replace(TINY, num_layers=1)
    forward, made = build(monkeypatch, config, slab_bytes=2 * EXPERT_BYTES)
    router = forward._weights.layers[0].feed_forward.router
    router.zero_()
    normed = torch.randn(9, 256)
    normed[:, 0] = 50.0
    router[0, 5, 0], router[0, 2, 0] = 1.0, 0.5  # every token goes to these
    made.decoded.clear()
    residual = torch.zeros(9, 256)
    forward._mixture.add(forward._weights.layers[0].feed_forward, normed, residual)
    assert made.decoded == {2: 3, 5: 3}  # gate, up and down, once each
    tensors = make_tensors(config, torch.device("cpu"))
    want = torch.zeros(9, 256)
    shares = torch.tensor([0.0, 0.0, 25.0, 0.0, 0.0, 50.0]).softmax(0)
    for expert in (2, 5):
        gate, up, down = (
            decode_rows(t.type, t.packed, torch.empty(t.packed.shape[0], 256)).view(6, -1, 256)[expert]
            for t in (tensors[f"blk.0.ffn_{name}_exps.weight"] for name in ("gate", "up", "down"))
        )
        part = (torch.nn.functional.silu(normed @ gate.T) * (normed @ up.T)) @ down.T
        want += part * shares[expert] / (shares[2] + shares[5])
    assert worst_error(residual, want) <= 1e-5


def test_the_router_is_not_rounded_to_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    forward, _ = build(monkeypatch, dtype=torch.bfloat16)
    held = forward._weights.layers[0].feed_forward.router
    exact = make_tensors(TINY, torch.device("cpu"))["blk.0.ffn_gate_inp.weight"].packed.view(torch.float32)
    assert held.dtype == torch.bfloat16 and held.shape == (2, 6, 256)
    assert float((held.float().sum(0) - exact).abs().max() / exact.abs().max()) <= 2.0**-16


def test_the_kernels_own_source_gives_the_same_logits(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    pytest.importorskip("transformers")
    kernels = Kernels("cpu", host_launcher(tmp_path_factory))
    forward, _ = build(monkeypatch, kernels=kernels, slab_bytes=4 * EXPERT_BYTES, expert_rows=20)
    ids = IDS[:1, :7]
    assert worst_error(logits_of(forward, ids), twin_logits(TINY, ids)) <= 1e-5


def test_held_bytes_are_the_files_and_a_little_more(monkeypatch: pytest.MonkeyPatch) -> None:
    forward, _ = build(monkeypatch, slab_bytes=2 * EXPERT_BYTES)
    packed = sum(t.packed.nbytes for t in make_tensors(TINY, torch.device("cpu")).values())
    held = sum(matrix.resident_bytes for matrix in forward.matrices.values()) + sum(forward.vector_bytes.values())
    assert held == packed
    assert forward._mixture.num_bytes == 2 * EXPERT_BYTES * 3 // 2


@pytest.mark.parametrize("ids", [np.arange(60) * 7 % VOCAB, np.full(40, 9), np.array([3])])
def test_a_file_of_many_types_is_within_1e_5_of_float64(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, ids: np.ndarray
) -> None:
    monkeypatch.setattr(layers_module, "ExpertKernels", ReferenceExpertKernels)
    write_mixture(tmp_path / "m.gguf")
    model = open_model(tmp_path / "m.gguf")
    exact = torch.from_numpy(family_logits(read_family(tmp_path / "m.gguf"), ids))
    forward = CudaForward(
        model.config,
        device_tensors(model),
        "q4k",
        ReferenceKernels(),
        dtype=torch.float32,
        overlap=False,
        slab_bytes=3 * EXPERT_BYTES,
    )
    assert worst_error(logits_of(forward, torch.from_numpy(ids)[None]), exact) <= 1e-5


def test_what_cannot_be_decoded_is_refused_by_name() -> None:
    for name, shape in (("NVFP4", (2, 3, 64)), ("F32", (2, 3, 8))):
        packed = torch.zeros(6, FORMATS[name].row_bytes(shape[2]), dtype=torch.uint8)
        tensor = DeviceTensor("blk.0.ffn_up_exps.weight", name, shape, packed)
        with pytest.raises(InputError, match=f"ffn_up_exps.weight: expected experts of a type but NVFP4.*got {name}"):
            ExpertMatrix(tensor, ReferenceKernels(), ReferenceExpertKernels())


@pytest.mark.parametrize("packed", [False, True])
def test_windows_that_take_turns_are_those_of_one_pass(monkeypatch: pytest.MonkeyPatch, packed: bool) -> None:
    forward, _ = build(monkeypatch)
    ids = (torch.arange(5 * 12) * 7 % 300).view(5, 12)
    starts = torch.where(torch.arange(12) >= torch.arange(2, 7)[:, None], torch.arange(2, 7)[:, None], 0)
    whole = forward.hidden(ids, starts if packed else None)
    lengths = []
    run = forward._run
    monkeypatch.setattr(forward, "_run", lambda part, *more: (lengths.append(len(part)), run(part, *more))[1])
    monkeypatch.setattr(mixture_module, "PASS_TOKENS", 25)
    torch.testing.assert_close(forward.hidden(ids, starts if packed else None), whole, rtol=0, atol=1e-5)
    assert lengths == [2, 2, 1]
    assert mixture_module.windows_at_once(100) == 1


def test_planned_bytes_are_those_that_are_held(monkeypatch: pytest.MonkeyPatch) -> None:
    forward, _ = build(monkeypatch)
    scratch, activations = mixture_module.mixture_bytes(TINY, 24, 4)
    assert scratch == forward._mixture.num_bytes
    assert activations >= 24 * 2 * 4 * (2 * 256 + 3 * 256)
