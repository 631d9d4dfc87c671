"""Rotary scalings that a model file may ask for, so that it reads longer texts than it was trained on.

linear  positions are divided by a factor (https://arxiv.org/abs/2306.15595)
yarn    only slow rotations are, and cos and sin are multiplied by a factor (https://arxiv.org/abs/2309.00071)
long    each frequency has its own divisor, one set for short texts and one for long (https://arxiv.org/abs/2402.13753)
"""

import math
from collections.abc import Container
from dataclasses import dataclass

from q4kd.trainer.formats.families import Family, ScalingKind
from q4kd.trainer.formats.values import Values

LONG_FACTORS, SHORT_FACTORS = "rope_factors_long.weight", "rope_factors_short.weight"
_REMEDY = "use another teacher: leaving this out would make it silently wrong"
_KINDS: dict[str, ScalingKind | None] = {
    "none": None, "default": None, "": "linear", "linear": "linear", "yarn": "yarn", "longrope": "long", "su": "long",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """A rotary scaling.

    Attributes:
        factor: positions are divided by it: all of them (linear), or those of slow rotations (yarn).
        attention_factor: cos and sin are multiplied by it.
        original_context: positions of the model before it was extended: the length from which ``long`` takes its other
            divisors, and in which ``yarn`` counts rotations.
        beta_fast, beta_slow: rotations within that context above which a frequency is kept, and below which it is
            divided by ``factor``.
        is_rounded: whether the ends of the ramp between the two are rounded outwards to whole pairs.
    """

    kind: ScalingKind
    factor: float = 1.0
    attention_factor: float = 1.0
    original_context: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    is_rounded: bool = True


def read_rope_scaling(values: Values, family: Family, context: int, tensors: Container[str]) -> RopeScaling | None:
    """Return the scaling that a file asks for, or None for a plain rotary embedding.

    Raises:
        InputError: for a kind that the family has not, or a number that is missing or out of bounds.
    """
    kind = _read_kind(values, family, tensors)
    attention_factor = values.number("rope.scaling.attn_factor", 0.01, 100, 1.0)
    original = values.integer("rope.scaling.original_context_length", 1 << 24, context)
    if kind == "yarn":
        factor = values.number("rope.scaling.factor", 1, 1e6)
        values.number("rope.freq_base", 1.001, 1e12, 10_000.0)  # YaRN divides by its logarithm
        return RopeScaling(
            kind="yarn",
            factor=factor,
            attention_factor=attention_factor * _yarn_attention_factor(values, factor),
            original_context=original,
            beta_fast=values.number("rope.scaling.yarn_beta_fast", 1e-3, 1e6, 32.0),
            beta_slow=values.number("rope.scaling.yarn_beta_slow", 1e-3, 1e6, 1.0),
            is_rounded=family.rounds_yarn,
        )
    if kind == "long":
        _check_neutral(values, "rope.scaling.factor", (0.0, 1.0))
        return RopeScaling(kind="long", attention_factor=attention_factor, original_context=original)
    _check_neutral(values, "rope.scaling.attn_factor", (1.0,))
    old = values.number("rope.scale_linear", 0, 1e6, 0.0)
    factor = values.number("rope.scaling.factor", 0, 1e6, old)  # 0 means not set
    if kind is None or factor in (0, 1):
        return None
    _check_kind(values, family, "linear")
    return RopeScaling(kind="linear", factor=factor)


def _read_kind(values: Values, family: Family, tensors: Container[str]) -> ScalingKind | None:
    """Return the kind; a file with divisors for long texts need not name it (Phi-3's converter does not)."""
    key, stated = "rope.scaling.type", values.get("rope.scaling.type")
    held = [name for name in (LONG_FACTORS, SHORT_FACTORS) if name in tensors]
    if stated is not None and (not isinstance(stated, str) or stated not in _KINDS):
        raise values.refusal(key, "none, linear, yarn or longrope", repr(stated)[:80], _REMEDY)
    kind = _KINDS["linear" if stated is None else stated]
    if held and stated is None:
        kind = "long"
    if kind == "long" and len(held) < 2:
        raise values.refusal(key, f"tensors {LONG_FACTORS} and {SHORT_FACTORS}", f"{len(held)} of them", _REMEDY)
    if kind in ("yarn", "long"):
        _check_kind(values, family, kind)
    return kind


def _check_kind(values: Values, family: Family, kind: ScalingKind) -> None:
    if kind not in family.scalings:
        raise values.refusal("rope.scaling.type", " or ".join(("none", *family.scalings)), kind, _REMEDY)


def _yarn_attention_factor(values: Values, factor: float) -> float:
    """Return YaRN's factor of cos and sin, ``0.1 ln(factor) + 1``, or its ratio to that of another multiplier."""
    _check_neutral(values, "rope.scaling.yarn_ext_factor", (1.0, -1.0))  # -1 means not set
    _check_neutral(values, "rope.scaling.yarn_attn_factor", (1.0, -1.0))
    multiplier = values.number("rope.scaling.yarn_log_multiplier", 0, 100, 0.0)
    return (0.1 * math.log(factor) + 1) / (0.1 * multiplier * math.log(factor) + 1)


def _check_neutral(values: Values, key: str, neutral: tuple[float, ...]) -> None:
    value = values.get(key, neutral[0])
    if isinstance(value, bool) or value not in neutral:
        raise values.refusal(key, " or ".join(f"{number:g}" for number in neutral), repr(value)[:80], _REMEDY)
