"""What a night remembers across a crash or a reboot: which stages are finished, with what code, in which boot."""

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from q4kd.trainer.errors import InputError
from q4kd.trainer.files import read_json, write_json

SCHEMA = "q4kd-nightly/1"
# A night that was cut off longer ago than this is given up: its kill records are another day's.
_ABANDONED_S = 24 * 3600.0
_MAX_STATE = 1 << 20


@dataclass
class Night:
    """One night's work. ``name``, ``<utc>-<profile>``, is that of its bundle and log; ``started`` is in unix seconds.

    ``key`` is what makes two nights the same work (see ``night_key``). Of each finished stage ``stages`` has
    ``{"code", "seconds", "boot_id", "finished"}``; ``boots`` are the boot ids that worked on it, in order.
    """

    key: dict[str, Any]
    name: str
    started: float
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)
    boots: list[str] = field(default_factory=list)

    def save(self, path: Path) -> None:
        """Write the state atomically."""
        write_json(path, {"schema": SCHEMA, **asdict(self)})

    def done(self, stage: str) -> bool:
        """Return whether a stage is finished."""
        return stage in self.stages

    def finish(self, stage: str, code: int, seconds: float, path: Path) -> None:
        """Record that a stage ended with ``code``, in this boot, and save."""
        boot = self.boots[-1] if self.boots else None
        entry = {"code": code, "seconds": round(seconds, 3), "boot_id": boot, "finished": time.time()}
        self.stages[stage] = entry
        self.save(path)

    def code(self, stage: str) -> int:
        """Return the recorded exit code of a finished stage."""
        return int(self.stages[stage]["code"])


def read_night(path: Path) -> Night | None:
    """Return the recorded night, or None when there is none.

    Raises:
        InputError: when the file is not what ``Night.save`` writes.
    """
    if not path.is_file():
        return None
    value = read_json(path, _MAX_STATE)
    try:
        if value["schema"] != SCHEMA:
            raise ValueError(f"schema {value['schema']!r}")
        stages = {str(name): dict(entry) for name, entry in value["stages"].items()}
        if any(entry["code"] not in range(256) for entry in stages.values()):
            raise ValueError("an exit code that is none")
        name = str(value["name"])
        if Path(name).name != name or name.startswith("."):
            raise ValueError(f"name {name!r}")
        boots = [str(boot) for boot in value["boots"]]
        return Night(key=dict(value["key"]), name=name, started=float(value["started"]), stages=stages, boots=boots)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        remedy = "remove it to begin a new night"
        raise InputError(str(path), expected=f"a {SCHEMA} document", got=str(error)[:120], remedy=remedy) from error


def take_up(recorded: Night | None, key: Mapping[str, Any], name: str, last_stage: str, now: float) -> Night:
    """Return the recorded night when it is this one, else a new one.

    It is this one when its key is the same and it is either unfinished and less than a day old, or finished and begun
    on the same day (UTC): then nothing is left to do.
    """
    if recorded is None or recorded.key != dict(key) or not 0 <= now - recorded.started < _ABANDONED_S:
        return Night(key=dict(key), name=name, started=now)
    if recorded.done(last_stage) and _day(recorded.started) != _day(now):
        return Night(key=dict(key), name=name, started=now)
    return recorded


def _day(seconds: float) -> str:
    return time.strftime("%Y-%m-%d", time.gmtime(seconds))
