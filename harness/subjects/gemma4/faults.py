"""Faults in Gemma 4: a norm, scale or size of its own that is left out or taken from another part."""

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from q4kd.harness.runs.faults import Call, declare, patch, replace

if TYPE_CHECKING:
    from torch import Tensor

_FORWARD = "q4kd.trainer.teacher.cpu.forward"
_WEIGHTS = "q4kd.trainer.teacher.cpu.layers:ModelWeights"
_EXPERTS = "q4kd.trainer.teacher.cpu.dense_and_experts"


@patch("dispatch", "values-not-normalised", "the heads of values are not normalised", f"{_FORWARD}:rms_norm")
def _values_not_normalised(
    original: Callable[..., "Tensor"], x: "Tensor", weight: "Tensor | None", eps: float
) -> "Tensor":
    # Values are all that is normalised without weights there.
    return x if weight is None else original(x, weight, eps)


@patch(
    "dispatch",
    "values-are-normalised-keys",
    "values of layers without a matrix for them are the keys behind their norm, not before it",
    f"{_FORWARD}:CpuForward._qkv",
)
def _normalised_keys(original: Callable[..., list["Tensor"]], forward: Any, layer: Any, x: "Tensor") -> list["Tensor"]:
    parts = original(forward, layer, x)
    if len(layer.qkv) == 2:
        heads = parts[1].view(len(x), layer.kv_heads, layer.head_dim)
        weighted = heads * heads.square().mean(-1, keepdim=True).rsqrt() * layer.k_norm
        parts[2] = weighted.flatten(1)
    return parts


@patch(
    "dispatch",
    "window-heads-turn-as-others",
    "heads of layers with a window turn at rates of the head size that the other layers have",
    "q4kd.trainer.teacher.rope:Rope.window_tables",
)
def _turn_as_others(_original: Call, rope: Any, length: int) -> object:
    from q4kd.trainer.teacher.rope import rope_frequencies, rope_tables

    config = rope._config
    frequency = rope_frequencies(config.head_dim, config.window_rope_base, None, None)
    return rope_tables(length, frequency[: (config.window_head_dim or config.head_dim) // 2])


def _vector(part: str, other: Callable[[Any, str, Callable[[Any, str], "Tensor"]], "Tensor"]) -> None:
    """Load what ``other`` makes of a model's vectors whose names end with ``part``."""

    def make(original: Callable[..., "Tensor"]) -> Callable[..., "Tensor"]:
        return lambda self, name: other(self, name, original) if name.endswith(part) else original(self, name)

    replace(f"{_WEIGHTS}._vector", make)


for _name, _title, _part in (
    ("layer-scale-dropped", "the states behind a layer are not multiplied", "layer_output_scale.weight"),
    ("expert-scale-dropped", "the outputs of experts have no scale of their own", "ffn_down_exps.scale"),
    ("router-scale-dropped", "the router's norm has no weights", "ffn_gate_inp.scale"),
):
    declare(
        "dispatch",
        _name,
        _title,
        functools.partial(_vector, _part, lambda self, name, original: original(self, name).fill_(1)),
        f"{_WEIGHTS}._vector",
    )
declare(
    "dispatch",
    "experts-read-dense-states",
    "experts read the states that are normalised for the dense feed-forward",
    functools.partial(
        _vector,
        "pre_ffw_norm_2.weight",
        lambda self, name, original: original(self, name.replace("pre_ffw_norm_2", "ffn_norm")),
    ),
    f"{_WEIGHTS}._vector",
)


@patch(
    "dispatch",
    "router-reads-expert-states",
    "the router reads the states that are normalised for the experts, not its own",
    f"{_EXPERTS}:DenseAndExperts.add_experts",
)
def _router_reads_expert_states(original: Call, weights: Any, *arguments: object) -> object:
    import dataclasses

    return original(dataclasses.replace(weights, router_scale=weights.experts_norm), *arguments)


@patch(
    "dispatch",
    "dense-part-left-out",
    "the dense feed-forward beside the experts adds nothing",
    f"{_EXPERTS}:DenseAndExperts.add_experts",
)
def _dense_left_out(original: Call, weights: Any, dense: "Tensor", *arguments: object) -> object:
    return original(weights, dense.zero_(), *arguments)
