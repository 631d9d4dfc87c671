"""An experiment on 8-bit moments: what is learnt with them, what a checkpoint holds of them, and how runs go on."""

from pathlib import Path

import numpy as np

from q4kd.harness.inputs.collect import read_events, save_pairs
from q4kd.harness.inputs.command_lines import distill_words, named_run, probe_words, set_words
from q4kd.harness.inputs.demo import argparse_documents, demo_student, demo_teacher
from q4kd.harness.runs.experiment import ONE_THREAD, Arm, Facts, Inputs, experiment
from q4kd.trainer.files import write_json

# bitsandbytes takes about a second for a step of the demo's 0.7 M weights on the CPU, so there are few.
STEPS, STOPPED_AT = 6, 3
_TERMS = ("loss", "ce", "kd", "grad_norm")
_BLOCK = 256


def _commands(inputs: Inputs) -> list[tuple[str, list[str]]]:
    models = demo_teacher(inputs), demo_student(inputs), argparse_documents(inputs)

    def words(optimizer: str) -> list[str]:
        every = {"steps": STEPS, "eval_tokens": 0, "optimizer": optimizer, "student_dtype": "float32"}
        return distill_words(*models, *set_words(every))

    eight = words("adamw_8bit")
    return [
        ("float32", named_run("float32", words("adamw"))),
        ("stopped", [*named_run("stopped", eight), "--max-steps", str(STOPPED_AT)]),
        ("whole", named_run("whole", eight)),
        ("resumed", [*named_run("stopped", eight), "--resume"]),
    ]


def _argv(inputs: Inputs) -> list[str]:
    cases = inputs.file("eight-bit-runs.json", lambda path: write_json(path, {"commands": _commands(inputs)}))
    return probe_words("commands", cases=cases, out="commands.json")


def _moments(path: Path) -> dict[str, int]:
    """Count the weights whose moments a checkpoint holds in 8 and in 32 bits, and the bytes of the former's."""
    from safetensors.numpy import load_file

    tensors = load_file(path)
    first = {name: value for name, value in tensors.items() if name.endswith("|state1")}
    eight = {name.removesuffix("state1"): value.size for name, value in first.items() if value.dtype == np.uint8}
    kept = sum(tensors[f"{name}{part}"].nbytes for name in eight for part in ("state1", "state2", "absmax1", "absmax2"))
    foreseen = sum(2 * size + 2 * 4 * -(-size // _BLOCK) for size in eight.values())
    return {
        "weights with moments in 8 bits": sum(eight.values()),
        "weights with moments in 32 bits": sum(value.size for value in first.values()) - sum(eight.values()),
        "bytes beyond two moments and a scale for 256": kept - foreseen,
    }


@experiment(
    "eight-bit-runs",
    f"{STEPS} steps with float32 moments, with 8-bit moments, and with these stopped after {STOPPED_AT} and resumed",
    Arm(None, _argv, timeout_s=240, env=ONE_THREAD),
    needs=("bitsandbytes",),
)
def _collect(run_dir: Path, _inputs: Inputs) -> Facts:
    terms = {}
    for name in ("float32", "whole", "stopped"):
        path = run_dir / f"{name}.jsonl"
        steps = read_events(run_dir, "step", path.name) if path.is_file() else []
        terms[name] = np.array([[event[key] for key in _TERMS] for event in steps], np.float64).reshape(-1, 4)
    checkpoint = run_dir / "whole" / "checkpoints" / f"step-{STEPS:06d}" / "optimizer.safetensors"
    if any(len(found) != STEPS for found in terms.values()) or not checkpoint.is_file():
        return {"comparators": {}}
    pair = {"losses": (terms["whole"][:, :3], terms["float32"][:, :3])}
    comparators = save_pairs(run_dir, pair, ("8-bit moments", "float32 moments"))
    pair = {"resumed": (terms["stopped"], terms["whole"])}
    comparators |= save_pairs(run_dir, pair, ("run stopped and resumed", "run left alone"))
    return {"comparators": comparators, "tables": {"moments": _moments(checkpoint)}}
