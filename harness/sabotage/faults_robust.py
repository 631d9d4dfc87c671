"""Faults in what protects a run: guards that do not fire, torn checkpoints, resumes that forget, plans that lie."""

import dataclasses
import os
import shutil
import time
from collections.abc import Callable
from typing import Any

from q4kd.harness.sabotage.registry import declare, replace

_CHECKPOINT = "q4kd.trainer.checkpoint"
_SAVE = f"{_CHECKPOINT}:save_checkpoint"
_PRUNE = f"{_CHECKPOINT}:prune_checkpoints"
_RESTORE = "q4kd.trainer.run:restore"
_LOAD = "q4kd.trainer.optimizer:MasterWeightOptimizer.load"
_ITEMS = "q4kd.trainer.memory_items"
_STEP = "q4kd.trainer.step:train_step"
_Call = Callable[..., Any]


# --- during the run ---


def _nan_ignored() -> None:
    """Skip an update that is not finite and go on, as mixed-precision scalers do."""

    def make(original: _Call) -> _Call:
        def step(accelerator: Any, model: Any, teacher: Any, optimizer: Any, *rest: Any) -> Any:
            from q4kd.trainer.errors import NotFiniteError
            from q4kd.trainer.step import StepResult

            try:
                return original(accelerator, model, teacher, optimizer, *rest)
            except NotFiniteError as error:
                optimizer.zero_grad()
                names = [field.name for field in dataclasses.fields(StepResult)]
                terms: dict[str, Any] = {name: error.terms.get(name, 1) for name in names}
                return StepResult(**terms)

        return step

    replace(_STEP, make)


def _aborted_step_not_kept() -> None:
    replace("q4kd.trainer.run_folder:save_step", lambda _original: lambda folder, *_rest: folder)


def _watchdog_asleep() -> None:
    replace("q4kd.trainer.hang:HangWatchdog._watch", lambda _original: lambda self: self._over.wait())


def _stacks_not_dumped() -> None:
    replace("q4kd.trainer.hang:_dump", lambda _original: lambda _file: None)


def _signal_ends_at_once() -> None:
    def make(_original: _Call) -> _Call:
        return lambda _self, number, _frame: os._exit(128 + number)

    replace("q4kd.trainer.signals:StopRequest._hear", make)


def _signal_ignored() -> None:
    replace("q4kd.trainer.signals:StopRequest.agreed", lambda _original: lambda _self, _accelerator: 0)


def _memory_not_explained() -> None:
    replace("q4kd.trainer.out_of_memory:is_out_of_memory", lambda _original: lambda _error: False)


# --- checkpoints and resume ---


def _torn_checkpoint() -> None:
    """Give a checkpoint its final name before it is complete."""

    def make(original: _Call) -> _Call:
        def save(run: Any, tensors: Any, state: Any) -> Any:
            final = run / "checkpoints" / f"step-{state.step:06d}"
            apart = original(run / ".apart", tensors, state)
            final.mkdir(parents=True, exist_ok=True)
            for path in sorted(apart.iterdir()):
                time.sleep(0.01)
                shutil.copy(path, final / path.name)
            shutil.rmtree(run / ".apart")
            return final

        return save

    replace(_SAVE, make)


def _pruned_before_written() -> None:
    def make(original: _Call) -> _Call:
        def save(run: Any, tensors: Any, state: Any) -> Any:
            shutil.rmtree(run / "checkpoints", ignore_errors=True)
            return original(run, tensors, state)

        return save

    replace(_SAVE, make)


def _best_pruned() -> None:
    def make(original: _Call) -> _Call:
        def prune(run: Any, keep: int, metric: str) -> Any:
            best = original(run, keep, metric)
            for old in sorted((run / "checkpoints").glob("step-*"))[:-keep]:
                shutil.rmtree(old)
            return best

        return prune

    replace(_PRUNE, make)


def _digest_not_checked() -> None:
    def make(_original: _Call) -> _Call:
        def read(path: Any) -> Any:
            from q4kd.trainer.checkpoint import CheckpointState
            from q4kd.trainer.files import read_json

            state = read_json(path / "state.json")
            return CheckpointState(state["step"], state["config"], state["data_sha256"], state["evaluation"])

        return read

    replace(f"{_CHECKPOINT}:read_state", make)


def _config_not_compared() -> None:
    replace(f"{_CHECKPOINT}:explain_difference", lambda _original: lambda *_arguments: None)


def _resume_skips_batch() -> None:
    def make(original: _Call) -> _Call:
        def restore(run: Any) -> Any:
            progress = original(run)
            progress.done += 1
            return progress

        return restore

    replace(_RESTORE, make)


def _resume_forgets_moments() -> None:
    def make(original: _Call) -> _Call:
        def load(self: Any, tensors: Any) -> None:
            original(self, [pair for pair in tensors if pair[0].endswith(("|step", "|master"))])
            for master in self.masters.values():
                state = self.inner.state[master]
                for key in ("exp_avg", "exp_avg_sq"):
                    state.setdefault(key, master.detach() * 0)

        return load

    replace(_LOAD, make)


# --- the plan ---


def _plan_halves_optimizer() -> None:
    replace(f"{_ITEMS}:MOMENT_BYTES", lambda original: {name: size / 2 for name, size in original.items()})


def _plan_forgets_activations() -> None:
    replace(f"{_ITEMS}:saved_activations", lambda _original: lambda _config, _student: (0, "forgotten"))


declare("loop", "nan-ignored", "a step whose loss is not finite is skipped in silence", _nan_ignored, _STEP)
declare(
    "loop",
    "aborted-step-not-kept",
    "the batch of a step that is not finite is not saved",
    _aborted_step_not_kept,
    "q4kd.trainer.run_folder:save_step",
)
declare(
    "supervision",
    "watchdog-asleep",
    "the hang watchdog never looks",
    _watchdog_asleep,
    "q4kd.trainer.hang:HangWatchdog._watch",
)
declare(
    "supervision",
    "stacks-not-dumped",
    "the hang watchdog ends the run without stacks",
    _stacks_not_dumped,
    "q4kd.trainer.hang:_dump",
)
declare(
    "supervision",
    "signal-ends-at-once",
    "a signal ends the run without a checkpoint",
    _signal_ends_at_once,
    "q4kd.trainer.signals:StopRequest._hear",
)
declare(
    "supervision",
    "signal-ignored",
    "a signal is announced and then forgotten",
    _signal_ignored,
    "q4kd.trainer.signals:StopRequest.agreed",
)
declare(
    "memory",
    "memory-not-explained",
    "an allocation that fails is an internal error",
    _memory_not_explained,
    "q4kd.trainer.out_of_memory:is_out_of_memory",
)
declare("checkpoint", "torn-checkpoint", "a checkpoint has its name before its files", _torn_checkpoint, _SAVE)
declare(
    "checkpoint",
    "pruned-before-written",
    "earlier checkpoints are removed before the next is written",
    _pruned_before_written,
    _SAVE,
)
declare("checkpoint", "best-pruned", "the best checkpoint is pruned like any other", _best_pruned, _PRUNE)
declare(
    "checkpoint",
    "digest-not-checked",
    "digests of a checkpoint's files are not looked at",
    _digest_not_checked,
    f"{_CHECKPOINT}:read_state",
)
declare(
    "checkpoint",
    "config-not-compared",
    "a run resumes with other settings",
    _config_not_compared,
    f"{_CHECKPOINT}:explain_difference",
)
declare("checkpoint", "resume-skips-batch", "a resumed run goes on one step too far", _resume_skips_batch, _RESTORE)
declare(
    "checkpoint", "resume-forgets-moments", "a resumed run starts with empty moments", _resume_forgets_moments, _LOAD
)
declare(
    "memory",
    "plan-halves-optimizer",
    "the plan counts one moment instead of two",
    _plan_halves_optimizer,
    f"{_ITEMS}:MOMENT_BYTES",
)
declare(
    "memory",
    "plan-forgets-activations",
    "the plan counts no activations",
    _plan_forgets_activations,
    f"{_ITEMS}:saved_activations",
)
