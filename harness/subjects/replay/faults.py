"""Faults that a single step on one document does not show: in loop, optimiser, evaluations, and what a run leaves."""

import dataclasses
import functools
import types
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from q4kd.harness.runs.faults import Call, declare, fault, patch, replace

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from q4kd.trainer.config.settings import DistillConfig
    from q4kd.trainer.data.batch import Batch, BatchFacts
    from q4kd.trainer.train.optimizer import MasterWeightOptimizer

_BATCH_FACTS = "q4kd.trainer.data.batch:Batch._read"
_FORWARD = "q4kd.trainer.student.model:DistillationModel.forward"
_SIGNAL = "q4kd.trainer.teacher.teacher:Teacher.signal"
_EVALUATE = "q4kd.trainer.train.evaluate:evaluate"
_SUMS = "q4kd.trainer.train.evaluate:_sums"
_STEP = "q4kd.trainer.train.step:train_step"
_RATE = "q4kd.trainer.train.step:learning_rate"
_LOSS = "q4kd.trainer.loss.fused:kd_loss"
_LOSS_SETTINGS = "q4kd.trainer.config.settings:DistillConfig.loss"
_SETTINGS = "q4kd.trainer.config.settings:make_config"
_ADAPT = "q4kd.trainer.student.lora:add_adapters"
_OPTIMIZER = "q4kd.trainer.train.optimizer:MasterWeightOptimizer"
_MAKE = "q4kd.trainer.train.optimizer:make_optimizer"
_RESTORE = "q4kd.trainer.train.checkpoint:restore_checkpoint"
_SIGN = "q4kd.trainer.train.kept_checkpoints:_SIGN"
_STATE = "q4kd.trainer.train.distributed:whole_state"
_HELD_OUT = "q4kd.trainer.train.run.assembly:Run.held_out_batches"


# --- documents and labels ---


def _without_starts(batch: "Batch") -> "Batch":
    return dataclasses.replace(batch, starts_BT=None, known=batch.facts)


@patch("loop", "signal-without-starts", "in training the teacher is not told where documents begin", _SIGNAL)
def _signal_without_starts(original: Call, self: object, batch: "Batch") -> object:
    return original(self, _without_starts(batch))


@patch("loop", "step-without-starts", "in training the student is not told where documents begin", _FORWARD)
def _step_without_starts(
    original: Call, self: object, *arguments: object, use: object = None, **options: Any
) -> object:
    # Evaluations and the check before the first step, which ``use`` the hidden states, are left as they are.
    if use is None:
        arguments = (*arguments[:4], None)
    return original(self, *arguments, use=use, **options)


@patch("loop", "evaluation-without-starts", "evaluation drops the beginnings of documents", _EVALUATE)
def _evaluation_without_starts(
    original: Call, accelerator: object, model: object, teacher: object, batches: Iterable["Batch"]
) -> object:
    return original(accelerator, model, teacher, map(_without_starts, batches))


@patch("loss", "divided-by-positions", "the loss is divided by all positions, masked ones too", _BATCH_FACTS)
def _divided_by_positions(original: Callable[..., "BatchFacts"], self: "Batch") -> "BatchFacts":
    return dataclasses.replace(original(self), step_targets=self.labels_BT.numel())


@fault("loop", "mean-of-means", "a step is the mean of its micro-batches' means over their own labels", _STEP, _LOSS)
def _mean_of_means() -> None:
    parts = 1

    def make_step(original: Call) -> Call:
        def step(*arguments: Any) -> object:
            nonlocal parts
            batch, config = arguments[4:6]
            parts = len(batch) // config.batch_size
            return original(*arguments)

        return step

    def make_loss(original: Call) -> Call:
        def loss(hidden: object, weight: object, labels: "Tensor", **options: object) -> object:
            own = max(1, int((labels >= 0).sum()) * parts)
            return original(hidden, weight, labels, **{**options, "num_targets": own})

        return loss

    replace(_STEP, make_step)
    replace(_LOSS, make_loss)


# --- settings that do not reach the run ---


def _ignore(setting: str) -> None:
    def make(original: Call) -> Call:
        return lambda values: original({key: value for key, value in values.items() if key != setting})

    replace(_SETTINGS, make)


for _setting in (
    "seed", "epochs", "beta2", "eps", "lora_alpha", "lora_dropout", "lora_targets", "keep", "checkpoint_every",
    "best_resumable",
):  # fmt: skip
    _title = f"the setting {_setting} is read and not used"
    declare("loop", f"{_setting}-ignored", _title, functools.partial(_ignore, _setting), _SETTINGS)


@patch("loop", "lora_rank-doubled", "adapters have twice the rank of the settings", _ADAPT)
def _lora_rank_doubled(original: Call, student: object, config: "DistillConfig") -> object:
    return original(student, dataclasses.replace(config, lora_rank=2 * config.lora_rank))


def _settle(setting: str, value: object) -> None:
    """Let the loss be that of one value, whatever the settings say."""

    def make(original: property) -> property:
        def loss(self: "DistillConfig") -> object:
            assert original.fget is not None
            return dataclasses.replace(original.fget(self), **{setting: value})

        return property(loss)

    replace(_LOSS_SETTINGS, make)


for _setting, _value in (("divergence", "forward_kl"), ("beta", 0.5)):
    _title = f"the loss has {_setting} {_value} whatever the settings say"
    declare("loss", f"{_setting}-not-passed", _title, functools.partial(_settle, _setting, _value), _LOSS_SETTINGS)


# --- schedule and optimiser ---


@patch("loop", "warm-up-from-zero", "warm-up begins one step late, at a rate of zero", _RATE)
def _warm_up_from_zero(original: Callable[..., float], step: int, config: "DistillConfig", total: int) -> float:
    return config.lr * step / config.warmup_steps if step < config.warmup_steps else original(step, config, total)


@fault("loop", "one-group-scheduled", "norms and biases stay at the peak rate", f"{_OPTIMIZER}.param_groups")
def _one_group_scheduled() -> None:
    def make(original: property) -> property:
        assert original.fget is not None
        read = original.fget
        return property(lambda self: read(self)[:1])

    replace(f"{_OPTIMIZER}.param_groups", make)


@patch("loop", "everything-decays", "weight decay reaches norms and biases", _MAKE)
def _everything_decays(
    original: Callable[..., "MasterWeightOptimizer"], config: "DistillConfig", *rest: object
) -> "MasterWeightOptimizer":
    optimizer = original(config, *rest)
    for group in optimizer.inner.param_groups:
        group["weight_decay"] = config.weight_decay
    return optimizer


@patch("loop", "moments-not-corrected", "AdamW does not correct the bias of its moments", _MAKE)
def _moments_not_corrected(original: Callable[..., "MasterWeightOptimizer"], *rest: object) -> "MasterWeightOptimizer":
    import torch

    optimizer = original(*rest)
    for master in optimizer.masters.values():
        # After so many steps the corrections are one.
        kept = {name: torch.zeros_like(master) for name in ("exp_avg", "exp_avg_sq")}
        optimizer.inner.state[master] = {"step": torch.tensor(1e6), **kept}
    return optimizer


@patch("loop", "norm-without-clip", "the norm of the gradient is reported and nothing is clipped", f"{_OPTIMIZER}.clip")
def _norm_without_clip(original: Call, self: object, _limit: float) -> object:
    return original(self, 1e9)


# --- modes, random states and what a checkpoint holds ---


@patch("loop", "trained-in-evaluation-mode", "the student is left in evaluation mode: nothing drops out", _STEP)
def _trained_in_evaluation_mode(original: Call, accelerator: object, model: Any, *rest: object) -> object:
    model.eval()
    return original(accelerator, model, *rest)


@patch("checkpoint", "random-states-kept", "a resumed run does not take over the random states", _RESTORE)
def _random_states_kept(original: Call, *arguments: object) -> None:
    import torch

    own = torch.get_rng_state()
    original(*arguments)
    torch.set_rng_state(own)


@patch("checkpoint", "masters-not-saved", "checkpoints hold no master weights", f"{_OPTIMIZER}.tensors")
def _masters_not_saved(original: Callable[..., Iterable[tuple[str, object]]], self: object) -> object:
    return (pair for pair in original(self) if not pair[0].endswith("|master"))


@fault("checkpoint", "masters-not-loaded", "a resumed run begins with masters rounded to its weights", _RESTORE)
def _masters_not_loaded() -> None:
    def make(original: Call) -> Call:
        def restore(path: "Path", model: object, optimizer: "MasterWeightOptimizer", *rest: object) -> None:
            original(path, model, optimizer, *rest)
            for name, parameter in optimizer.parameters.items():
                optimizer.masters[name].data.copy_(parameter.data)

        return restore

    replace(_RESTORE, make)


@fault("checkpoint", "best-is-lowest", "the best checkpoint by agreement is that of the lowest", _SIGN)
def _best_is_lowest() -> None:
    replace(_SIGN, lambda original: {**original, "agreement": 1})


@patch("checkpoint", "model-rounded", "the written model is rounded to bfloat16", _STATE)
def _model_rounded(original: Callable[..., Mapping[str, "Tensor"]], *arguments: object) -> dict[str, "Tensor"]:
    return {name: value.bfloat16() for name, value in original(*arguments).items()}


# --- evaluation ---


@patch("vocabulary", "evaluated-last-columns", "evaluation keeps the teacher's last columns", _SUMS)
def _evaluated_last_columns(original: Call, hidden: object, head: Any, *, teacher: Any, **options: object) -> object:
    cut = types.SimpleNamespace(head_logits=lambda rows: teacher.head_logits(rows)[:, -len(head.weight) :])
    return original(hidden, head, teacher=cut, **options)


@patch("loop", "held-out-cut-short", "evaluation leaves out the last batch", _HELD_OUT)
def _held_out_cut_short(original: Callable[..., Iterable[object]], self: object) -> list[object]:
    return list(original(self))[:-1]
