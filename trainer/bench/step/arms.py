"""The arms of ``q4kd bench step`` that are q4kd's own: the whole step, the teacher alone, the student alone."""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from q4kd.trainer.bench.device_probes import synchronise, wall_seconds
from q4kd.trainer.bench.interleave import Ids
from q4kd.trainer.config.settings import DistillConfig
from q4kd.trainer.data.batch import Batch
from q4kd.trainer.teacher.teacher import Teacher
from q4kd.trainer.train.step import StepResult, train_step

HEAD_TOKENS = 1024
MakeEngine = Callable[[DistillConfig], tuple[Any, Any, Any]]


class TrainArm:
    """Whole optimiser steps by ``train_step``.

    Args:
        name: name in the table.
        config: settings of the step; ``alpha`` = 1 takes it without the teacher.
        load: loads the packed teacher, or returns it when it is loaded: the first arm to be prepared counts its bytes.
        make_engine: returns ``(accelerator, prepared model, prepared optimizer)`` for the config.
    """

    def __init__(self, name: str, config: DistillConfig, load: Callable[[], Teacher], make_engine: MakeEngine) -> None:
        self.name, self._config, self._load, self._make_engine = name, config, load, make_engine
        self.results: list[StepResult] = []
        self.data_seconds: list[float] = []  # seconds to make each step's batch on the device

    def prepare(self) -> dict[str, Any]:
        """Load the teacher, then build the student and its optimiser."""
        self._teacher = self._load()
        self._accelerator, self._model, self._optimizer = self._make_engine(self._config)
        self._model.train()
        parameters = list(self._model.parameters())
        return {
            "parameters": sum(parameter.numel() for parameter in parameters),
            "dtype": str(parameters[0].dtype),
            "gradient_checkpointing": self._config.gradient_checkpointing,
            "student_kernels": self._config.student_kernels,
            "loss_mode": self._config.loss_mode,
        }

    def run(self, ids_BT: Ids, save: Path | None = None) -> float:
        """Take one step on int64 windows ``[B, T + 1]`` and return its seconds, those of its batch left out."""
        began = time.perf_counter()
        batch = Batch.from_windows(ids_BT).to(self._accelerator.device)
        teacher = None if self._config.alpha == 1 else self._teacher
        synchronise(self._accelerator.device)
        self.data_seconds.append(time.perf_counter() - began)

        def step() -> None:
            parts = self._accelerator, self._model, teacher, self._optimizer
            self.results.append(train_step(*parts, batch, self._config, self._config.lr))

        return wall_seconds(step, self._accelerator.device)

    def close(self) -> None:
        """Drop student and optimiser."""
        for name in ("_accelerator", "_model", "_optimizer", "_teacher"):
            self.__dict__.pop(name, None)


class TeacherArm:
    """The teacher's forward with the logits of every position, dropped chunk by chunk."""

    def __init__(self, load: Callable[[], Teacher], device: torch.device) -> None:
        self.name, self._load, self._device = "teacher", load, device

    def prepare(self) -> dict[str, Any]:
        """Load the teacher and say how it is held."""
        self._teacher = self._load()
        held = self._teacher.residency()
        return {"resident_bytes": sum(held.resident_bytes.values()), "dtype": self._teacher.dtype}

    def run(self, ids_BT: Ids, save: Path | None = None) -> float:
        """Run one pass over the inputs of int64 windows ``[B, T + 1]`` and return its seconds."""
        ids = torch.from_numpy(ids_BT[:, :-1]).to(self._device)

        def forward() -> None:
            hidden_MH = self._teacher.hidden(ids).flatten(0, 1)
            for chunk_MH in torch.split(hidden_MH, HEAD_TOKENS):
                self._teacher.head_logits(chunk_MH)

        return wall_seconds(forward, self._device)

    def close(self) -> None:
        """Leave the teacher to the arm that trains with it."""


def make_arms(
    config: DistillConfig, load: Callable[[], Teacher], device: torch.device, make_engine: MakeEngine
) -> tuple[TrainArm, TeacherArm, TrainArm]:
    """Return the whole step, the teacher and the student alone."""
    return (
        TrainArm("q4kd", config, load, make_engine),
        TeacherArm(load, device),
        TrainArm("ce", replace(config, alpha=1.0), load, make_engine),
    )
