"""Gemma 4 on a GPU, against the harness's float64 forward. Run there with ``-m gpu``."""

from pathlib import Path

import numpy as np
import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

from q4kd.harness.inputs.models.synthetic_gemma4 import VOCAB, write_gemma4_model  # noqa: E402
from q4kd.harness.oracles.families import read_family  # noqa: E402
from q4kd.harness.oracles.gemma4 import gemma4_logits  # noqa: E402
from q4kd.trainer.formats.open import open_model  # noqa: E402
from q4kd.trainer.kernels.attention import blocked_attention  # noqa: E402
from q4kd.trainer.kernels.numerics import attention, pinned_numerics  # noqa: E402
from q4kd.trainer.teacher.cuda.load import load_forward  # noqa: E402

LENGTH, BORDERS = 600, (37, 128, 450)
IDS = np.random.default_rng(6).integers(0, VOCAB, LENGTH)


def row_errors(found: np.ndarray, exact: np.ndarray) -> np.ndarray:
    return np.linalg.norm(found - exact, axis=-1) / np.linalg.norm(exact, axis=-1)


@pytest.mark.parametrize("backend", ["q4k", "dense"])
@pytest.mark.parametrize("mixture", [False, True])
def test_logits_are_within_their_bound_of_float64(tmp_path: Path, mixture: bool, backend: str) -> None:
    path = tmp_path / "m.gguf"
    write_gemma4_model(path, mixture=mixture)
    reference, model = read_family(path), open_model(path)
    exact = gemma4_logits(reference, IDS)
    alone = np.concatenate([gemma4_logits(reference, part) for part in np.split(IDS, BORDERS)])
    ids = torch.from_numpy(IDS)[None].cuda()
    starts = torch.zeros_like(ids)
    for first in BORDERS:
        starts[:, first:] = first
    for dtype, bound in ((torch.float32, 1e-5), (torch.bfloat16, 1e-1)):
        forward = load_forward(model, backend, dtype=dtype)
        found = [forward.head_logits(forward.hidden(ids)[0]).cpu().numpy() for _ in range(3)]
        assert all(np.array_equal(found[0], again) for again in found[1:])  # the third of a dense one is a replay
        packed = forward.head_logits(forward.hidden(ids, starts)[0]).cpu().numpy()
        # A choice between two experts of nearly equal weight may fall otherwise; rounded states move more of them.
        kept = (0.99 if dtype == torch.float32 else 0.5) if mixture else 1.0
        for logits, wanted in ((found[0], exact), (packed, alone)):
            assert np.quantile(row_errors(logits, wanted), kept) <= bound, dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("documents", [False, True])
def test_heads_of_512_agree_with_attention_on_the_host(dtype: torch.dtype, documents: bool) -> None:
    """Gemma 4's layers without a window have heads that flash attention does not take."""
    from q4kd.trainer.kernels.numerics import attention_bias

    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(2, heads, 700, 512, generator=generator).to(dtype) for heads in (8, 2, 2))
    starts = torch.zeros(2, 700, dtype=torch.int64)
    if documents:
        starts[:, 300:] = 300
    bias = attention_bias(starts.cuda(), dtype) if documents else None
    with pinned_numerics():
        found = attention(q.cuda(), k.cuda(), v.cuda(), bias, scale=0.05).float().cpu()
    exact = blocked_attention(q.float(), k.float(), v.float(), starts, scale=0.05).flatten(2).flatten(0, 1)
    error = (found - exact).norm(dim=-1) / exact.norm(dim=-1)
    assert float(error.max()) <= (2e-5 if dtype == torch.float32 else 3e-2)
