"""Hybrid decoders on a GPU, against float64. Run with ``-m gpu``."""

from pathlib import Path

import numpy as np
import pytest
import torch

from q4kd.harness.inputs.models.synthetic_hybrids import HYBRIDS, VOCAB, write_hybrid_model
from q4kd.harness.oracles.families import FamilyModel, family_logits, read_family
from q4kd.trainer.bench.teacher.cuda_errors import row_errors
from q4kd.trainer.formats.open import open_model
from q4kd.trainer.kernels.state_kernels import StateKernels
from q4kd.trainer.teacher.cuda import recurrent
from q4kd.trainer.teacher.cuda.load import load_forward

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
IDS = np.random.default_rng(6).integers(0, VOCAB, (2, 400))
EDGES = (37, 63, 64, 65, 127, 300)
STARTS = torch.from_numpy(np.tile(np.repeat([0, *EDGES], np.diff([0, *EDGES, 400])), (2, 1)))


@pytest.fixture(scope="module", params=HYBRIDS)
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("hybrids") / f"{request.param}.gguf"
    write_hybrid_model(made, request.param)
    return made


def exact(model: FamilyModel, *edges: int) -> torch.Tensor:
    rows = [np.concatenate([family_logits(model, part) for part in np.split(row, edges)]) for row in IDS]
    return torch.from_numpy(np.concatenate(rows)).cuda()


@pytest.mark.parametrize("run_bytes", [1, 256 << 20])
@pytest.mark.parametrize("backend", ["q4k", "dense"])
def test_float32_is_within_1e_5_of_float64(
    path: Path, backend: str, run_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recurrent, "RUN_BYTES", run_bytes)
    forward, model = load_forward(open_model(path), backend, dtype=torch.float32), read_family(path)
    for starts, edges in ((None, ()), (STARTS.cuda(), EDGES)):
        hidden = forward.hidden(torch.from_numpy(IDS).cuda(), starts)
        found = forward.head_logits(hidden.flatten(0, 1))
        # A choice between two experts of nearly equal weight may fall otherwise.
        assert float(row_errors(found, exact(model, *edges)).quantile(0.99)) <= 1e-5


def test_bfloat16_is_near_and_repeats_itself(path: Path) -> None:
    forward, model = load_forward(open_model(path), "q4k"), read_family(path)
    found = [forward.head_logits(forward.hidden(torch.from_numpy(IDS).cuda()).flatten(0, 1)) for _ in range(3)]
    assert all(torch.equal(found[0], again) for again in found[1:])  # a race would show here
    assert 1e-5 < float(row_errors(found[0], exact(model)).median()) <= 3e-2


def test_a_layer_takes_no_more_than_was_planned() -> None:
    sizes = recurrent.Recurrence(key_heads=16, value_heads=32, head_dim=128, taps=4, layers=(True,))
    device = torch.device("cuda")
    net = recurrent.DeltaNet(
        sizes,
        steps=None,  # type: ignore[arg-type]
        taps_WX=torch.randn(4, sizes.conv_size, device=device),
        dt_V=torch.zeros(32, device=device),
        decay_V=-torch.ones(32, device=device),
        norm_D=torch.ones(128, device=device),
    )
    batch, length = 4, 2048
    qkvz = torch.randn(batch * length, sizes.conv_size + sizes.value_size, device=device).bfloat16()
    steps = torch.randn(batch * length, 64, device=device)
    out = torch.empty(batch * length, sizes.value_size, device=device, dtype=torch.bfloat16)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    recurrent.read_states(StateKernels(device), net, qkvz, steps, out, batch=batch, starts_BT=None, eps=1e-6)
    taken = torch.cuda.max_memory_allocated() - before
    planned = recurrent.recurrent_bytes(sizes, batch, length)
    assert torch.isfinite(out).all()
    assert planned / 2 <= taken <= planned
