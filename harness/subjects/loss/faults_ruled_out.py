"""Faults in how the loss meets tokens that a teacher rules out: minus infinity reaches the equation as it is."""

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from q4kd.harness.runs.faults import declare, patch, replace

if TYPE_CHECKING:
    from torch import Tensor

_LEAST = -65504.0


def _infinite(logits: "Tensor", temperature: float = 1.0) -> "Tensor":
    return logits.masked_fill_(logits <= _LEAST / temperature, -float("inf"))


@patch(
    "loss",
    "ruled-out-infinite",
    "mode fast takes a teacher's minus infinity as it is",
    "q4kd.trainer.loss.fused:_teacher_logits",
)
def _fast(original: Callable[..., Callable[["Tensor"], "Tensor"]], *arguments: Any, **options: Any) -> Any:
    logits = original(*arguments, **options)
    return lambda hidden: _infinite(logits(hidden))


@patch(
    "loss",
    "tiled-ruled-out-infinite",
    "mode low takes a teacher's minus infinity as it is",
    "q4kd.trainer.loss.tiled:_Walks.logits",
)
def _low(original: Callable[..., tuple["Tensor", "Tensor"]], walks: Any, *arguments: Any) -> tuple["Tensor", "Tensor"]:
    student, teacher = original(walks, *arguments)
    return student, _infinite(teacher, walks.config.temperature)


_LEAST_CACHED = "q4kd.trainer.loss.topk:_LEAST_LOG_PROB"
declare(
    "loss",
    "cached-ruled-out-infinite",
    "a cached log-probability of minus infinity is taken as it is",
    functools.partial(replace, _LEAST_CACHED, lambda _original: -float("inf")),
    _LEAST_CACHED,
)
