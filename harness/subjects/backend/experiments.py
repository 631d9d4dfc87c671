"""Experiments on the choice of backend and device: the decision tables, and real runs under each override."""

import functools
from pathlib import Path

import gguf
import numpy as np

from q4kd.harness.inputs.arrays import random_ids, read_array, seeded_columns
from q4kd.harness.inputs.collect import arm_of, collect_probe, read_events, save_pairs
from q4kd.harness.inputs.samples import growth
from q4kd.harness.runs.experiment import ONE_THREAD, Arm, Facts, Inputs, declare
from q4kd.trainer.bench.synthetic import write_large_teacher

# --- decision-tables: every input of every table ---

declare(
    "decision-tables",
    "the trainer's tables of backend, device class and allocation, filled in by its own functions",
    Arm(None, lambda _inputs: ["probe", "decision-tables", "--out", "probe.json"], timeout_s=60, env=ONE_THREAD),
    collect=collect_probe,
)


# --- teacher-backends: a teacher under each override, whose decoded weights are 155 MB and packed ones 23 MB ---

POSITIONS, VOCAB, COLUMNS = 64, 4096, 128


def _teacher(inputs: Inputs) -> Path:
    return inputs.file("backends.gguf", functools.partial(write_large_teacher, layers=2, vocab=VOCAB))


def _argv(backend: tuple[str, ...], inputs: Inputs) -> list[str]:
    model, ids = str(_teacher(inputs)), str(random_ids(inputs, "backends-ids.npy", VOCAB, POSITIONS))
    common = ["--out", "logits.npy", "--dtype", "float32", "--events", "events.jsonl"]
    return ["logits", model, "--ids", ids, *backend, *common]


def _announced(run_dir: Path) -> dict[str, str | bool]:
    """Return what the event of the choice says, and whether the log has the line that says the same."""
    event = next(iter(read_events(run_dir, "backend_selected")), {})
    line = f"teacher backend: {event.get('backend')} ({event.get('reason')})"
    stated = (run_dir / "stdout.log").read_text(encoding="utf-8").splitlines()
    return {"backend of the event": str(event.get("backend")), "reason of the event is the log's": line in stated}


def _held(run_dir: Path, inputs: Inputs) -> Facts:
    """Return how the anonymous memory that the supervisor saw grew while the teacher was there, whatever the log says.

    Decoded weights are anonymous memory; packed ones are pages of the file, beside a scratch of 17 MB.
    """
    marks = [read_events(run_dir, name) for name in ("teacher_loading", "done")]
    if not all(marks):
        return {}
    begin, end = (found[0]["t"] for found in marks)
    grown = growth(run_dir, "rss_anon", begin, end, at_least=3)
    if grown is None:
        return {}
    decoded = sum(4 * int(np.prod(tensor.shape)) for tensor in gguf.GGUFReader(_teacher(inputs)).tensors)
    table = {"holds decoded weights": grown >= 0.9 * decoded, "holds no decoded weights": grown <= 0.4 * decoded}
    return {"tables": {"held": table}, "anonymous_bytes": grown, "decoded_bytes": decoded}


def _collect(run_dir: Path, inputs: Inputs) -> Facts:
    """Measure what each arm held, read what the default one announced, and compare it with the dense one after it."""
    facts = _held(run_dir, inputs)
    if arm_of(run_dir) == "default":
        tables = facts.get("tables")
        return facts | {"tables": {**(tables if isinstance(tables, dict) else {}), "announced": _announced(run_dir)}}
    other = run_dir.parent / "teacher-backends.default" / "logits.npy"
    mine = run_dir / "logits.npy"
    if arm_of(run_dir) != "flag-dense" or not (other.is_file() and mine.is_file()):
        return facts
    columns = seeded_columns(VOCAB, COLUMNS)
    pair = {"backends": (read_array(mine)[:, columns], read_array(other)[:, columns])}
    sources = ("q4kd logits --backend dense", "q4kd logits, default backend")
    return facts | {"comparators": save_pairs(run_dir, pair, sources)}


def _arm(name: str, *backend: str, env: str | None = None) -> Arm:
    variables = {"Q4KD_TEACHER_BACKEND": env} if env else {}
    words = functools.partial(_argv, backend)
    return Arm(name, words, timeout_s=120, env={**ONE_THREAD, **variables}, interval_s=0.01)


declare(
    "teacher-backends",
    "q4kd logits on a teacher of 39 M weights: default, by option, by variable, and both at once",
    _arm("default"),
    _arm("flag-dense", "--backend", "dense"),
    _arm("env-dense", env="dense"),
    _arm("flag-over-env", "--backend", "q4k", env="dense"),
    collect=_collect,
    measures=("memory",),
)
