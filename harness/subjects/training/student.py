"""Experiments on how the student is trained: precision, adapters, accumulation, and several processes as one."""

import functools
from pathlib import Path

from q4kd.harness.inputs.arrays import read_arrays
from q4kd.harness.inputs.collect import collect_probe, save_pairs, step_terms
from q4kd.harness.inputs.command_lines import distill_words, probe_words, set_words
from q4kd.harness.inputs.demo import demo_student, demo_teacher
from q4kd.harness.inputs.training_documents import text_documents
from q4kd.harness.runs.experiment import ONE_THREAD, Arm, Facts, Inputs, declare, experiment
from q4kd.harness.subjects.training.probes import RANKS, VARIANTS

# --- student-steps: the trainer's step under settings that must not matter, with adapters, and on bfloat16 weights ---


def _steps_argv(inputs: Inputs) -> list[str]:
    models = {"teacher": demo_teacher(inputs), "student": demo_student(inputs)}
    return probe_words("student-steps", **models, out="steps.npz", facts="probe.json")


@experiment(
    "student-steps",
    "the same steps whole, accumulated, recomputed, in bfloat16 and with adapters",
    Arm(None, _steps_argv, timeout_s=120, env=ONE_THREAD),
)
def _collect_steps(run_dir: Path, inputs: Inputs) -> Facts:
    facts, found = collect_probe(run_dir, inputs), read_arrays(run_dir / "steps.npz")
    if not found:
        return facts | {"comparators": {}}
    whole = found["whole"]
    pairs = {name: (found[name], whole) for name in VARIANTS if name != "whole"}
    # Only losses are compared: the claim says nothing of what bfloat16 does to the norm of a gradient.
    pairs["bfloat16"] = (found["bfloat16"][:, :3], whole[:, :3])
    comparators = save_pairs(run_dir, pairs, ("the setting", "plain float32 steps on whole batches"))
    # What training did to the logits is compared: a merge that forgot it would differ by all of it.
    moved = {"merged": (found["merged"] - found["untrained"], found["adapted"] - found["untrained"])}
    comparators |= save_pairs(run_dir, moved, ("merged student", "student with its adapters"))
    return facts | {"comparators": comparators}


# --- student-ranks, cuda-ranks: q4kd distill in one process, in two with copies of the student, in two with shards ---

SEQUENCES_PER_STEP = 8
RANK_STEPS = 4


def _ranks_argv(device: str, kind: str, inputs: Inputs) -> list[str]:
    processes = 1 if kind == "one" else RANKS
    settings = {
        # There are two micro-batches, so that gradients are added up in each process before they travel.
        "batch_size": SEQUENCES_PER_STEP // processes // 2,
        "accumulation": 2,
        "steps": RANK_STEPS,
        "clip": 0.5,
        "eval_tokens": 0,
        "device": device,
        "student_dtype": "float32",
    }
    # Windows hold borders of documents, whose positions have no label: the shares of a batch weigh unequally.
    words = distill_words(demo_teacher(inputs), demo_student(inputs), text_documents(inputs), *set_words(settings))
    return words if kind == "one" else ["probe", "distill-ranks", kind, *words]


def _collect_ranks(run_dir: Path, _inputs: Inputs) -> Facts:
    """Compare the arms of two processes with that of one, whose name comes first."""
    experiment_name, _, arm = run_dir.name.partition(".")
    before = run_dir.parent / f"{experiment_name}.one"
    if arm == "one" or not all((folder / "events.jsonl").is_file() for folder in (run_dir, before)):
        return {"comparators": {}}
    steps, one = (step_terms(folder, "grad_norm") for folder in (run_dir, before))
    if not len(steps) or steps.shape != one.shape:
        return {"comparators": {}}
    return {"comparators": save_pairs(run_dir, {"steps": (steps, one)}, (f"{RANKS} processes, {arm}", "one process"))}


for _name, _device, _where, _needs in (
    ("student-ranks", "cpu", "over gloo", ()),
    ("cuda-ranks", "cuda", "over NCCL, each with a GPU", ("cuda", "two_gpus")),
):
    declare(
        _name,
        f"q4kd distill in one process, and in {RANKS} that share the same batches {_where}",
        *(
            Arm(kind, functools.partial(_ranks_argv, _device, kind), timeout_s=120, stall_s=60, env=ONE_THREAD)
            for kind in ("one", "copies", "shards")
        ),
        needs=_needs,
        collect=_collect_ranks,
        measures=("process",),
    )


# --- settings-refused: names of settings that are not quite right ---

declare(
    "settings-refused",
    "settings that do not exist, beside those that were meant",
    Arm(None, lambda _inputs: ["probe", "refused-settings", "--out", "probe.json"], timeout_s=60, env=ONE_THREAD),
    collect=collect_probe,
)
