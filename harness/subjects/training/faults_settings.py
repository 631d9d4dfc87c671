"""Faults in settings: other defaults and bounds, a run file read or printed in another way, settings passed over."""

import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from q4kd.harness.runs.faults import Call, declare, patch, replace

if TYPE_CHECKING:
    from pathlib import Path

    from q4kd.trainer.config.settings import DistillConfig
    from q4kd.trainer.config.value import Setting

_OF = "q4kd.trainer.config.value:Setting.of"
_CONVERT = "q4kd.trainer.config.value:Setting.convert"
_READ = "q4kd.trainer.config.run_file:read_run_file"
_SCALAR = "q4kd.trainer.config.run_file:_scalar"
_SETTINGS = "q4kd.trainer.config.settings:make_config"
_PUBLIC = "q4kd.trainer.train.run.tracking:public_settings"
_PLAIN = "q4kd.trainer.yaml_lines:scalar_of_yaml_1_1"


@patch("dispatch", "another-default", "warm-up takes 21 steps by default", _OF)
def _another_default(original: Callable[..., "Setting"], *arguments: object) -> "Setting":
    setting = original(*arguments)
    return dataclasses.replace(setting, default=21) if setting.name == "warmup_steps" else setting


@patch("dispatch", "looser-bound", "a dropout of 1 is accepted, which leaves nothing", _OF)
def _looser_bound(original: Callable[..., "Setting"], *arguments: object) -> "Setting":
    setting = original(*arguments)
    return dataclasses.replace(setting, high=1.0) if setting.name == "lora_dropout" else setting


@patch("dispatch", "bounds-not-checked", "a number of the command line or of a run file may be any", _CONVERT)
def _bounds_not_checked(original: Callable[..., object], self: "Setting", value: object) -> object:
    return original(dataclasses.replace(self, low=None, high=None), value)


@patch("dispatch", "seed-of-file-ignored", "the seed of a run file is passed over", _READ)
def _seed_of_file_ignored(original: Callable[["Path"], dict[str, object]], path: "Path") -> dict[str, object]:
    return {key: value for key, value in original(path).items() if key != "seed"}


@patch("dispatch", "printed-numbers-rounded", "numbers are printed with six digits", _SCALAR)
def _printed_numbers_rounded(original: Callable[[object], str], value: object) -> str:
    return original(float(f"{value:.6g}") if isinstance(value, float) else value)


@patch("dispatch", "octal-read-as-decimal", "an integer with a leading zero is read to the base of ten", _PLAIN)
def _octal_read_as_decimal(original: Call, text: str) -> Any:
    return int(text) if text.isdigit() else original(text)


@patch("logging", "trackers-told-folders", "trackers are told paths whole, with the names of folders", _PUBLIC)
def _trackers_told_folders(original: Callable[..., dict[str, object]], config: "DistillConfig") -> dict[str, object]:
    return original(config) | {"teacher": str(config.teacher)}


def _ignore(setting: str) -> None:
    def make(original: Call) -> Call:
        return lambda values: original({key: value for key, value in values.items() if key != setting})

    replace(_SETTINGS, make)


for _setting in (
    "gradient_checkpointing", "compile", "student_kernels", "trackers", "loss_logits", "loss_mode", "chunk_tokens",
):  # fmt: skip
    _title = f"the setting {_setting} is read and not used"
    declare("loop", f"{_setting}-ignored", _title, functools.partial(_ignore, _setting), _SETTINGS)
