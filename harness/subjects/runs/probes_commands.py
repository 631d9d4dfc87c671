"""Runs of ``q4kd`` one after another in one process, whose start they share; on a GPU, with the memory each took."""

import gc
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from q4kd.harness.runs.probes import probe
from q4kd.trainer.files import read_json, write_json

# In the place of a command: RUN, ANOTHER and STEP, for a copy of a run's folder as it was after a step.
REWIND = "rewind"
# FORGET and RUNs, for removing their checkpoints, which can be as large as the disk: no later command reads them.
FORGET = "forget"


@probe("commands")
def commands(cases: Path, out: Path, deterministic: bool = False) -> int:
    """Run the commands of a JSON file ``{"commands": [[name, argv], …]}`` in turn, up to the first that fails.

    Records for each its exit code and, where the process has used a GPU, the bytes by which the peaks of torch's
    allocator (``allocated``, and ``reserved`` from the driver) rose above what was left of the command before.
    ``--deterministic`` has torch take no algorithm whose result depends on the order in which threads come to it.
    Returns the last command's exit code.
    """
    if deterministic:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # read when CUDA starts
    import torch

    from q4kd.harness.__main__ import main

    if deterministic:
        torch.use_deterministic_algorithms(True)
        # Filling new tensors with NaN would cost as much as a step, and shows nothing that is asked here.
        settings: Any = torch.utils.deterministic
        settings.fill_uninitialized_memory = False
    found: dict[str, Mapping[str, int]] = {}
    code = 0
    for name, argv in read_json(cases)["commands"]:
        if argv[0] == FORGET:
            for run in argv[1:]:
                shutil.rmtree(Path(run) / "checkpoints")
            continue
        before = _held()
        code = _rewind(*argv[1:]) if argv[0] == REWIND else main(argv)
        found[name] = {"exit code": code, **_peaks(before)}
        write_json(out, {"commands": found})
        if code:
            break
    return code


def _rewind(run: str, another: str, step: str) -> int:
    """Copy a run's folder, by hard links, without what came after a step: a run that was stopped there.

    A run that is stopped has taken steps of its own, which on a GPU differ from another's by more than a resumption
    does; of a copy every difference is the resumption's.
    """
    kept = f"step-{int(step):06}"

    def later(folder: str, names: list[str]) -> set[str]:
        if Path(folder).name == "checkpoints":
            return {name for name in names if name != kept}
        return {name for name in names if name in ("model", "summary.json", ".lock")}

    shutil.copytree(run, another, ignore=later, copy_function=os.link)
    return 0


def _held() -> dict[str, int]:
    """Give back what the last command left, start new peaks, and return the bytes that are still held."""
    import torch

    gc.collect()
    cuda: Any = torch.cuda
    if not cuda.is_initialized():
        return {"allocated": 0, "reserved": 0}
    cuda.empty_cache()
    cuda.reset_peak_memory_stats()
    return {"allocated": cuda.memory_allocated(), "reserved": cuda.memory_reserved()}


def _peaks(before: Mapping[str, int]) -> dict[str, int]:
    import torch

    cuda: Any = torch.cuda
    if not cuda.is_initialized():
        return {}
    peaks = {"allocated": cuda.max_memory_allocated(), "reserved": cuda.max_memory_reserved()}
    return {name: peak - before[name] for name, peak in peaks.items()} | {"left before": before["allocated"]}
