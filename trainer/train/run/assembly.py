"""Everything a run needs, assembled before its first step."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from q4kd.trainer import wall
from q4kd.trainer.config.settings import DistillConfig
from q4kd.trainer.data.batch import Batch
from q4kd.trainer.data.training_data import TrainingData
from q4kd.trainer.device.placement import TeacherPlacement
from q4kd.trainer.errors import InputError
from q4kd.trainer.events import EventLog
from q4kd.trainer.loss.config import IGNORE_INDEX, LastStep
from q4kd.trainer.student.experts import StudentExperts, find_experts
from q4kd.trainer.student.lora import add_adapters
from q4kd.trainer.student.model import (
    DistillationModel,
    load_student,
    set_up_student,
    student_dtype,
)
from q4kd.trainer.teacher.teacher import load_teacher
from q4kd.trainer.train.checkpoint import explain_difference, list_checkpoints, read_state, restore_checkpoint
from q4kd.trainer.train.distributed import (
    describe_processes,
    make_accelerator,
    prepare_model,
    reshard,
    will_shard,
)
from q4kd.trainer.train.guards import check_labels, check_rows
from q4kd.trainer.train.optimizer import MasterWeightOptimizer, make_optimizer
from q4kd.trainer.train.run.identity import InputDigests, explain_other_input
from q4kd.trainer.train.run.source import OnlineSource, RunSource, open_cached
from q4kd.trainer.train.run.state import Progress
from q4kd.trainer.train.run.text_reading import reading_texts
from q4kd.trainer.train.run.tracking import project_options, start_trackers

# Settings that may change when a run is resumed: they steer reporting and this leg's length, not the losses. (Weights
# come from the checkpoint; whether the folder has some is checked against from_scratch in every leg.)
RESUMABLE = frozenset((
    "out", "log_every", "max_steps", "eval_every", "eval_tokens", "checkpoint_every", "keep", "best_metric",
    "best_resumable", "trackers", "hang_s", "from_scratch",
))  # fmt: skip
# The product of these is the number of sequences of a step. Other factors make the same steps to rounding.
SPLIT = ("batch_size", "accumulation", "processes")


@dataclass(frozen=True)
class Run:
    """What a run is made of, assembled before its first step. ``Progress`` says how far it is.

    Attributes:
        accelerator: ``accelerate.Accelerator`` of this process.
        model: prepared ``DistillationModel``.
        adapted: peft's model around the student; None when every weight is trained.
        tokenizer: tokenizer of the student.
        source: what the student learns from.
        digests: which files teacher and student are.
        total_steps: steps of the full run.
        last_step: the step at which it ends; a smoke run ends earlier than the full one.
        copies_checkpoints: whether the host has room for a copy of the state, so that steps need not wait for its
            writing.
        experts: the student's; None for one without.
    """

    config: DistillConfig
    accelerator: Any
    model: Any
    optimizer: MasterWeightOptimizer
    adapted: Any
    tokenizer: Any
    source: RunSource
    data: TrainingData
    events: EventLog
    digests: InputDigests
    total_steps: int
    last_step: int
    copies_checkpoints: bool = True
    experts: StudentExperts | None = None

    @property
    def unwrapped(self) -> DistillationModel:
        """The student with its loss, without data-parallel wrappers."""
        model: DistillationModel = self.accelerator.unwrap_model(self.model)
        return model

    @property
    def is_main(self) -> bool:
        """Return whether this is the process that writes files and the log."""
        return bool(self.accelerator.is_main_process)

    @property
    def tokens_per_step(self) -> int:
        """Targets of one optimiser step, over all processes."""
        return self.config.seq_len * self.data.order.sequences_per_step

    @property
    def settings(self) -> dict[str, Any]:
        """What a resumed run must repeat: config, number of processes that share a batch, and its inputs."""
        shared = {"processes": self.accelerator.num_processes, **self.source.settings()}
        return {**self.config.to_json(), **shared, **self.inputs}

    @property
    def inputs(self) -> dict[str, str]:
        """The digests of teacher, student and held-out data, each by its name in a checkpoint's settings.

        The digest of the training data has a place of its own there. A stream's held-out tokens are as many as
        ``eval_tokens`` asks for, which may change.
        """
        held_out = self.data.held_out.tokens.sha256
        is_bound = self.config.held_out is not None or not self.config.streaming
        return {**self.digests.as_settings(), **({"held_out_sha256": held_out} if is_bound else {})}

    def batch(self, step: int) -> Batch:
        """Return this process's share of a step's batch, on its device."""
        everything = self.data.order.batch(step)
        share = everything[slice(self.accelerator.process_index, None, self.accelerator.num_processes)]
        return share.to(self.accelerator.device)

    def held_out_batches(self) -> Iterator[Batch]:
        """Yield this process's share of the held-out windows, on its device: equally many batches in every process."""
        held_out, config, processes = self.data.held_out, self.config, self.accelerator.num_processes
        windows = min(len(held_out), config.eval_tokens // config.seq_len)
        for start in range(0, windows, config.batch_size * processes):
            mine = range(start + self.accelerator.process_index, start + config.batch_size * processes, processes)
            chosen = [index for index in mine if index < windows]
            batch = Batch.stack([held_out[index] for index in chosen or [start]])
            if not chosen:  # This process still takes part, with a window that has no labels.
                batch = dataclasses.replace(batch, labels_BT=torch.full_like(batch.labels_BT, IGNORE_INDEX))
            yield batch.to(self.accelerator.device)


def assemble(
    config: DistillConfig,
    placement: TeacherPlacement | None,
    events: EventLog,
    is_main: bool,
    digests: InputDigests,
    rows: int,
) -> Run:
    """Load teacher, student and data, and prepare the student for this process.

    Tokenizer, vocabulary and data are read while the student is loaded.

    Args:
        config: settings of the run.
        placement: what was decided about the teacher; None for a run that reads a cache.
        events: receives what is loaded.
        is_main: whether this process says so, too.
        digests: of teacher and student.
        rows: rows of the student's head, as the run was planned.

    Raises:
        InputError: for whatever cannot be used, or does not fit together.
    """
    announce: Callable[[str], None] = functools.partial(print, flush=True) if is_main else lambda _line: None
    # The accelerator comes first, because it chooses this process's GPU among several.
    with wall.phase("load", "processes joined"):
        accelerator = make_accelerator(config.device, **project_options(config))
        announce(describe_processes(accelerator))
    with wall.phase("load", "teacher loaded"):
        # It comes before tokenizer, data and student, so that what is said of memory then is the teacher's.
        online = None if placement is None else OnlineSource(load_teacher(placement, events=events, announce=announce))
    sequences = config.batch_size * config.accumulation * accelerator.num_processes
    with reading_texts(config, online, rows, sequences) as texts:
        with wall.phase("load", "student loaded"):
            student: Any = load_student(config.student, config.seed, student_dtype(config))
            check_rows(config.student, student, rows)
        if config.from_scratch:
            announce(f"student: fresh weights, drawn from seed {config.seed}")
        with wall.phase("load", "tokenizer and vocabulary waited for"):
            tokenizer = texts.tokenizer()
            if said := texts.vocabulary():
                announce(said)
        with wall.phase("load", "data waited for"):
            data = texts.data()
    with wall.phase("load", "student prepared"):
        check_labels(data.order, config.data)
        source = online or open_cached(config, data, tokenizer, rows, announce)
        total = config.steps or max(1, math.ceil(config.epochs * data.order.steps_per_epoch))
        start_trackers(accelerator, config, events)
        model, optimizer, adapted = prepare_student(config, accelerator, student)
    last_step = accelerator.unwrap_model(model).config.last_step
    if last_step != LastStep():
        announce(f"student: its logits are {last_step}, z its head's products")
    experts = find_experts(student, adapted=adapted is not None)
    if experts is not None:
        events.emit("student_experts", **vars(experts))
        announce(experts.describe())
    return Run(
        config=config,
        accelerator=accelerator,
        model=model,
        optimizer=optimizer,
        adapted=adapted,
        tokenizer=tokenizer,
        source=source,
        data=data,
        events=events,
        digests=digests,
        total_steps=total,
        last_step=min(total, config.max_steps or total),
        experts=experts,
    )


def prepare_student(
    config: DistillConfig, accelerator: Any, student: nn.Module
) -> tuple[Any, MasterWeightOptimizer, Any]:
    """Return the model that gives the loss, wrapped for several processes, its optimizer, and peft's model with LoRA.

    Raises:
        InputError: for a setting that this student or this machine cannot follow.
    """
    if not will_shard(accelerator):  # What is compared before the first step runs where the steps will.
        student.to(accelerator.device)
    distillation = DistillationModel(student, config.loss)
    set_up_student(student, config)
    adapted = add_adapters(student, config) if config.lora_rank else None
    model = prepare_model(accelerator, distillation)
    # The weights are drawn or loaded by now; from here on each process draws dropout of its own.
    torch.manual_seed(config.seed + accelerator.process_index)
    return model, make_optimizer(config, accelerator.unwrap_model(model).student.named_parameters()), adapted


def restore(run: Run) -> Progress:
    """Continue from the newest checkpoint of a run with the same settings and inputs; return how far it was.

    The sequences of a step may be spread over another number of processes or micro-batches.

    Raises:
        InputError: when settings, teacher, student or data differ, or the checkpoint is damaged.
    """
    path = list_checkpoints(run.config.out)[-1]
    state = read_state(path)
    is_same = _sequences_per_step(state.config) == _sequences_per_step(run.settings)
    inputs = run.inputs
    difference = explain_difference(state.config, run.settings, RESUMABLE.union(inputs, SPLIT if is_same else ()))
    if difference or state.data_sha256 != run.data.sha256:
        expected, got = "the settings and data of that run", difference or "other training data"
        remedy = "repeat its settings, or start a new run in another folder"
        raise InputError(f"--resume from {path}", expected=expected, got=got, remedy=remedy)
    if other := explain_other_input(path, state.config, inputs):
        raise other
    # Tensors are loaded into shards: a weight that is still whole would be dropped for its old shard.
    reshard(run.model)
    restore_checkpoint(path, run.unwrapped.student, run.optimizer, run.accelerator)
    run.events.emit("resumed", step=state.step, checkpoint=path.name)
    if run.is_main:
        print(f"Resumed from {path.name}", flush=True)
    return Progress(done=state.step, is_evaluated=state.evaluation is not None)


def _sequences_per_step(settings: Mapping[str, Any]) -> int | None:
    numbers = [settings.get(name) for name in SPLIT]
    return math.prod(numbers) if all(type(number) is int for number in numbers) else None  # type: ignore[arg-type]
