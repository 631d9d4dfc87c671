"""Faults in what sets a family apart: a window, a turn, a norm, a cap or a multiplier that is left out or mistaken."""

import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from q4kd.harness.runs.faults import Call, declare, patch, replace

if TYPE_CHECKING:
    from torch import Tensor

_CONFIG = "q4kd.trainer.formats.architecture:read_dimensions"
_ROPE = "q4kd.trainer.teacher.rope"
_FORWARD = "q4kd.trainer.teacher.cpu.forward"
_ACTIVATION = "q4kd.trainer.teacher.cpu.activation"


def _changed(changes: Callable[[Any], dict[str, Any]]) -> None:
    """Let a file's config be read with other values."""

    def make(original: Call) -> Call:
        def read(*arguments: object) -> object:
            config: Any = original(*arguments)
            return dataclasses.replace(config, **changes(config))

        return read

    replace(_CONFIG, make)


def _longer(config: Any) -> dict[str, Any]:
    return {"windows": tuple(window + bool(window) for window in config.windows)}


def _shifted(config: Any) -> dict[str, Any]:
    return {"windows": config.windows[1:] + config.windows[:1]}


def _unless_long(config: Any, **changes: Any) -> dict[str, Any]:
    """Return the changes, but for a file with divisors for long texts, which would be refused for their tensors."""
    return {} if config.rope_scaling is not None and config.rope_scaling.kind == "long" else changes


for _name, _title, _changes in (
    ("window-one-longer", "windows hold one key more than the file says", _longer),
    ("window-layers-shifted", "each layer has the window of the next one", _shifted),
    (
        "window-rope-base-global",
        "layers with a window turn by the base of the others",
        lambda config: {"window_rope_base": config.rope_base if config.window_rope_base else 0.0},
    ),
    ("attention-cap-forgotten", "attention scores are not capped", lambda _config: {"attention_cap": 0.0}),
    ("logit-cap-forgotten", "logits are not capped", lambda _config: {"logit_cap": 0.0}),
    ("rope-scaling-ignored", "positions are not scaled", lambda config: _unless_long(config, rope_scaling=None)),
    ("rope-layers-all", "layers without rotary embedding get one", lambda _config: {"no_rope_step": 0}),
    (
        "partial-rotary-whole",
        "whole heads are rotated where a part is",
        lambda config: _unless_long(config, rotary_dim=0),
    ),
    ("query-scale-forgotten", "queries of far positions are not scaled", lambda _config: {"temperature_scale": 0.0}),
    ("attention-multiplier-forgotten", "scores are divided by sqrt(D)", lambda _config: {"attention_scale": 0.0}),
    ("embedding-multiplier-forgotten", "embeddings are not multiplied", lambda _config: {"embedding_scale": 1.0}),
    ("residual-multiplier-forgotten", "residuals are added whole", lambda _config: {"residual_scale": 1.0}),
    ("logit-multiplier-forgotten", "logits are not divided", lambda _config: {"logit_scale": 1.0}),
):
    declare("dispatch", _name, _title, functools.partial(_changed, _changes), _CONFIG)


@patch(
    "dispatch",
    "scaling-gain-forgotten",
    "cos and sin are not multiplied by the factor of a scaling",
    f"{_ROPE}:rope_tables",
)
def _gain_forgotten(original: Call, length: object, frequency: object, *_gain: object) -> object:
    return original(length, frequency)


@patch(
    "dispatch",
    "long-divisors-for-all",
    "short documents are turned by the divisors for long ones where they are packed with one",
    f"{_ROPE}:document_lengths",
)
def _long_for_all(original: Call, starts: "Tensor") -> object:
    lengths: Tensor = original(starts)  # type: ignore[assignment]
    return lengths.amax(1, keepdim=True).expand_as(lengths)


@patch("dispatch", "gate-is-silu", "the gate goes through SiLU in every family", f"{_ACTIVATION}:activate")
def _gate_is_silu(original: Call, gate: object, _activation: object) -> object:
    return original(gate, "silu")


def _post_norms_skipped() -> None:
    def make(original: Call) -> Call:
        return lambda self, x, delta, _norm: original(self, x, delta, None)

    replace(f"{_FORWARD}:CpuForward._add", make)


declare(
    "dispatch",
    "post-norms-skipped",
    "the norms behind attention and feed-forward are left out",
    _post_norms_skipped,
    f"{_FORWARD}:CpuForward._add",
)
