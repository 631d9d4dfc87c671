"""The gated delta rule (https://arxiv.org/abs/2412.06464) by chunks of positions, and the convolution before it.

A head's state ``S`` is a matrix from keys to values. Each token lets it decay, and then corrects what its key reads::

    S_t = exp(g_t) S_(t-1) + k_t (beta_t (v_t - exp(g_t) S_(t-1)' k_t))'        o_t = S_t' q_t / sqrt(D)

Step by step that is a product of a vector and a matrix for each token. Within a chunk of C positions the corrections
``u`` depend on each other and on the state S before the chunk, by a triangular system (section 3.3 there, and
https://arxiv.org/abs/2406.06484 for the rule without decay). With ``G_i`` the sum of g from the chunk's beginning on::

    A_ij = beta_i exp(G_i - G_j) k_i' k_j, j < i        (I + A) u = beta v - (beta exp(G) k) S
    o_i  = exp(G_i) S' q_i + sum_(j <= i) exp(G_i - G_j) (k_j' q_i) u_j
    S   <- exp(G_C) S + sum_j exp(G_C - G_j) k_j u_j'

What a document's first position begins is new: every factor ``exp(G_i - G_j)`` across such a beginning is 0, as is
``exp(G_i)`` behind one, wherever in a chunk it lies. Differences of G are taken in float64, since G of a long chunk may
be thousands where the difference that counts is a hundredth.

Everything is torch's own operations, on any device, in float32. Value head v reads key head ``v % K``.

Letters in shapes: B sequences, T positions, K key heads, V value heads, R = V / K, D head size, n chunks, C positions
of a chunk, X channels, W taps.
"""

import torch
from torch import Tensor

CHUNK = 64
# Added to a sum of squares, as transformers' and fla's ``l2norm`` do.
UNIT_EPS = 1e-6


def delta_rule(
    q_BTKD: Tensor,
    k_BTKD: Tensor,
    v_BTVD: Tensor,
    decay_BTV: Tensor,
    beta_BTV: Tensor,
    starts_BT: Tensor | None = None,
    *,
    chunks_at_once: int = 1,
) -> Tensor:
    """Return what queries read of the states, float32 ``[B, T, V, D]``.

    Args:
        q_BTKD, k_BTKD: float32, of unit length each head (``unit_heads``).
        v_BTVD: float32.
        decay_BTV: g, float32, at most 0.
        beta_BTV: float32, from 0 to 1.
        starts_BT: int64 first position of each position's document, not falling along T; None for zeros.
        chunks_at_once: for how many chunks the systems are solved before the states go through them.
    """
    batch, length, key_heads, size = k_BTKD.shape
    groups = v_BTVD.shape[2] // key_heads
    out_BTVD = torch.empty_like(v_BTVD)
    if starts_BT is None:
        starts_BT = torch.zeros(batch, length, dtype=torch.int64, device=k_BTKD.device)
    state_BRKDD = v_BTVD.new_zeros(batch, groups, key_heads, size, size)
    for first, stop, count in _runs(length, chunks_at_once):
        part = slice(first, stop)

        def chunked(x_BTHD: Tensor, part: slice = part, count: int = count) -> Tensor:
            """Return ``[B, n, H / K, K, C, D]`` of ``[B, T, H, D]``."""
            parts = x_BTHD[:, part]
            parts = parts.reshape(batch, count, -1, parts.shape[2] // key_heads, key_heads, parts.shape[3])
            return parts.permute(0, 1, 3, 4, 2, 5).contiguous()

        run = _Run(
            chunked(q_BTKD) * size**-0.5,
            chunked(k_BTKD),
            chunked(v_BTVD),
            chunked(decay_BTV.unsqueeze(-1)).squeeze(-1),
            chunked(beta_BTV.unsqueeze(-1)),
            starts_BT[:, part].view(batch, count, -1),
            first,
        )
        for chunk in range(count):
            read_BRKCD, state_BRKDD = run.step(chunk, state_BRKDD)
            places = slice(first + chunk * run.size, first + (chunk + 1) * run.size)
            out_BTVD[:, places] = read_BRKCD.permute(0, 3, 1, 2, 4).flatten(2, 3)
    return out_BTVD


def _runs(length: int, chunks_at_once: int) -> list[tuple[int, int, int]]:
    """Cut T positions into runs ``(first, stop, chunks)`` of equal chunks; a shorter one comes last, by itself."""
    whole = length // CHUNK
    runs = [
        (first * CHUNK, min(first + chunks_at_once, whole) * CHUNK, min(chunks_at_once, whole - first))
        for first in range(0, whole, chunks_at_once)
    ]
    return runs + ([(whole * CHUNK, length, 1)] if length % CHUNK else [])


class _Run:
    """What chunks beside each other need of each other's states is left to ``step``; all else is solved here at once.

    Args:
        q, k: ``[B, n, 1, K, C, D]``, queries divided by the root of D already.
        v: ``[B, n, R, K, C, D]``.
        decay, beta: ``[B, n, R, K, C]`` and ``[B, n, R, K, C, 1]``.
        starts_BnC: first position of each position's document.
        first: the run's first position.
    """

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor, starts_BnC: Tensor, first: int
    ) -> None:
        chunks, self.size = starts_BnC.shape[1:]
        places_nC = torch.arange(first, first + chunks * self.size, device=k.device).view(chunks, -1)
        is_kept = (places_nC[:, None] <= places_nC[..., None]) & (places_nC[:, None] >= starts_BnC[..., None])
        sums = decay_sums(decay)
        between = (sums.unsqueeze(-1) - sums.unsqueeze(-2)).float()
        between = between.masked_fill_(~is_kept[:, :, None, None], -torch.inf).exp_()
        # How much of the state before the chunk is left at each position: nothing behind a document's beginning.
        is_old = (starts_BnC < places_nC[:, :1])[:, :, None, None]
        left = sums.float().exp_().masked_fill_(~is_old, 0.0).unsqueeze(-1)
        k_turned = k.transpose(-1, -2)
        system = (k @ k_turned) * between * beta
        sides = torch.cat([v * beta, k * beta * left], dim=-1)
        solved = torch.linalg.solve_triangular(system, sides, upper=False, unitriangular=True)
        self._values, self._seen = solved.chunk(2, dim=-1)
        self._weights = (q @ k_turned) * between
        self._queries = q * left
        self._keys = (k * between[..., -1, :].unsqueeze(-1)).transpose(-1, -2)
        self._left = left[..., -1:, :]

    def step(self, chunk: int, state_BRKDD: Tensor) -> tuple[Tensor, Tensor]:
        """Return what one chunk's queries read, ``[B, R, K, C, D]``, and the state behind it."""
        corrections = self._values[:, chunk] - self._seen[:, chunk] @ state_BRKDD
        read = self._queries[:, chunk] @ state_BRKDD + self._weights[:, chunk] @ corrections
        return read, state_BRKDD * self._left[:, chunk] + self._keys[:, chunk] @ corrections


def decay_sums(decay: Tensor) -> Tensor:
    """Return G, the sums of g from a chunk's first position on, float64 ``[..., C]``."""
    return decay.double().cumsum(-1)


def unit_heads(x: Tensor) -> Tensor:
    """Return ``x`` divided by its length over the last dimension, float32."""
    return x * torch.rsqrt((x * x).sum(-1, keepdim=True) + UNIT_EPS)


def short_convolution(x_BTX: Tensor, taps_WX: Tensor, starts_BT: Tensor | None = None) -> Tensor:
    """Return the causal convolution of each channel by itself, new, float32 ``[B, T, X]``.

    Tap W - 1 is that of the position itself, tap 0 of the one furthest behind it. Positions before a sequence, or
    before the first of a position's document, count as 0.

    Args:
        x_BTX: float32.
        taps_WX: float32.
        starts_BT: int64 first position of each position's document; None for zeros.
    """
    length, taps = x_BTX.shape[1], len(taps_WX)
    out_BTX = x_BTX * taps_WX[-1]
    for back in range(1, min(taps, length)):
        weights = taps_WX[taps - 1 - back]
        if starts_BT is None:
            out_BTX[:, back:].addcmul_(x_BTX[:, :-back], weights)
            continue
        places_T = torch.arange(back, length, device=x_BTX.device)
        is_same_BT1 = (places_T - back >= starts_BT[:, back:]).unsqueeze(-1)
        out_BTX[:, back:].addcmul_(x_BTX[:, :-back] * is_same_BT1, weights)
    return out_BTX
