"""Faults in 8-bit moments: held in 32 bits, moved otherwise, forgotten by a resumed run."""

import functools
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from q4kd.harness.runs.faults import Call, patch

if TYPE_CHECKING:
    from torch import Tensor

    from q4kd.trainer.train.optimizer import MasterWeightOptimizer

_CLASS = "q4kd.trainer.train.optimizer:_bitsandbytes_class"
_LOAD = "q4kd.trainer.train.optimizer:MasterWeightOptimizer.load"


@patch("memory", "eight-bits-are-thirty-two", "moments asked for in 8 bits are held in 32", _CLASS)
def _eight_bits_are_thirty_two(_original: Call, _name: str, _device: str) -> Any:
    import bitsandbytes

    return bitsandbytes.optim.AdamW32bit


@patch("loop", "eight-bit-betas-ignored", "the 8-bit optimiser keeps half of each moment whatever is set", _CLASS)
def _betas_ignored(original: Callable[..., Any], name: str, device: str) -> Any:
    kind = original(name, device)

    @functools.wraps(kind)
    def make(groups: object, **options: object) -> object:
        return kind(groups, **{**options, "betas": (0.5, 0.5)})

    return make


@patch("checkpoint", "resume-forgets-8-bit-moments", "a resumed run starts with no 8-bit moments", _LOAD)
def _resume_forgets(original: Call, self: "MasterWeightOptimizer", tensors: Iterable[tuple[str, "Tensor"]]) -> None:
    original(self, [pair for pair in tensors if pair[0].endswith("|master")])
