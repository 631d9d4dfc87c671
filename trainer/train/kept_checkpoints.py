"""Which checkpoints stay: the newest, and the weights of the best evaluation, which ``checkpoints/best.json`` names."""

import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from q4kd.trainer.errors import InputError
from q4kd.trainer.files import read_json, write_json
from q4kd.trainer.train.checkpoint import (
    complete_folder,
    list_best_weights,
    list_checkpoints,
    remove_left_overs,
)
from q4kd.trainer.train.checkpoint_files import file_name

BEST_FILE = "best.json"
# The best evaluation is the one whose metric times its sign is lowest.
_SIGN: Mapping[str, int] = {"loss": 1, "kl": 1, "agreement": -1}


def record_evaluation(path: Path, evaluation: Mapping[str, Any]) -> None:
    """Add a step's held-out figures to its checkpoint.

    Raises:
        OSError: when it cannot be written; the checkpoint is then as it was.
    """
    write_json(path / "state.json", read_json(path / "state.json") | {"evaluation": dict(evaluation)})


def _evaluations(run: Path, metric: str) -> dict[Path, float]:
    """Return the value of a metric for the folders that have one; damaged ones have none."""
    found = {}
    for path in (*list_checkpoints(run), *list_best_weights(run)):
        try:
            document = read_json(path / "state.json")
        except InputError:
            continue
        evaluation = document.get("evaluation") if isinstance(document, dict) else None
        value = evaluation.get(metric) if isinstance(evaluation, dict) else None
        if isinstance(value, int | float) and math.isfinite(value):
            found[path] = float(value)
    return found


def best_value(run: Path, metric: str) -> float | None:
    """Return the best value of a metric among what is kept, or None where nothing is evaluated."""
    return min(_evaluations(run, metric).values(), key=lambda value: _SIGN[metric] * value, default=None)


def is_better(metric: str, value: float, than: float | None) -> bool:
    """Return whether an evaluation is better than another; one that is not finite never is."""
    return math.isfinite(value) and (than is None or _SIGN[metric] * value < _SIGN[metric] * than)


def prune_checkpoints(run: Path, keep: int, metric: str, is_best_whole: bool = False) -> Path | None:
    """Drop all checkpoints but the newest ``keep`` and the best, which ``best.json`` then names; return the best.

    A best checkpoint that is not among the newest is reduced to its weights, unless it stays whole (``is_best_whole``).

    Raises:
        OSError: when ``best.json`` or the weights cannot be written.
    """
    folder, values = run / "checkpoints", _evaluations(run, metric)
    newest = list_checkpoints(run)[-keep:]
    # The first of equal ones; where a step has both, the checkpoint, which comes first in the listing.
    best = min(values, key=lambda path: (_SIGN[metric] * values[path], _step_of(path)), default=None)
    if best is not None:
        value = values[best]
        if not is_best_whole and best in list_checkpoints(run) and best not in newest:
            best = _reduce_to_weights(best)
        write_json(folder / BEST_FILE, {"checkpoint": best.name, "metric": metric, "value": value})
    for old in (*list_checkpoints(run), *list_best_weights(run)):
        if old not in newest and old != best:
            # It is renamed first, so that nothing half deleted bears the name of a checkpoint.
            old.rename(folder / f".{old.name}.tmp")
    remove_left_overs(folder)
    return best


def _step_of(path: Path) -> int:
    return int(path.name.partition("-")[2])


def _reduce_to_weights(path: Path) -> Path:
    """Make best weights of a checkpoint, its file of weights under another name and its state; return what is kept."""
    final = path.parent / f"best-{path.name.removeprefix('step-')}"
    temporary, weights = path.parent / f".{final.name}.tmp", file_name("model")
    state = read_json(path / "state.json")
    digests = state.get("sha256")
    if not isinstance(digests, dict) or weights not in digests or not (path / weights).is_file():
        return path  # It is damaged, and somebody should see it as it is.
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        os.link(path / weights, temporary / weights)
    except OSError:  # Not every file system has hard links.
        shutil.copyfile(path / weights, temporary / weights)
        with (temporary / weights).open("rb+") as file:
            os.fsync(file.fileno())
    complete_folder(temporary, final, state | {"sha256": {weights: digests[weights]}})
    return final
