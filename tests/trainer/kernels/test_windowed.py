"""Attention over windows and of capped scores: blocks of one window give what a mask over all keys gives."""

import math

import pytest
import torch
from torch import Tensor

from q4kd.trainer.kernels import windowed
from q4kd.trainer.kernels.attention import causal_attention, window_starts
from q4kd.trainer.kernels.windowed import Reach, attention_bytes


def exact(
    q: Tensor, k: Tensor, v: Tensor, first_BT: Tensor, scale: float, cap: float, sinks: Tensor | None = None
) -> Tensor:
    """Attention in float64, every score computed and most of them masked, ``[B, T, N * D]``."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.double().repeat_interleave(groups, 1), v.double().repeat_interleave(groups, 1)
    scores = q.double() @ k.transpose(2, 3) * scale
    if cap:
        scores = cap * torch.tanh(scores / cap)
    place = torch.arange(q.shape[2])
    is_read = (place <= place[:, None]) & (place >= first_BT[:, :, None])
    scores = scores.masked_fill(~is_read[:, None], -math.inf)
    if sinks is not None:  # a column of its own, of a key whose value is zero
        column = sinks.double()[:, None, None].expand(len(q), -1, q.shape[2], 1)
        scores, v = torch.cat([scores, column], -1), torch.cat([v, torch.zeros_like(v[:, :, :1])], 2)
    return (torch.softmax(scores, -1) @ v).transpose(1, 2).flatten(2)


SINKS = torch.tensor([-30.0, 0.5, 2.0, 60.0])  # one that takes nothing, and one that takes all


@pytest.mark.parametrize(("cap", "sinks"), [(0.0, None), (1.5, None), (0.0, SINKS)])
@pytest.mark.parametrize("window", [0, 1, 7, 40, 60, 200])
@pytest.mark.parametrize("documents", [False, True])
def test_both_ways_read_the_keys_of_the_window_and_of_the_document(
    window: int, documents: bool, cap: float, sinks: Tensor | None
) -> None:
    generator = torch.Generator().manual_seed(window)
    q, k, v = (torch.randn(2, heads, 97, 16, generator=generator) for heads in (4, 2, 2))
    starts = torch.zeros(2, 97, dtype=torch.int64)
    if documents:
        starts[0, 30:], starts[1, 11:], starts[1, 12:] = 30, 11, 12
    place = torch.arange(97)
    first = torch.maximum(starts, place - window + 1) if window else starts
    want = exact(q, k, v, first, 0.3, cap, sinks)
    given = starts if documents else None
    found = causal_attention(q, k, v, given, window=window, scale=0.3, cap=cap, sinks=sinks).flatten(2)
    assert torch.allclose(found.double(), want, atol=1e-5)
    on_device = Reach(2, 97, given, torch.float32, torch.device("cpu"))
    for _ in range(2):  # the second layer takes the mask of the first
        found = on_device.attend(q, k, v, window=window, scale=0.3, cap=cap, sinks=sinks).view(2, 97, -1)
        assert torch.allclose(found.double(), want, atol=1e-5)


def test_long_texts_have_sinks_too() -> None:
    """Several blocks of queries on the CPU, at scores whose exponentials overflow unless a peak is taken off."""
    q, k, v = (torch.randn(1, heads, 300, 16, generator=torch.Generator().manual_seed(1)) for heads in (4, 2, 2))
    first = torch.zeros(1, 300, dtype=torch.int64)
    want = exact(40 * q, k, v, first, 1.0, 0.0, SINKS)
    found = causal_attention(40 * q, k, v, scale=1.0, sinks=SINKS).flatten(2)
    assert torch.allclose(found.double(), want, atol=1e-3) and torch.isfinite(found).all()


def test_a_cap_and_sinks_are_refused() -> None:
    q = torch.randn(1, 4, 9, 8)
    with pytest.raises(ValueError, match="expected one of them"):
        Reach(1, 9, None, torch.float32, torch.device("cpu")).attend(q, q, q, window=0, scale=0.3, cap=2.0, sinks=SINKS)


def test_a_window_of_one_key_reads_its_own() -> None:
    assert window_starts(4, 1, None).tolist() == [[0, 1, 2, 3]]
    assert window_starts(4, 3, torch.tensor([[0, 0, 2, 2]])).tolist() == [[0, 0, 2, 2]]


def test_a_block_of_capped_scores_may_be_one_query(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(windowed, "_SCORE_BYTES", 1)
    q, k, v = (torch.randn(1, heads, 9, 8) for heads in (2, 1, 1))
    found = Reach(1, 9, None, torch.float32, torch.device("cpu")).attend(q, k, v, window=4, scale=0.3, cap=2.0)
    first = (torch.arange(9) - 3).clamp(min=0)[None]
    assert torch.allclose(found.view(1, 9, -1).double(), exact(q, k, v, first, 0.3, 2.0), atol=1e-5)


def test_bytes_are_counted_for_windows_and_caps_only() -> None:
    import dataclasses

    from q4kd.trainer.bench.synthetic_7b import qwen2_5_7b

    plain = qwen2_5_7b(2)
    assert attention_bytes(plain, 1, 4096, 2) == 0
    short, long = (dataclasses.replace(plain, windows=(window, 0)) for window in (512, 4096))
    assert attention_bytes(long, 1, 4096, 2) == 0
    assert attention_bytes(short, 1, 4096, 2) == 4096 * (4 * plain.q_size + 2 * 512) * 2
    assert attention_bytes(dataclasses.replace(plain, attention_cap=50.0), 1, 4096, 2) > 4 * 4096 * plain.q_size
    sunk = dataclasses.replace(plain, architecture="gpt-oss")
    assert attention_bytes(sunk, 1, 4096, 2) == 3 * 4 * 4096 * plain.num_heads
