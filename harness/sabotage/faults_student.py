"""Faults in how the student is trained: precision, adapters, accumulation, several processes, settings."""

import dataclasses
import types
from collections.abc import Callable
from typing import Any

from q4kd.harness.probes_student import LENGTH, SEQUENCES
from q4kd.harness.sabotage.registry import declare, replace

_OPTIMIZER = "q4kd.trainer.optimizer:MasterWeightOptimizer.step"
_Function = Callable[..., Any]


def _masters_rounded() -> None:
    def make(original: _Function) -> _Function:
        def step(self: Any) -> None:
            original(self)
            for name, parameter in self.parameters.items():
                self.masters[name].data.copy_(self.masters[name].data.to(parameter.dtype))

        return step

    replace(_OPTIMIZER, make)


def _masters_not_copied() -> None:
    def make(original: _Function) -> _Function:
        def step(self: Any) -> None:
            rounded = {
                name: value for name, value in self.parameters.items() if value.dtype != self.masters[name].dtype
            }
            kept = {name: value.detach().clone() for name, value in rounded.items()}
            original(self)
            for name, value in kept.items():
                rounded[name].data.copy_(value)

        return step

    replace(_OPTIMIZER, make)


def _normalised_by_micro_batch() -> None:
    def make(original: _Function) -> _Function:
        def loss(hidden: Any, weight: Any, labels: Any, **options: Any) -> Any:
            parts = SEQUENCES * LENGTH / len(labels)
            return original(hidden, weight, labels, **{**options, "num_targets": int((labels >= 0).sum()) * parts})

        return loss

    replace("q4kd.trainer.kd_loss:kd_loss", make)


def _recomputed_without_gradient() -> None:
    """What reentrant checkpointing does where its input needs no gradient."""

    def make(original: _Function) -> _Function:
        def set_up(student: Any, config: Any) -> None:
            original(student, config)
            if config.gradient_checkpointing:
                student.base_model.layers.requires_grad_(False)

        return set_up

    replace("q4kd.trainer.student:set_up_student", make)


def _base_trained() -> None:
    def make(original: _Function) -> _Function:
        def add(student: Any, config: Any) -> Any:
            adapted = original(student, config)
            student.requires_grad_(True)
            return adapted

        return add

    replace("q4kd.trainer.lora:add_adapters", make)


def _adapters_merged_twice() -> None:
    def make(original: _Function) -> _Function:
        def merged(adapted: Any, state: Any) -> Any:
            once = original(adapted, state)
            plain = {name.replace(".base_layer.", "."): value for name, value in state.items()}
            return {name: 2 * value - plain[name] for name, value in once.items()}

        return merged

    replace("q4kd.trainer.lora:merged_state", make)


def _ranks_share_a_batch() -> None:
    def make(original: _Function) -> _Function:
        def batch(self: Any, step: int) -> Any:
            real = self.accelerator
            first = types.SimpleNamespace(process_index=0, num_processes=real.num_processes, device=real.device)
            return original(dataclasses.replace(self, accelerator=first), step)

        return batch

    replace("q4kd.trainer.run:Run.batch", make)


def _ranks_train_alone() -> None:
    replace("q4kd.trainer.sharding:prepare_model", lambda _original: lambda _accelerator, model: model)


def _unknown_settings_ignored() -> None:
    def make(original: _Function) -> _Function:
        def config(values: Any) -> Any:
            from q4kd.trainer.config import DistillConfig

            known = {setting.name for setting in dataclasses.fields(DistillConfig)}
            return original({key: value for key, value in values.items() if key in known})

        return config

    replace("q4kd.trainer.config:make_config", make)


_RANKS = (None, "copies", "shards")
declare(
    "loop",
    "masters-rounded",
    "master weights are rounded to the weights' dtype after every step",
    _masters_rounded,
    _OPTIMIZER,
)
declare(
    "loop",
    "masters-not-copied",
    "masters move, the bfloat16 weights that the student multiplies by do not",
    _masters_not_copied,
    _OPTIMIZER,
)
declare(
    "loop",
    "normalised-by-micro-batch",
    "each micro-batch is a mean over its own labels, and the step a mean of these means",
    _normalised_by_micro_batch,
    "q4kd.trainer.kd_loss:kd_loss",
)
declare(
    "loop",
    "recomputed-without-gradient",
    "layers whose activations are recomputed get no gradient",
    _recomputed_without_gradient,
    "q4kd.trainer.student:set_up_student",
)
declare(
    "loop",
    "base-trained",
    "the weights under the adapters are trained too",
    _base_trained,
    "q4kd.trainer.lora:add_adapters",
)
declare(
    "checkpoint",
    "adapters-merged-twice",
    "the adapters' update is added twice to the weights of the final model",
    _adapters_merged_twice,
    "q4kd.trainer.lora:merged_state",
)
declare(
    "loop",
    "ranks-share-a-batch",
    "every process takes the first process's share of a batch",
    _ranks_share_a_batch,
    "q4kd.trainer.run:Run.batch",
    arms=_RANKS,
)
declare(
    "loop",
    "ranks-train-alone",
    "the student is not wrapped: gradients stay in their process",
    _ranks_train_alone,
    "q4kd.trainer.sharding:prepare_model",
    arms=_RANKS,
)
declare(
    "dispatch",
    "unknown-settings-ignored",
    "settings that do not exist are dropped in silence",
    _unknown_settings_ignored,
    "q4kd.trainer.config:make_config",
)
