"""Faults in the forms of the fused loss: tiles and chunks as large as they can be, factors and probabilities lost."""

import dataclasses
from collections.abc import Callable
from typing import Any

from q4kd.harness.sabotage.registry import declare, replace

_CHUNK = "q4kd.trainer.loss_config:KDLossConfig.chunk_for"
_WALKS = "q4kd.trainer.loss_low:_Walks.__init__"
_GRADIENT = "q4kd.trainer.loss_low:_Walks._gradient"
_LOW = "q4kd.trainer.loss_low:run_low"
_TOPK = "q4kd.trainer.loss_topk:_chunk_terms"
_TEACHER = "q4kd.trainer.kd_loss:_teacher_logits"
_KNOBS = "q4kd.trainer.cuda.loss_kernels:knobs_of"
_Call = Callable[..., Any]


def _all_tokens_at_once() -> None:
    replace(_CHUNK, lambda _original: lambda _self, _vocab: 1 << 30)


def _tile_is_vocabulary() -> None:
    def make(original: _Call) -> _Call:
        def build(self: Any, tensors: Any, config: Any) -> None:
            original(self, tensors, dataclasses.replace(config, vocab_tile=1 << 30))

        return build

    replace(_WALKS, make)


def _tiled_half_gradient() -> None:
    replace(_GRADIENT, lambda original: lambda self, tile, chunk: original(self, tile, chunk) * 0.5)


def _tiled_no_t_squared() -> None:
    def make(original: _Call) -> _Call:
        def run(sums: Any, tensors: Any, config: Any) -> None:
            original(sums, tensors, config)
            sums.kd /= config.temperature**2

        return run

    replace(_LOW, make)


def _tail_dropped() -> None:
    def make(original: _Call) -> _Call:
        def terms(student: Any, ids: Any, log_p: Any, labels: Any, config: Any) -> Any:
            log_p = log_p.clone()
            log_p[:, -1] = -float("inf")  # what is left is scaled up to one
            return original(student, ids, log_p, labels, config)

        return terms

    replace(_TOPK, make)


def _padding_kept() -> None:
    """Leave the mass of the teacher's padding rows in its distribution, on the last token that both have."""

    def make(original: _Call) -> _Call:
        def teacher(head: Any, vocab: int) -> _Call:
            whole = original(head, head.rows)

            def logits(hidden: Any) -> Any:
                found = whole(hidden)
                kept = found[:, :vocab].clone()
                kept[:, -1] = found[:, vocab - 1 :].logsumexp(1)
                return kept

            return logits

        return teacher

    replace(_TEACHER, make)


def _device_knob(place: int, factor: float) -> Callable[[], None]:
    def apply() -> None:
        def make(original: _Call) -> _Call:
            def knobs(*given: Any) -> Any:
                found = original(*given)
                found[place] *= factor
                return found

            return knobs

        replace(_KNOBS, make)

    return apply


declare("memory", "all-tokens-at-once", "a chunk of logits is all tokens", _all_tokens_at_once, _CHUNK)
declare("memory", "tile-is-vocabulary", "mode low takes the vocabulary as one tile", _tile_is_vocabulary, _WALKS)
declare("loss", "tiled-half-gradient", "mode low halves its gradient, not its value", _tiled_half_gradient, _GRADIENT)
declare("loss", "tiled-no-t-squared", "mode low leaves out the factor T²", _tiled_no_t_squared, _LOW)
declare("loss", "tail-dropped", "what a cached teacher gives unlisted tokens is taken as nothing", _tail_dropped, _TOPK)
declare("loss", "padding-kept", "the teacher's padding rows keep their probability", _padding_kept, _TEACHER)
# Places in the knobs: alpha, 1 / T, (1 - alpha) T, T^2, beta.
declare(
    "loss", "device-half-gradient", "the divergence's gradient is halved on the device", _device_knob(2, 0.5), _KNOBS
)
declare("loss", "device-half-value", "the divergence is halved on the device", _device_knob(3, 0.5), _KNOBS)
