"""Experiments on 8-bit and paged moments: what is learnt, what a checkpoint holds of them, and how runs go on."""

import functools
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from q4kd.harness.inputs.collect import run_terms, save_pairs
from q4kd.harness.inputs.command_lines import distill_words, named_run, probe_words, set_words
from q4kd.harness.inputs.demo import argparse_documents, demo_student, demo_teacher
from q4kd.harness.runs.experiment import ONE_THREAD, Arm, Facts, Inputs, declare
from q4kd.trainer.files import write_json

# bitsandbytes takes about a second for a step of the demo's 0.7 M weights on the CPU, so there are few.
STEPS, STOPPED_AT = 6, 3
_BLOCK = 256
# What is compared with adamw on each device. Pages move between a GPU and its host, so the CPU has none.
_OPTIMIZERS: Mapping[str, tuple[str, ...]] = {
    "cpu": ("adamw_8bit",),
    "cuda": ("adamw_8bit", "paged_adamw_8bit", "paged_adamw"),
}


def eight_bit_commands(inputs: Inputs, device: str) -> list[tuple[str, list[str]]]:
    """Return the commands of the experiment by name, as they follow each other."""
    models = demo_teacher(inputs), demo_student(inputs), argparse_documents(inputs)

    def words(optimizer: str) -> list[str]:
        every = {"steps": STEPS, "eval_tokens": 0, "optimizer": optimizer, "student_dtype": "float32", "device": device}
        return distill_words(*models, *set_words(every))

    found = [("adamw", named_run("adamw", words("adamw")))]
    for name in _OPTIMIZERS[device]:
        found += [
            (f"{name}-stopped", [*named_run(f"{name}-stopped", words(name)), "--max-steps", str(STOPPED_AT)]),
            (f"{name}-whole", named_run(f"{name}-whole", words(name))),
            (f"{name}-resumed", [*named_run(f"{name}-stopped", words(name)), "--resume"]),
        ]
    return found


def _argv(device: str, inputs: Inputs) -> list[str]:
    commands = eight_bit_commands(inputs, device)
    cases = inputs.file(f"{device}-eight-bit-runs.json", lambda path: write_json(path, {"commands": commands}))
    return [*probe_words("commands", cases=cases, out="commands.json"), "--deterministic"]


def count_moments(path: Path) -> dict[str, int]:
    """Count the weights whose moments a checkpoint holds in 8 and in 32 bits, and the bytes of the former's."""
    from safetensors.numpy import load_file

    tensors = load_file(path)
    first = {name: value for name, value in tensors.items() if name.endswith("|state1")}
    eight = {name.removesuffix("state1"): value.size for name, value in first.items() if value.dtype == np.uint8}
    kept = sum(tensors[f"{name}{part}"].nbytes for name in eight for part in ("state1", "state2", "absmax1", "absmax2"))
    foreseen = sum(2 * size + 2 * 4 * -(-size // _BLOCK) for size in eight.values())
    return {
        "weights in 8 bits": sum(eight.values()),
        "weights in 32 bits": sum(value.size for value in first.values()) - sum(eight.values()),
        "bytes beyond two moments and a scale for 256": kept - foreseen,
    }


def _collect(device: str, run_dir: Path, _inputs: Inputs) -> Facts:
    """Compare every step with adamw's and a resumed run's, one optimiser after another; count what is in 8 bits."""
    names = _OPTIMIZERS[device]
    plain = run_terms(run_dir, "adamw")
    whole, resumed = ([run_terms(run_dir, f"{name}-{arm}") for name in names] for arm in ("whole", "stopped"))
    checkpoints = {
        name: run_dir / f"{name}-whole" / "checkpoints" / f"step-{STEPS:06d}" / "optimizer.safetensors"
        for name in names
    }
    complete = all(len(terms) == STEPS for terms in (plain, *whole, *resumed))
    if not complete or not all(path.is_file() for path in checkpoints.values()):
        return {"comparators": {}}
    pair = {"losses": (np.concatenate(whole)[:, :3], np.concatenate([plain] * len(names))[:, :3])}
    comparators = save_pairs(run_dir, pair, ("moments of bitsandbytes", "float32 moments of torch"))
    pair = {"resumed": (np.concatenate(resumed), np.concatenate(whole))}
    comparators |= save_pairs(run_dir, pair, ("run stopped and resumed", "run left alone"))
    moments = {
        f"{name}: {what}": count for name, path in checkpoints.items() for what, count in count_moments(path).items()
    }
    return {"comparators": comparators, "tables": {"moments": moments}}


for _name, _device, _needs in (
    ("eight-bit-runs", "cpu", ("bitsandbytes",)),
    ("cuda-eight-bit-runs", "cuda", ("cuda", "bitsandbytes")),
):
    declare(
        _name,
        f"{STEPS} steps on {_device} with float32 moments, with {', '.join(_OPTIMIZERS[_device])}, and these resumed",
        Arm(None, functools.partial(_argv, _device), timeout_s=240, env=ONE_THREAD),
        needs=_needs,
        collect=functools.partial(_collect, _device),
    )
