"""Faults in gpt-oss: a sink, a bias or a clamp that is left out or mistaken, and YaRN's ramp rounded to whole pairs."""

import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from q4kd.harness.runs.faults import Call, declare, patch, replace

if TYPE_CHECKING:
    from torch import Tensor

_ATTENTION = "q4kd.trainer.kernels.attention:causal_attention"
_SWIGLU = "q4kd.trainer.teacher.cpu.activation:clamped_swiglu"
_WEIGHTS = "q4kd.trainer.teacher.cpu.layers:ModelWeights"
_RAMP = "q4kd.trainer.teacher.rope:yarn_kept"
Sinks = Callable[["Tensor"], "Tensor | None"]


def _with_sinks(change: Sinks) -> None:
    def make(original: Call) -> Call:
        def attend(*arguments: object, **options: Any) -> object:
            sinks = options.pop("sinks", None)
            return original(*arguments, **options, sinks=None if sinks is None else change(sinks))

        return attend

    replace(_ATTENTION, make)


_SINKS: dict[str, tuple[str, Sinks]] = {
    "sinks-left-out": ("the softmax is over the keys alone", lambda _sinks: None),
    "sinks-of-next-head": ("each query head has the sink of the one before", lambda sinks: sinks.roll(1)),
    "sinks-scaled": ("sinks are divided by sqrt(D) as scores are", lambda sinks: sinks / 32**0.5),
}
for _name, (_title, _change) in _SINKS.items():
    declare("dispatch", _name, _title, functools.partial(_with_sinks, _change), _ATTENTION)


@patch("dispatch", "swiglu-unclamped", "gate and up are not clamped", _SWIGLU)
def _unclamped(_original: Call, gate: "Tensor", up: "Tensor") -> "Tensor":
    return gate * (1.702 * gate).sigmoid() * (up + 1)


@patch("dispatch", "swiglu-without-one", "the gate is multiplied by up, not by up + 1", _SWIGLU)
def _without_one(_original: Call, gate: "Tensor", up: "Tensor") -> "Tensor":
    gate = gate.clamp(max=7.0)
    return gate * (1.702 * gate).sigmoid() * up.clamp(-7.0, 7.0)


@patch("dispatch", "swiglu-is-silu", "the gate's slope is 1, as SiLU's", _SWIGLU)
def _is_silu(_original: Call, gate: "Tensor", up: "Tensor") -> "Tensor":
    gate = gate.clamp(max=7.0)
    return gate * gate.sigmoid() * (up.clamp(-7.0, 7.0) + 1)


@patch("dispatch", "output-bias-dropped", "the output of attention has no bias", f"{_WEIGHTS}._load_layer")
def _output_bias(original: Call, weights: object, index: object) -> object:
    layer: Any = original(weights, index)
    return dataclasses.replace(layer, output_bias=None)


def _with_biases(change: Callable[[Any], Any]) -> None:
    def make(original: Call) -> Call:
        def load(weights: object, prefix: object) -> object:
            experts: Any = original(weights, prefix)
            return dataclasses.replace(experts, biases=experts.biases and change(experts.biases))

        return load

    replace(f"{_WEIGHTS}._load_experts", make)


_BIASES: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "router-bias-dropped": ("experts are chosen without the router's bias", lambda b: b._replace(router=0 * b.router)),
    "gate-bias-dropped": ("gates of experts have no bias", lambda b: b._replace(gate=0 * b.gate)),
    "up-bias-dropped": ("the products beside the gates have no bias", lambda b: b._replace(up=0 * b.up)),
    "down-bias-dropped": ("outputs of experts have no bias", lambda b: b._replace(down=0 * b.down)),
    "expert-biases-of-next": (
        "each expert has the biases of the one before",
        lambda b: b._replace(gate=b.gate.roll(1, 0), up=b.up.roll(1, 0), down=b.down.roll(1, 0)),
    ),
}
for _name, (_title, _change_biases) in _BIASES.items():
    declare("dispatch", _name, _title, functools.partial(_with_biases, _change_biases), f"{_WEIGHTS}._load_experts")


@patch("dispatch", "yarn-ramp-rounded", "the ends of YaRN's ramp are rounded to whole pairs", _RAMP)
def _ramp_rounded(original: Call, rotary_dim: object, base: object, scaling: Any) -> object:
    return original(rotary_dim, base, dataclasses.replace(scaling, is_rounded=True))
