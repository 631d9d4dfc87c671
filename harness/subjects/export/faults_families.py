"""Faults in exported students of families with something of their own: what makes them another model is left out.

Each is planted where a config is read or a tensor is laid out, so that a file, read back, agrees with what is expected.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

from q4kd.harness.runs.faults import Call, patch

if TYPE_CHECKING:
    from torch import Tensor

    from q4kd.trainer.formats.architecture import TeacherConfig

_SETTINGS = "q4kd.trainer.formats.huggingface.settings"
_FILE_ROWS = "q4kd.trainer.formats.gguf.writer:file_rows"


@patch(
    "checkpoint",
    "export-multiplier-left-out",
    "Granite's residual multiplier is not exported",
    f"{_SETTINGS}:read_scales",
)
def _multiplier_left_out(original: Callable[..., dict[str, float]], *arguments: object) -> dict[str, float]:
    return {name: value for name, value in original(*arguments).items() if name != "residual_scale"}


@patch("checkpoint", "export-window-left-out", "a student's own window is not exported", f"{_SETTINGS}:read_windows")
def _window_left_out(original: Callable[..., tuple[int, ...]], *arguments: object) -> tuple[int, ...]:
    # This is what a Gemma 2 file means that states none, so that the file read back agrees.
    return tuple(4096 if window else 0 for window in original(*arguments))


@patch("checkpoint", "export-norm-offset-left-out", "Gemma's norms are stored as w, not as 1 + w", _FILE_ROWS)
def _norm_offset_left_out(original: Call, config: "TeacherConfig", target: str, tensor: "Tensor") -> object:
    return tensor if target.endswith("norm.weight") else original(config, target, tensor)


@patch(
    "checkpoint",
    "export-factors-exchanged",
    "divisors for long and for short texts are exchanged",
    f"{_SETTINGS}:read_factors",
)
def _factors_exchanged(original: Call, rope: object, key: str) -> object:
    return original(rope, {"long_factor": "short_factor", "short_factor": "long_factor"}[key])
