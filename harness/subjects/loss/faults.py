"""Faults in the forms of the fused loss: tiles and chunks as large as they can be, factors and probabilities lost."""

import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

from q4kd.harness.runs.faults import Call, declare, patch, replace

if TYPE_CHECKING:
    from torch import Tensor

    from q4kd.trainer.loss.config import KDLossConfig
    from q4kd.trainer.loss.sums import LossSums
    from q4kd.trainer.loss.teacher_head import TeacherHead

_CHUNK = "q4kd.trainer.loss.config:KDLossConfig.chunk_for"
_WALKS = "q4kd.trainer.loss.tiled:_Walks.__init__"
_GRADIENT = "q4kd.trainer.loss.tiled:_Walks._gradient"
_LOW = "q4kd.trainer.loss.tiled:run_low"
_TOPK = "q4kd.trainer.loss.topk:_chunk_terms"
_TEACHER = "q4kd.trainer.loss.fused:_teacher_logits"
_KNOBS = "q4kd.trainer.loss.cuda.kernels:knobs_of"
_Logits = Callable[["Tensor"], "Tensor"]


@patch("memory", "all-tokens-at-once", "a chunk of logits is all tokens", _CHUNK)
def _all_tokens_at_once(_original: Call, _self: object, _vocab: int) -> int:
    return 1 << 30


@patch("memory", "tile-is-vocabulary", "mode low takes the vocabulary as one tile", _WALKS)
def _tile_is_vocabulary(original: Call, self: object, tensors: object, config: "KDLossConfig") -> None:
    original(self, tensors, dataclasses.replace(config, vocab_tile=1 << 30))


@patch("loss", "tiled-half-gradient", "mode low halves its gradient, not its value", _GRADIENT)
def _tiled_half_gradient(original: Callable[..., "Tensor"], *arguments: object) -> "Tensor":
    return original(*arguments) * 0.5


@patch("loss", "tiled-no-t-squared", "mode low leaves out the factor T²", _LOW)
def _tiled_no_t_squared(original: Call, sums: "LossSums", tensors: object, config: "KDLossConfig") -> None:
    original(sums, tensors, config)
    sums.kd /= config.temperature**2


@patch("loss", "tail-dropped", "what a cached teacher gives unlisted tokens is taken as nothing", _TOPK)
def _tail_dropped(original: Call, student: object, ids: object, log_p: "Tensor", *rest: object) -> object:
    log_p = log_p.clone()
    log_p[:, -1] = -float("inf")  # what is left is scaled up to one
    return original(student, ids, log_p, *rest)


@patch("loss", "padding-kept", "the teacher's padding rows keep their probability", _TEACHER)
def _padding_kept(original: Callable[..., _Logits], head: "TeacherHead", vocab: int, *, is_held: bool) -> _Logits:
    whole = original(head, head.rows, is_held=is_held)

    def logits(hidden: "Tensor") -> "Tensor":
        found = whole(hidden)
        kept = found[:, :vocab].clone()
        kept[:, -1] = found[:, vocab - 1 :].logsumexp(1)  # the padding's mass lies on the last token that both have
        return kept

    return logits


def _device_knob(place: int, factor: float) -> None:
    def make(original: Callable[..., "Tensor"]) -> Callable[..., "Tensor"]:
        def knobs(*given: object) -> "Tensor":
            found = original(*given)
            found[place] *= factor
            return found

        return knobs

    replace(_KNOBS, make)


# Places in the knobs: alpha, 1 / T, (1 - alpha) T, T^2, beta.
for _name, _title, _place in (
    ("device-half-gradient", "the divergence's gradient is halved on the device", 2),
    ("device-half-value", "the divergence is halved on the device", 3),
):
    declare("loss", _name, _title, functools.partial(_device_knob, _place, 0.5), _KNOBS)
declare(
    "loss",
    "device-no-gradient",
    "the divergence has no gradient on the device",
    functools.partial(_device_knob, 2, 0.0),
    _KNOBS,
    arms=("kd-seed1", "kd-seed2", "kd-seed3"),
)
