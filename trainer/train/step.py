"""One optimiser step: the teacher's signal, student forward with the fused loss, backward, clip, update."""

import contextlib
import math
import time
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from q4kd.trainer.config.settings import DistillConfig
from q4kd.trainer.data.batch import Batch
from q4kd.trainer.errors import NotFiniteError
from q4kd.trainer.loss.signal import TeacherSignal
from q4kd.trainer.student.step_clock import StepClock
from q4kd.trainer.train.distributed import without_sync


class SignalSource(Protocol):
    """A source of signals: ``Teacher`` computes them, ``CachedTeacher`` reads them."""

    def signal(self, batch: Batch) -> TeacherSignal:
        """Return the signal of every position of a batch, on the batch's device."""


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What one step did. Losses are means over the step's targets; times are seconds of the device's work.

    The fused loss makes its gradients in the forward pass, so ``loss_s`` holds both heads and ``student_s`` the
    student's forward and backward.
    """

    loss: float
    ce: float
    kd: float
    grad_norm: float
    lr: float
    tokens: int
    seconds: float
    teacher_s: float
    student_s: float
    loss_s: float
    optimizer_s: float


def learning_rate(step: int, config: DistillConfig, total_steps: int) -> float:
    """Return the rate of a step, counted from 0: linear warm-up to ``lr``, then the schedule.

    cosine and linear fall to zero at ``total_steps``; constant stays at ``lr``.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    progress = min(1.0, (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps))
    if config.schedule == "cosine":
        return config.lr * 0.5 * (1 + math.cos(math.pi * progress))
    return config.lr * (1 - progress) if config.schedule == "linear" else config.lr


def train_step(
    accelerator: Any,
    model: Any,
    teacher: SignalSource | None,
    optimizer: Any,
    batch: Batch,
    config: DistillConfig,
    lr: float,
) -> StepResult:
    """Take one step on ``batch``, this process's share of ``accumulation * batch_size`` sequences.

    The host queues the device's work and waits for it once, before the update, whatever the number of micro-batches;
    what it must know of them earlier, it has found in ``batch.facts``. On CUDA ``optimizer_s`` is therefore the time of
    the update before this one, which that wait has seen to its end (see ``StepClock``).

    Args:
        accelerator: ``accelerate.Accelerator``.
        model: prepared ``DistillationModel``.
        teacher: online or cached; None for a cross-entropy-only step.
        optimizer: ``MasterWeightOptimizer`` of the model's parameters.
        batch: on the accelerator's device; one of several processes has cut its own from the batch of the whole step.
        config: settings of the run.
        lr: learning rate of this step.

    Raises:
        NotFiniteError: when loss or gradient norm is not finite; the update is not made.
    """
    started = time.monotonic()
    distillation = accelerator.unwrap_model(model)
    clock = distillation.clock = StepClock(batch.ids_BT.device, distillation.clock)
    clock.start()
    # A step may have no label, since a long prompt can fill it; its loss and gradients are then zero.
    divisor = max(1, batch.facts.step_targets)
    sums = torch.zeros(3, dtype=torch.float64, device=batch.ids_BT.device)
    for group in optimizer.param_groups:
        group["lr"] = lr
    micro_batches = list(batch.split(config.batch_size))
    for index, part in enumerate(micro_batches):
        signal = teacher.signal(part) if teacher is not None else None
        clock.mark("teacher")
        is_last = index + 1 == len(micro_batches)
        with contextlib.nullcontext() if is_last else without_sync(model):
            positions_P = part.facts.positions_P
            terms = model(part.ids_BT, part.labels_BT, signal, divisor, part.starts_BT, positions_P=positions_P)
            # Data-parallel wrappers average gradients over processes; the loss is a sum over all their targets.
            (terms.loss * accelerator.num_processes).backward()
        clock.mark("student")
        sums += torch.stack([terms.loss.detach(), terms.ce, terms.kd])
    sums = accelerator.reduce(sums, reduction="sum")
    norm = optimizer.clip(config.clip)
    # The host waits here, once, because an update that is not finite must not be made.
    loss, ce, kd, grad_norm = torch.cat([sums, norm.double().reshape(1)]).tolist()
    terms = {"loss": loss, "ce": ce, "kd": kd, "grad_norm": grad_norm, "lr": lr}
    if not math.isfinite(loss) or not math.isfinite(grad_norm):
        raise NotFiniteError(terms)
    optimizer.step()
    optimizer.zero_grad()
    clock.mark("optimizer")
    parts = {f"{part}_s": seconds for part, seconds in clock.read().items()}
    return StepResult(**terms, **parts, tokens=batch.facts.step_targets, seconds=time.monotonic() - started)
