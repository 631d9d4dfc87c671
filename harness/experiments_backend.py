"""Experiments on the choice of backend and device: the decision tables, and real runs under each override."""

import functools
from pathlib import Path
from typing import Any

import numpy as np

from q4kd.harness.experiment import Arm, Experiment, Inputs, register
from q4kd.harness.experiments_runs import read_events
from q4kd.harness.experiments_teacher import GOLDEN_LOGITS, collect_probe, golden_teacher, save_pairs

# --- decision-tables: every input of every table ---

register(
    Experiment(
        name="decision-tables",
        title="the trainer's tables of backend, device class and allocation, filled in by its own functions",
        needs=(),
        arms=(Arm(None, lambda _inputs: ["probe", "decision-tables", "--out", "probe.json"], timeout_s=60),),
        collect=collect_probe,
    )
)


# --- teacher-backends: the golden teacher under each override ---


def _ids(inputs: Inputs) -> Path:
    def make(path: Path) -> None:
        with np.load(GOLDEN_LOGITS, allow_pickle=False) as arrays, path.open("wb") as file:
            np.save(file, arrays["ids"])

    return inputs.file("backend-ids.npy", make)


def _prepare(inputs: Inputs) -> None:
    golden_teacher(inputs)
    _ids(inputs)


def _argv(backend: tuple[str, ...], inputs: Inputs) -> list[str]:
    model, ids = str(golden_teacher(inputs)), str(_ids(inputs))
    common = ["--out", "logits.npy", "--dtype", "float32", "--events", "events.jsonl"]
    return ["logits", model, "--ids", ids, *backend, *common]


def _announced(run_dir: Path) -> dict[str, Any]:
    """Lay the event of the choice beside the line of the log."""
    event = next(iter(read_events(run_dir, "backend_selected")), {})
    line = f"teacher backend: {event.get('backend')} ({event.get('reason')})"
    stated = (run_dir / "stdout.log").read_text(encoding="utf-8").splitlines()
    return {"backend of the event": str(event.get("backend")), "reason of the event is the log's": line in stated}


def _collect(run_dir: Path, _inputs: Inputs) -> dict[str, Any]:
    """Read what the default arm announced, and compare the dense arm's logits with its, which ran before."""
    if run_dir.name.endswith(".default"):
        return {"tables": {"announced": _announced(run_dir)}}
    other = run_dir.parent / "teacher-backends.default" / "logits.npy"
    mine = run_dir / "logits.npy"
    if run_dir.name.partition(".")[2] != "flag-dense" or not (other.is_file() and mine.is_file()):
        return {}
    pair = {"backends": (np.load(mine, allow_pickle=False), np.load(other, allow_pickle=False))}
    return {"comparators": save_pairs(run_dir, pair, ("q4kd logits --backend dense", "q4kd logits, default backend"))}


def _arm(name: str, *backend: str, env: str | None = None) -> Arm:
    variables = {"OMP_NUM_THREADS": "1"} | ({"Q4KD_TEACHER_BACKEND": env} if env else {})
    return Arm(name, functools.partial(_argv, backend), timeout_s=120, env=variables)


register(
    Experiment(
        name="teacher-backends",
        title="q4kd logits on the golden teacher: default, by option, by variable, and both at once",
        needs=(),
        arms=(
            _arm("default"),
            _arm("flag-dense", "--backend", "dense"),
            _arm("env-dense", env="dense"),
            _arm("flag-over-env", "--backend", "q4k", env="dense"),
        ),
        prepare=_prepare,
        collect=_collect,
    )
)
