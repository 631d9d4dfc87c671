"""Experiments on the choice of backend and device: the decision tables, and real runs under each override."""

import functools
from pathlib import Path

from q4kd.harness.inputs.arrays import read_array
from q4kd.harness.inputs.collect import arm_of, collect_probe, read_events, save_pairs
from q4kd.harness.inputs.demo import golden_ids, golden_teacher
from q4kd.harness.runs.experiment import ONE_THREAD, Arm, Facts, Inputs, declare

# --- decision-tables: every input of every table ---

declare(
    "decision-tables",
    "the trainer's tables of backend, device class and allocation, filled in by its own functions",
    Arm(None, lambda _inputs: ["probe", "decision-tables", "--out", "probe.json"], timeout_s=60, env=ONE_THREAD),
    collect=collect_probe,
)


# --- teacher-backends: the golden teacher under each override ---


def _argv(backend: tuple[str, ...], inputs: Inputs) -> list[str]:
    model, ids = str(golden_teacher(inputs)), str(golden_ids(inputs))
    common = ["--out", "logits.npy", "--dtype", "float32", "--events", "events.jsonl"]
    return ["logits", model, "--ids", ids, *backend, *common]


def _announced(run_dir: Path) -> dict[str, str | bool]:
    """Return what the event of the choice says, and whether the log has the line that says the same."""
    event = next(iter(read_events(run_dir, "backend_selected")), {})
    line = f"teacher backend: {event.get('backend')} ({event.get('reason')})"
    stated = (run_dir / "stdout.log").read_text(encoding="utf-8").splitlines()
    return {"backend of the event": str(event.get("backend")), "reason of the event is the log's": line in stated}


def _collect(run_dir: Path, _inputs: Inputs) -> Facts:
    """Read what the default arm announced, and compare its logits with those of the dense arm, which runs later."""
    if arm_of(run_dir) == "default":
        return {"tables": {"announced": _announced(run_dir)}}
    other = run_dir.parent / "teacher-backends.default" / "logits.npy"
    mine = run_dir / "logits.npy"
    if arm_of(run_dir) != "flag-dense" or not (other.is_file() and mine.is_file()):
        return {}
    pair = {"backends": (read_array(mine), read_array(other))}
    return {"comparators": save_pairs(run_dir, pair, ("q4kd logits --backend dense", "q4kd logits, default backend"))}


def _arm(name: str, *backend: str, env: str | None = None) -> Arm:
    variables = {"Q4KD_TEACHER_BACKEND": env} if env else {}
    return Arm(name, functools.partial(_argv, backend), timeout_s=120, env={**ONE_THREAD, **variables})


declare(
    "teacher-backends",
    "q4kd logits on the golden teacher: default, by option, by variable, and both at once",
    _arm("default"),
    _arm("flag-dense", "--backend", "dense"),
    _arm("env-dense", env="dense"),
    _arm("flag-over-env", "--backend", "q4k", env="dense"),
    collect=_collect,
)
