"""Faults in what is told of a student before it is loaded."""

from q4kd.harness.runs.faults import Call, patch

_ARCHITECTURE = "q4kd.trainer.student.architecture"


@patch("loop", "head-bias-overlooked", "a head's bias is not looked for", f"{_ARCHITECTURE}:check_head_kind")
@patch("loop", "layers-overlooked", "kinds of layers are not looked at", f"{_ARCHITECTURE}:check_layers")
def _overlooked(_original: Call, *_arguments: object) -> None:
    return
