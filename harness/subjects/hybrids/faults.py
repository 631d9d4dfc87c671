"""Faults in hybrid decoders: states that do not end with their document, other heads, gates left out, other decays."""

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from q4kd.harness.runs.faults import patch

if TYPE_CHECKING:
    from torch import Tensor

_RULE = "q4kd.trainer.teacher.delta_rule"
_RECURRENT = "q4kd.trainer.teacher.cpu.recurrent"
_SHARED = "q4kd.trainer.teacher.cpu.shared_expert"
Rule = Callable[..., "Tensor"]


@patch("dispatch", "state-not-reset", "a document begins with the state of the one before it", f"{_RULE}:delta_rule")
def _state_kept(original: Rule, *tensors: "Tensor", **options: int) -> "Tensor":
    return original(*tensors[:5], **options)


@patch(
    "dispatch",
    "convolution-not-reset",
    "the convolution reads the last positions of the document before",
    f"{_RULE}:short_convolution",
)
def _convolution_kept(original: Rule, x: "Tensor", taps: "Tensor", _starts: "Tensor | None" = None) -> "Tensor":
    return original(x, taps)


@patch("dispatch", "state-per-chunk", "every chunk begins with a state of zeros", f"{_RULE}:delta_rule")
def _per_chunk(original: Rule, *tensors: "Tensor", **options: int) -> "Tensor":
    import torch

    batch, length = tensors[0].shape[:2]
    edges = torch.arange(length).div(64, rounding_mode="floor").mul(64).expand(batch, -1)
    starts = tensors[5] if len(tensors) > 5 and tensors[5] is not None else torch.zeros_like(edges)
    return original(*tensors[:5], torch.maximum(edges, starts), **options)


@patch(
    "dispatch",
    "value-heads-grouped",
    "value heads read key heads in groups, as in a Hugging Face folder, where a file has them tiled",
    f"{_RULE}:delta_rule",
)
def _grouped(original: Rule, q: "Tensor", k: "Tensor", v: "Tensor", *others: "Tensor", **options: int) -> "Tensor":
    groups = v.shape[2] // k.shape[2]
    return original(q.repeat_interleave(groups, 2), k.repeat_interleave(groups, 2), v, *others, **options)


@patch("dispatch", "decay-sign", "states grow where they should decay", f"{_RULE}:delta_rule")
def _decay_sign(
    original: Rule, q: "Tensor", k: "Tensor", v: "Tensor", decay: "Tensor", *others: "Tensor", **options: int
) -> "Tensor":
    return original(q, k, v, -decay, *others, **options)


@patch("dispatch", "decay-of-the-next", "a state decays by the next token's decay", f"{_RULE}:delta_rule")
def _decay_late(
    original: Rule, q: "Tensor", k: "Tensor", v: "Tensor", decay: "Tensor", *others: "Tensor", **options: int
) -> "Tensor":
    return original(q, k, v, decay.roll(-1, 1), *others, **options)


@patch(
    "dispatch",
    "decay-sums-in-float32",
    "decays are summed in float32, so that a large one blurs those behind it",
    f"{_RULE}:decay_sums",
)
def _rounded_sums(_original: Rule, decay: "Tensor") -> "Tensor":
    return decay.cumsum(-1).double()


@patch(
    "dispatch",
    "corrections-independent",
    "a chunk's corrections do not see each other, as if its system were the identity",
    f"{_RULE}:_Run.__init__",
)
def _independent(original: Callable[..., None], run: Any, q: "Tensor", k: "Tensor", v: "Tensor", *others: Any) -> None:
    import torch

    solve = torch.linalg.solve_triangular
    torch.linalg.solve_triangular = lambda _system, sides, **_options: sides
    try:
        original(run, q, k, v, *others)
    finally:
        torch.linalg.solve_triangular = solve


@patch("dispatch", "heads-not-unit", "queries and keys keep their length", f"{_RULE}:unit_heads")
def _not_unit(_original: Rule, x: "Tensor") -> "Tensor":
    scaled: Tensor = x / x.shape[-1] ** 0.5
    return scaled


@patch("dispatch", "delta-gate-left-out", "what a delta net's heads read is not gated", f"{_RECURRENT}:mix")
def _delta_gate(original: Rule, net: Any, *arguments: Any) -> "Tensor":
    return original(dataclasses.replace(net, gate=_Open(net.gate)), *arguments)


class _Open:
    """A matrix whose products are all such that SiLU makes them 1."""

    def __init__(self, matrix: Any) -> None:
        self._matrix = matrix

    def product(self, x: "Tensor") -> "Tensor":
        out: Tensor = self._matrix.product(x).fill_(1.2784645)
        return out


@patch(
    "dispatch",
    "attention-gate-left-out",
    "what attention mixes is not gated",
    "q4kd.trainer.teacher.cpu.forward:gate_heads",
)
def _attention_gate(_original: Rule, mixed: "Tensor", _gate: "Tensor") -> "Tensor":
    return mixed


@patch(
    "dispatch",
    "shared-expert-ungated",
    "the expert of all tokens is added whole",
    f"{_SHARED}:SharedExpert.add_to",
)
def _ungated(original: Callable[..., None], expert: Any, *arguments: Any) -> None:
    # Where the gate's product is 0, half of the expert is added.
    normed = arguments[1]
    gate = normed.new_zeros(normed.shape[-1])
    part = normed.new_zeros(arguments[0].shape)
    original(dataclasses.replace(expert, token_gate_H=gate), part, *arguments[1:])
    arguments[0].add_(part, alpha=2)


@patch(
    "dispatch",
    "shared-expert-left-out",
    "the expert of all tokens is not added",
    f"{_SHARED}:SharedExpert.add_to",
)
def _left_out(_original: Callable[..., None], _expert: Any, *_arguments: Any) -> None:
    return None
