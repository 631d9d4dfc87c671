"""Faults in what protects a run: guards that do not fire, torn checkpoints, resumes that forget, plans that lie."""

import dataclasses
import os
import shutil
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from q4kd.harness.runs.faults import Call, fault, patch, replace

if TYPE_CHECKING:
    from torch import Tensor

    from q4kd.trainer.train.checkpoint import CheckpointState
    from q4kd.trainer.train.optimizer import MasterWeightOptimizer
    from q4kd.trainer.train.run.assembly import Run
    from q4kd.trainer.train.run.state import Progress

_CHECKPOINT = "q4kd.trainer.train.checkpoint"
_SAVE = f"{_CHECKPOINT}:save_checkpoint"
_PRUNE = "q4kd.trainer.train.kept_checkpoints:prune_checkpoints"
_COPY = "q4kd.trainer.device.host_snapshot:HostSnapshot.copy"
_SAVER = "q4kd.trainer.train.saver:CheckpointSaver.save"
_STATE = f"{_CHECKPOINT}:read_state"
_DIFFERENCE = f"{_CHECKPOINT}:explain_difference"
_OWN_STATE = f"{_CHECKPOINT}:_own_state"
_RESTORE = "q4kd.trainer.train.run.assembly:restore"
_LOAD = "q4kd.trainer.train.optimizer:MasterWeightOptimizer.load"
_MOMENTS = "q4kd.trainer.train.memory.items:MOMENT_BYTES"
_ACTIVATIONS = "q4kd.trainer.train.memory.items:saved_activations"
_STEP = "q4kd.trainer.train.step:train_step"
_KEEP_STEP = "q4kd.trainer.train.run.folder:save_step"
_WATCH = "q4kd.trainer.train.hang_watchdog:HangWatchdog._watch"
_DUMP = "q4kd.trainer.train.hang_watchdog:_dump"
_HEAR = "q4kd.trainer.train.stop_request:StopRequest._hear"
_AGREED = "q4kd.trainer.train.stop_request:StopRequest.agreed"
_RELIEFS = "q4kd.trainer.train.memory.plan:reliefs"
_MEMORY = "q4kd.trainer.errors:is_out_of_memory"


# --- during the run ---


@patch("loop", "nan-ignored", "a step whose loss is not finite is skipped in silence", _STEP)
def _nan_ignored(
    original: Call,
    accelerator: object,
    model: object,
    teacher: object,
    optimizer: "MasterWeightOptimizer",
    *rest: object,
) -> object:
    """Skip an update that is not finite and go on, as mixed-precision scalers do."""
    from q4kd.trainer.errors import NotFiniteError
    from q4kd.trainer.train.step import StepResult

    try:
        return original(accelerator, model, teacher, optimizer, *rest)
    except NotFiniteError as error:
        optimizer.zero_grad()
        terms: dict[str, Any] = {field.name: error.terms.get(field.name, 1) for field in dataclasses.fields(StepResult)}
        return StepResult(**terms)


@patch("loop", "aborted-step-not-kept", "the batch of a step that is not finite is not saved", _KEEP_STEP)
def _aborted_step_not_kept(_original: Call, folder: Path, *_rest: object) -> Path:
    return folder


@patch("supervision", "watchdog-asleep", "the hang watchdog never looks", _WATCH)
def _watchdog_asleep(_original: Call, self: Any) -> None:
    self._over.wait()


@patch("supervision", "stacks-not-dumped", "the hang watchdog ends the run without stacks", _DUMP)
def _stacks_not_dumped(_original: Call, _file: object) -> None:
    return


@patch("supervision", "signal-ends-at-once", "a signal ends the run without a checkpoint", _HEAR)
def _signal_ends_at_once(_original: Call, _self: object, number: int, _frame: object) -> None:
    os._exit(128 + number)


@patch("supervision", "signal-ignored", "a signal is announced and then forgotten", _AGREED)
def _signal_ignored(_original: Call, _self: object, _accelerator: object) -> int:
    return 0


@patch("memory", "memory-not-explained", "an allocation that fails is an internal error", _MEMORY)
def _memory_not_explained(_original: Call, _error: object) -> bool:
    return False


@patch("memory", "relief-forgotten", "that gradient checkpointing takes less memory is not thought of", _RELIEFS)
def _relief_forgotten(original: Callable[..., list[tuple[str, object]]], config: object) -> list[tuple[str, object]]:
    return [found for found in original(config) if found[0] != "gradient_checkpointing"]


# --- checkpoints and resume ---


@patch("checkpoint", "torn-checkpoint", "a checkpoint has its name before its files", _SAVE)
def _torn_checkpoint(
    original: Callable[..., Path], run: Path, tensors: object, state: "CheckpointState", *rest: object
) -> Path:
    final = run / "checkpoints" / f"step-{state.step:06d}"
    apart = original(run / ".apart", tensors, state, *rest)
    final.mkdir(parents=True, exist_ok=True)
    for path in sorted(apart.iterdir()):
        time.sleep(0.01)
        shutil.copy(path, final / path.name)
    shutil.rmtree(run / ".apart")
    return final


@patch("checkpoint", "pruned-before-written", "earlier checkpoints are removed before the next is written", _SAVE)
def _pruned_before_written(original: Call, run: Path, *rest: object) -> object:
    shutil.rmtree(run / "checkpoints", ignore_errors=True)
    return original(run, *rest)


@patch(
    "checkpoint", "checkpoint-copies-nothing", "a checkpoint is written of the weights that later steps change", _COPY
)
def _checkpoint_copies_nothing(
    _original: Call, _self: object, tensors: "Iterable[tuple[str, Tensor]]"
) -> "dict[str, Tensor]":
    return dict(tensors)


@patch("checkpoint", "checkpoint-in-the-way", "the steps wait until a checkpoint is on the disk", _SAVER)
def _checkpoint_in_the_way(original: Call, self: Any, *arguments: object, **options: object) -> None:
    original(self, *arguments, **options)
    self.finish()


@patch("checkpoint", "best-pruned", "the best checkpoint is pruned like any other", _PRUNE)
def _best_pruned(original: Call, run: Path, keep: int, *rest: object) -> object:
    best = original(run, keep, *rest)
    checkpoints = run / "checkpoints"
    for old in (*sorted(checkpoints.glob("step-*"))[:-keep], *checkpoints.glob("best-*")):
        shutil.rmtree(old)
    return best


@patch("checkpoint", "digest-not-checked", "digests of a checkpoint's files are not looked at", _STATE)
def _digest_not_checked(_original: Call, path: Path) -> "CheckpointState":
    from q4kd.trainer.files import read_json
    from q4kd.trainer.train.checkpoint import CheckpointState

    state = read_json(path / "state.json")
    return CheckpointState(state["step"], state["config"], state["data_sha256"], state["evaluation"])


@patch("checkpoint", "config-not-compared", "a run resumes with other settings", _DIFFERENCE)
def _config_not_compared(_original: Call, *_arguments: object) -> None:
    return


@patch("checkpoint", "resume-skips-batch", "a resumed run goes on one step too far", _RESTORE)
def _resume_skips_batch(original: Callable[..., "Progress"], run: "Run") -> "Progress":
    progress = original(run)
    progress.done += 1
    return progress


@patch("checkpoint", "resume-forgets-moments", "a resumed run starts with empty moments", _LOAD)
def _resume_forgets_moments(
    original: Call, self: "MasterWeightOptimizer", tensors: Iterable[tuple[str, "Tensor"]]
) -> None:
    original(self, [pair for pair in tensors if pair[0].endswith(("|step", "|master"))])
    for master in self.masters.values():
        state = self.inner.state[master]
        for key in ("exp_avg", "exp_avg_sq"):
            state.setdefault(key, master.detach() * 0)


@patch(
    "checkpoint",
    "resume-forgets-device-random",
    "a resumed run goes on with the random numbers of a new one",
    _OWN_STATE,
)
def _resume_forgets_device_random(original: Call, states: object, accelerator: Any) -> object:
    own: Any = original(states, accelerator)
    if len(own) > 1000:  # the generator of the CPU; a GPU's has a seed and an offset
        return own
    import torch

    return torch.cuda.get_rng_state(accelerator.device)


# --- the plan ---


@fault("memory", "plan-forgets-optimizer", "the plan counts no moments", _MOMENTS)
def _plan_forgets_optimizer() -> None:
    # One moment alone is a sixth of the peak, which the bound of 15 % sees or not, by the plan's own error.
    replace(_MOMENTS, lambda original: dict.fromkeys(original, 0.0))


@patch("memory", "plan-forgets-activations", "the plan counts no activations", _ACTIVATIONS)
def _plan_forgets_activations(_original: Call, _config: object, _student: object) -> tuple[int, str]:
    return 0, "forgotten"
