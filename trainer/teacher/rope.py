"""Rotary embedding tables of a model: every base, scaling and layer without rotation, and one table a position.

Tables hold what a pair of a head is turned by; a pair that is not rotated has cos 1 and sin 0. Positions go on counting
across the documents of a window, since rotary embedding sees differences of positions only; ``long`` scaling and the
scale of far queries count within a document.

Letters in shapes: B sequences, T positions, R rotated elements of a head.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from q4kd.trainer.formats.architecture import TeacherConfig
from q4kd.trainer.formats.rope_scaling import RopeScaling


@dataclass(frozen=True)
class RopeFactors:
    """What a file divides the rotary frequencies by, float32 ``[R / 2]`` each; None for nothing."""

    all: Tensor | None = None
    short: Tensor | None = None
    long: Tensor | None = None


def rope_frequencies(rotary_dim: int, base: float, scaling: RopeScaling | None, factors: Tensor | None) -> Tensor:
    """Return the radians by which each pair turns a position, float64 ``[R / 2]``.

    Args:
        rotary_dim: R.
        base: of the geometric series of frequencies.
        scaling: None for none; ``long`` changes nothing here, its divisors come as ``factors``.
        factors: what the frequencies are divided by, ``[R / 2]``.
    """
    pairs = torch.arange(0, rotary_dim, 2, dtype=torch.float64)
    frequency = base ** -(pairs / rotary_dim)
    if factors is not None:
        frequency = frequency / factors.double().cpu()
    if scaling is None or scaling.kind == "long":
        return frequency
    if scaling.kind == "linear":
        return frequency / scaling.factor
    kept = yarn_kept(rotary_dim, base, scaling)
    return frequency * kept + frequency / scaling.factor * (1 - kept)


def yarn_kept(rotary_dim: int, base: float, scaling: RopeScaling) -> Tensor:
    """Return how much of each frequency YaRN keeps, from 1 (fast) to 0 (slow), float64 ``[R / 2]``.

    Section 3.2 of https://arxiv.org/abs/2309.00071, with the ends of the ramp rounded outwards as its authors' code
    does (gpt-oss's does not): pairs that turn ``beta_fast`` times within the original context, and those that turn
    ``beta_slow`` times.
    """

    def pair_that_turns(times: float) -> float:
        return rotary_dim * math.log(scaling.original_context / (times * 2 * math.pi)) / (2 * math.log(base))

    low, high = pair_that_turns(scaling.beta_fast), pair_that_turns(scaling.beta_slow)
    if scaling.is_rounded:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotary_dim - 1)
    pairs = torch.arange(rotary_dim // 2, dtype=torch.float64)
    return 1 - ((pairs - low) / max(0.001, high - low)).clamp(0, 1)


def rope_tables(positions: int, frequency: Tensor, attention_factor: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return cos and sin, float32 ``[positions, R / 2]``, computed in float64 and multiplied by the factor."""
    angle = torch.outer(torch.arange(positions, dtype=torch.float64), frequency)
    return (angle.cos() * attention_factor).float(), (angle.sin() * attention_factor).float()


def document_lengths(starts_BT: Tensor) -> Tensor:
    """Return how many positions each position's document has, int64 ``[B, T]``, from where it begins."""
    counts_BT = torch.zeros_like(starts_BT).scatter_add_(1, starts_BT, torch.ones_like(starts_BT))
    return counts_BT.gather(1, starts_BT)


class Rope:
    """The rotary embedding of a model, computed on the CPU.

    Args:
        config: the model's dimensions.
        factors: what its file divides frequencies by.
    """

    def __init__(self, config: TeacherConfig, factors: RopeFactors) -> None:
        self._config, self._scaling = config, config.rope_scaling
        self._rotary_dim = config.rotary_dim or config.head_dim
        self._factors = factors

    def tables(self, length: int, starts_BT: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return cos and sin of the layers without a window, or of all where windows have no base of their own.

        Args:
            length: T.
            starts_BT: int64 first position of each position's document, on the CPU; None where a row is one document.

        Returns:
            float32 ``[T, R / 2]`` each; ``[B, T, R / 2]`` where documents differ in their divisors.
        """
        original = 0 if self._scaling is None else self._scaling.original_context
        short = self._factors.all if self._factors.short is None else self._factors.short
        if self._factors.long is None or length <= original:
            return self._tables(length, short)
        if starts_BT is None:
            return self._tables(length, self._factors.long)
        is_long_BT1 = (document_lengths(starts_BT) > original).unsqueeze(-1)
        pair = zip(self._tables(length, self._factors.long), self._tables(length, short), strict=True)
        cos_BTR, sin_BTR = (torch.where(is_long_BT1, long, plain) for long, plain in pair)
        return cos_BTR, sin_BTR

    @property
    def depends_on_length(self) -> bool:
        """Whether the tables of a longer pass are others, not only longer ones."""
        return self._factors.long is not None

    def window_tables(self, length: int) -> tuple[Tensor, Tensor]:
        """Return those of the layers with a window that have a base of their own, which is never scaled."""
        rotary_dim = self._config.window_head_dim or self._rotary_dim
        return rope_tables(length, rope_frequencies(rotary_dim, self._config.window_rope_base, None, None))

    def _tables(self, length: int, factors: Tensor | None) -> tuple[Tensor, Tensor]:
        frequency = rope_frequencies(self._rotary_dim, self._config.rope_base, self._scaling, factors)
        return rope_tables(length, frequency, 1.0 if self._scaling is None else self._scaling.attention_factor)

    def query_scales(self, length: int, starts_BT: Tensor | None, device: torch.device | None = None) -> Tensor | None:
        """Return what queries are multiplied by for their position in a document, float32 ``[B, T]`` or ``[1, T]``.

        None where nothing changes: as far as the original context. Ministral 3's rule, from Llama 4
        (``1 + s ln(1 + floor(p / original_context))``, transformers' ``get_llama_4_attn_scale``).
        """
        scale = self._config.temperature_scale
        original = self._config.context_length if self._scaling is None else self._scaling.original_context
        if not scale or length <= original:
            return None
        position_1T = torch.arange(length, device=device)[None]
        within_BT = position_1T if starts_BT is None else position_1T - starts_BT
        return 1 + scale * torch.log1p((within_BT // original).float())
