"""TensorBoard, wandb and trackio through accelerate: they show what the event log says of steps and evaluations.

None is required. They listen to the event log of the main process, so a run's losses cannot depend on them.
"""

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from q4kd.trainer.config.settings import DistillConfig
from q4kd.trainer.errors import InputError, unknown_name
from q4kd.trainer.events import EventLog

TRACKERS = ("tensorboard", "wandb", "trackio")
_LISTENED = {"step": "train", "eval": "held_out"}


def tracker_names(config: DistillConfig) -> list[str]:
    """Return the trackers that the settings name.

    Raises:
        InputError: for an unknown one, or one whose package is not installed.
    """
    names = [name.strip() for name in config.trackers.split(",") if name.strip()]
    for name in names:
        if name not in TRACKERS:
            raise unknown_name(f"setting trackers {name[:60]}", name, TRACKERS, "tracker")
        if importlib.util.find_spec(name) is None:
            subject, expected = f"setting trackers {name}", f"the package {name}"
            raise InputError(subject, expected=expected, got="none", remedy=f"pip install {name}")
    return names


def project_options(config: DistillConfig) -> dict[str, Any]:
    """Return what ``accelerate.Accelerator`` needs to know of trackers; files go to ``OUT/trackers``.

    Raises:
        InputError: as ``tracker_names``.
    """
    from accelerate.utils import ProjectConfiguration

    names = tracker_names(config)
    if not names:
        return {}
    folders = ProjectConfiguration(project_dir=str(config.out), logging_dir=str(config.out / "trackers"))
    return {"log_with": names, "project_config": folders}


def start_trackers(accelerator: Any, config: DistillConfig, events: EventLog) -> None:
    """Begin to track, in the main process; ``accelerator.end_training`` ends it."""
    if not config.trackers or not accelerator.is_main_process:
        return
    accelerator.init_trackers("q4kd", config=public_settings(config))

    def listen(event: str, fields: Mapping[str, object]) -> None:
        if event in _LISTENED:
            numbers = {
                f"{_LISTENED[event]}/{key}": value
                for key, value in fields.items()
                if isinstance(value, int | float) and key not in ("step", "steps")
            }
            accelerator.log(numbers, step=fields["step"])

    events.listen(listen)


def public_settings(config: DistillConfig) -> dict[str, str | int | float | bool]:
    """Return the settings for a dashboard that others may read, with the last part only of each path."""
    shown: dict[str, str | int | float | bool] = {}
    for key in config.to_json():
        value = getattr(config, key)
        shown[key] = value.name if isinstance(value, Path) else "none" if value is None else value
    return shown
