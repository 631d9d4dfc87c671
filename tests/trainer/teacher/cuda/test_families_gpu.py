"""The dense families on a GPU, against the harness's float64 forward. Run there with ``-m gpu``."""

from pathlib import Path

import numpy as np
import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

from q4kd.harness.inputs.models.synthetic_families import FAMILIES, write_family_model  # noqa: E402
from q4kd.harness.inputs.models.synthetic_models import VOCAB  # noqa: E402
from q4kd.harness.oracles.families import family_logits, read_family  # noqa: E402
from q4kd.trainer.formats.open import open_model  # noqa: E402
from q4kd.trainer.kernels.attention import blocked_attention, window_starts  # noqa: E402
from q4kd.trainer.kernels.numerics import pinned_numerics  # noqa: E402
from q4kd.trainer.kernels.windowed import Reach  # noqa: E402
from q4kd.trainer.teacher.cuda.load import load_forward  # noqa: E402

LENGTH, BORDERS = 600, (37, 128, 450)
IDS = np.random.default_rng(6).integers(0, VOCAB, LENGTH)


def starts_of(length: int, batch: int = 1) -> torch.Tensor:
    starts = torch.zeros(batch, length, dtype=torch.int64, device="cuda")
    for first in BORDERS:
        starts[:, first:] = first
    return starts


def row_errors(found: np.ndarray, exact: np.ndarray) -> np.ndarray:
    return np.linalg.norm(found - exact, axis=-1) / np.linalg.norm(exact, axis=-1)


@pytest.mark.parametrize("backend", ["q4k", "dense"])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_within_its_bound_of_float64(tmp_path: Path, name: str, backend: str) -> None:
    path = tmp_path / "m.gguf"
    write_family_model(path, FAMILIES[name])
    reference, model = read_family(path), open_model(path)
    exact = family_logits(reference, IDS)
    alone = np.concatenate([family_logits(reference, part) for part in np.split(IDS, BORDERS)])
    ids = torch.from_numpy(IDS)[None].cuda()
    for dtype, bound in ((torch.float32, 1e-5), (torch.bfloat16, 1e-1)):
        forward = load_forward(model, backend, dtype=dtype)
        for _ in range(3):  # the second pass is captured, the third replayed
            found = forward.head_logits(forward.hidden(ids)[0]).cpu().numpy()
            assert row_errors(found, exact).max() <= bound, dtype
        packed = forward.head_logits(forward.hidden(ids, starts_of(LENGTH))[0]).cpu().numpy()
        assert row_errors(packed, alone).max() <= bound, dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cap", [0.0, 3.0])
@pytest.mark.parametrize("window", [0, 64, 255, 512, 2047])
@pytest.mark.parametrize("documents", [False, True])
def test_windows_and_caps_agree_with_attention_on_the_host(
    dtype: torch.dtype, cap: float, window: int, documents: bool
) -> None:
    generator = torch.Generator().manual_seed(window)
    length, head_dim = 1100, 64
    q, k, v = (torch.randn(2, heads, length, head_dim, generator=generator).to(dtype) for heads in (4, 2, 2))
    starts = starts_of(length, 2) if documents else None
    with pinned_numerics():
        reach = Reach(2, length, starts, dtype, torch.device("cuda"))
        found = reach.attend(q.cuda(), k.cuda(), v.cuda(), window=window, scale=0.2, cap=cap).float().cpu()
    first = None if starts is None else starts.cpu()
    if 0 < window < length:
        first = window_starts(length, window, first).expand(2, -1)
    exact = blocked_attention(q.float(), k.float(), v.float(), first, scale=0.2, cap=cap).flatten(2).flatten(0, 1)
    error = (found - exact).norm(dim=-1) / exact.norm(dim=-1)
    assert float(error.max()) <= (2e-5 if dtype == torch.float32 else 3e-2)


def test_a_long_window_takes_memory_of_its_own_keys_only() -> None:
    length, window = 16384, 512
    q, k, v = (torch.randn(1, heads, length, 64, device="cuda", dtype=torch.bfloat16) for heads in (8, 2, 2))
    with pinned_numerics():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        reach = Reach(1, length, None, torch.bfloat16, torch.device("cuda"))
        reach.attend(q, k, v, window=window, scale=0.125, cap=0.0)
        taken = torch.cuda.max_memory_allocated() - before
    # A mask over all keys alone would take 2 x 16,384^2 bytes, 537 MB.
    assert taken <= 200e6
