"""An experiment that follows whole runs of ``q4kd distill`` from outside, beside their replay in float64."""

from pathlib import Path
from typing import Any

import numpy as np

from q4kd.harness.inputs.arrays import Array, Arrays, Floats
from q4kd.harness.inputs.collect import Comparators, collect_probe, read_events, save_pairs
from q4kd.harness.inputs.command_lines import probe_words
from q4kd.harness.runs.experiment import ONE_THREAD, Arm, Facts, Inputs, experiment
from q4kd.harness.subjects.replay.adapters import compare_merged
from q4kd.harness.subjects.replay.recipes import LEGS, Leg, command_lines, replayed
from q4kd.trainer.files import read_json, write_json

_TERMS = ("loss", "ce", "kd", "grad_norm", "lr")
_FIGURES = ("loss", "perplexity", "kl", "agreement", "tokens")
_SOURCES = ("q4kd distill", "float64 replay of its files and settings")
# Weights of a row, whose movement is compared as one vector. bfloat16's gradients are only known to some per cent each.
_ROW, _ROUNDED_ROW = 16, 96


def _argv(inputs: Inputs) -> list[str]:
    lines = {"legs": command_lines(inputs)}
    cases = inputs.file("replay-legs.json", lambda path: write_json(path, lines))
    return probe_words("distill-legs", cases=cases, out="probe.json")


def _column(values: Floats) -> Floats:
    """Return one row for each figure, so that each is compared by itself."""
    return values.reshape(-1, 1)


def _logged(run_dir: Path, name: str, event: str, keys: tuple[str, ...]) -> Floats:
    """Return the figures of a leg's events, in the order in which they were logged."""
    found = read_events(run_dir, event, f"{name}.jsonl") if (run_dir / f"{name}.jsonl").is_file() else []
    return np.array([[line.get(key, np.nan) for key in keys] for line in found], np.float64).reshape(-1, len(keys))


def _movement(weights: Arrays, expected: Arrays) -> Array:
    """Return how each weight has moved since the start, float32 ``[rows, 16]``, in the order of the names."""
    names = [name.removeprefix("weight:") for name in expected if name.startswith("weight:")]
    moved = [weights[f"weight:{name}"] - expected[f"start:{name}"] for name in names]
    return np.concatenate([part.reshape(-1, _ROW) for part in moved]).astype(np.float32)


def _tensors(path: Path) -> dict[str, Any]:
    """Return the tensors of a safetensors file, bfloat16 among them, as torch reads them; none without the file."""
    from safetensors.torch import load_file

    return load_file(path) if path.is_file() else {}


def _trained(run_dir: Path, name: str) -> dict[str, Any]:
    """Return the masters of the newest checkpoint; a weight without one is its own."""
    newest = sorted((run_dir / name / "checkpoints").glob("step-*"))[-1:]
    found: dict[str, Any] = {}
    for folder in newest:
        found |= _tensors(folder / "model.safetensors")
        state = _tensors(folder / "optimizer.safetensors")
        found |= {key.removesuffix("|master"): value for key, value in state.items() if key.endswith("|master")}
    return found


def _adapters(run_dir: Path, name: str) -> dict[str, Any]:
    """Return the adapters that a run wrote, by the replay's names."""
    from q4kd.harness.oracles.adapters import by_module

    return by_module(_tensors(run_dir / name / "adapter" / "adapter_model.safetensors"))


def _plain(tensors: dict[str, Any], start: Arrays) -> Arrays:
    """Return tensors by the start's names, float64; what is missing, or of another shape, is NaN, no equal."""

    def plain(name: str, like: Array) -> Array:
        found = tensors[name].double().numpy() if name in tensors else None
        return np.full_like(like, np.nan) if found is None or found.shape != like.shape else found

    return {f"weight:{name}": plain(name, like) for name, like in start.items()}


def _model_table(run_dir: Path, name: str, leg: Leg, names: list[str]) -> dict[str, int | bool]:
    """Say of the written model whether it has the student's dtype, and each weight as the last checkpoint rounds it."""
    model, masters = _tensors(run_dir / name / "model" / "model.safetensors"), _trained(run_dir, name)
    dtypes = {str(value.dtype).removeprefix("torch.") for value in model.values()}
    same = [key for key in model if key in masters and bool((masters[key].to(model[key].dtype) == model[key]).all())]
    return {
        "weights": len(model),
        "all of the student's dtype": dtypes == {"bfloat16" if leg.rounds_weights else "float32"},
        "of them to the bit as trained": len(same),
        "are the student's": sorted(model) == sorted(names),
    }


def _best_table(run_dir: Path, name: str, leg: Leg, expected: Arrays) -> dict[str, bool | str]:
    """Say whether the best checkpoint is the one whose replayed figures are best, and which were written and kept."""
    metric = str(leg.more["best_metric"])
    sign = -1 if metric == "agreement" else 1
    values = sign * expected["evaluations"][1:, _FIGURES.index(metric)]
    steps = expected["evaluated"][1:]
    best, path = int(steps[values.argmin()]), run_dir / name / "checkpoints" / "best.json"
    named = read_json(path) if path.is_file() else {}
    # A step's checkpoint, or where that is not among the newest, its weights.
    kept = str(named.get("checkpoint"))
    table: dict[str, bool | str] = {
        "best.json names it": kept in (f"step-{best:06d}", f"best-{best:06d}"),
        "by its metric": named.get("metric") == metric,
        "it is kept": (path.parent / kept / "model.safetensors").is_file(),
    }
    # The weights of a fresh student are those of a version of transformers: which step is its best is theirs.
    if not leg.is_fresh:
        written = read_events(run_dir, "checkpoint", f"{name}.jsonl")
        table["it is the last"] = best == int(steps[-1])
        table["it can be resumed"] = (path.parent / kept / "optimizer.safetensors").is_file()
        table["written"] = ", ".join(sorted((str(line["path"]) for line in written), key=lambda path: path[5:]))
        table["left"] = ", ".join(sorted(folder.name for folder in path.parent.glob("*-*")))
    return table


def _compare(run_dir: Path, name: str, leg: Leg, expected: Arrays) -> tuple[Comparators, dict[str, object]]:
    steps = _logged(run_dir, name, "step", _TERMS)
    if not len(steps):
        return {}, {}
    start = {key.removeprefix("start:"): value for key, value in expected.items() if key.startswith("start:")}
    trained = _plain(_adapters(run_dir, name) if leg.targets else _trained(run_dir, name), start)
    figures, replayed_figures = _logged(run_dir, name, "eval", _FIGURES), expected["evaluations"]
    moved = [_movement(weights, expected) for weights in (trained, expected)]
    if leg.rounds_weights:
        # One rounding exchanges two tokens that are nearly as likely, so agreement is not compared.
        kept = [_FIGURES.index(figure) for figure in _FIGURES if figure != "agreement"]
        figures, replayed_figures = figures[:, kept], replayed_figures[:, kept]
        moved = [part.reshape(-1, _ROUNDED_ROW) for part in moved]
    pairs = {
        f"{name}-losses": (_column(steps[:, :3]), _column(expected["steps"][:, :3])),
        f"{name}-norms": (steps[:, 3:4], expected["steps"][:, 3:4]),
        f"{name}-rates": (steps[:, 4:], expected["steps"][:, 4:]),
        f"{name}-evaluations": (_column(figures), _column(replayed_figures)),
        f"{name}-weights": (moved[0], moved[1]),
    }
    comparators = save_pairs(run_dir, pairs, _SOURCES)
    if leg.targets:
        merged, tables = compare_merged(run_dir, name, leg, expected)
        return comparators | merged, tables
    return comparators, {
        f"{name}-model": _model_table(run_dir, name, leg, list(start)),
        f"{name}-best": _best_table(run_dir, name, leg, expected),
    }


@experiment(
    "replayed-runs",
    f"{len(LEGS)} runs of several steps, two of them resumed by another process, beside their float64 replay",
    Arm(None, _argv, timeout_s=240, env=ONE_THREAD),
)
def _collect(run_dir: Path, inputs: Inputs) -> Facts:
    """Compare what each run said and left with what float64 makes of its files and settings."""
    facts = collect_probe(run_dir, inputs)
    if not facts:
        return {"comparators": {}}
    comparators: Comparators = {}
    tables: dict[str, object] = {**facts["tables"]} if isinstance(facts["tables"], dict) else {}
    for name, leg in LEGS.items():
        found, more = _compare(run_dir, name, leg, replayed(inputs, name))
        comparators |= found
        tables |= more
    clipped = replayed(inputs, "whole")["clipped"]
    tables["clipping"] = {"clips some steps": bool(clipped.any()), "leaves others": not clipped.all()}
    return {"comparators": comparators, "tables": tables}
