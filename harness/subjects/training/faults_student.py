"""Faults in how the student is trained: precision, adapters, accumulation, several processes, settings."""

import dataclasses
import types
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from q4kd.harness.runs.faults import Call, patch
from q4kd.harness.subjects.training.probes import LENGTH, SEQUENCES

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import Tensor, nn

    from q4kd.trainer.config.settings import DistillConfig
    from q4kd.trainer.data.batch import Batch
    from q4kd.trainer.train.optimizer import MasterWeightOptimizer
    from q4kd.trainer.train.run.assembly import Run

_OPTIMIZER = "q4kd.trainer.train.optimizer:MasterWeightOptimizer.step"
_LOSS = "q4kd.trainer.loss.fused:kd_loss"
_SET_UP = "q4kd.trainer.student.model:set_up_student"
_ADAPT = "q4kd.trainer.student.lora:add_adapters"
_MERGE = "q4kd.trainer.student.lora:merged_state"
_BATCH = "q4kd.trainer.train.run.assembly:Run.batch"
_PREPARE = "q4kd.trainer.train.distributed:prepare_model"
_LAST_STEP = "q4kd.trainer.student.logits:find_last_step"
_SLOPE = "q4kd.trainer.loss.last_step:slope_of"
_FOLDER = "q4kd.trainer.student.folder:check_folder"
_LOADED = "q4kd.trainer.student.loaded:check_loaded"
_OTHERS = "q4kd.trainer.student.folder:_looks_like_weights"
_WINDOW = "q4kd.trainer.student.packing:sliding_window"
_LAYER_TYPES = "q4kd.trainer.student.packing:has_layer_types"
_CONFIG = "q4kd.trainer.config.settings:make_config"
_RANKS = (None, "copies", "shards")
_State = Mapping[str, "Tensor"]


@patch("loop", "masters-rounded", "master weights are rounded to the weights' dtype after every step", _OPTIMIZER)
def _masters_rounded(original: Call, self: "MasterWeightOptimizer") -> None:
    original(self)
    for name, parameter in self.parameters.items():
        self.masters[name].data.copy_(self.masters[name].data.to(parameter.dtype))


@patch(
    "loop", "masters-not-copied", "masters move, the bfloat16 weights that the student multiplies by do not", _OPTIMIZER
)
def _masters_not_copied(original: Call, self: "MasterWeightOptimizer") -> None:
    rounded = {name: value for name, value in self.parameters.items() if value.dtype != self.masters[name].dtype}
    kept = {name: value.detach().clone() for name, value in rounded.items()}
    original(self)
    for name, value in kept.items():
        rounded[name].data.copy_(value)


@patch(
    "loop",
    "normalised-by-micro-batch",
    "each micro-batch is a mean over its own labels, and the step a mean of these means",
    _LOSS,
)
def _normalised_by_micro_batch(
    original: Call, hidden: object, weight: object, labels: "Tensor", **options: object
) -> object:
    parts = SEQUENCES * LENGTH / len(labels)
    return original(hidden, weight, labels, **{**options, "num_targets": int((labels >= 0).sum()) * parts})


@patch("loop", "recomputed-without-gradient", "layers whose activations are recomputed get no gradient", _SET_UP)
def _recomputed_without_gradient(original: Call, student: Any, config: "DistillConfig") -> None:
    original(student, config)
    if config.gradient_checkpointing:  # reentrant checkpointing does this where its input needs no gradient
        student.base_model.layers.requires_grad_(False)


@patch("loop", "base-trained", "the weights under the adapters are trained too", _ADAPT)
def _base_trained(original: Call, student: "nn.Module", config: object) -> object:
    adapted = original(student, config)
    student.requires_grad_(True)
    return adapted


@patch(
    "checkpoint",
    "adapters-merged-twice",
    "the adapters' update is added twice to the weights of the final model",
    _MERGE,
)
def _adapters_merged_twice(original: Callable[[object, _State], _State], adapted: object, state: _State) -> _State:
    once = original(adapted, state)
    plain = {name.replace(".base_layer.", "."): value for name, value in state.items()}
    return {name: 2 * value - plain[name] for name, value in once.items()}


@patch("loop", "ranks-share-a-batch", "every process takes the first process's share of a batch", _BATCH, arms=_RANKS)
def _ranks_share_a_batch(original: Call, self: "Run", step: int) -> object:
    real = self.accelerator
    first = types.SimpleNamespace(process_index=0, num_processes=real.num_processes, device=real.device)
    return original(dataclasses.replace(self, accelerator=first), step)


@patch(
    "loop",
    "normalised-by-rank",
    "each process takes the mean over its own labels, and the step is the mean of these means",
    _BATCH,
    arms=_RANKS,
)
def _normalised_by_rank(original: Callable[..., "Batch"], self: "Run", step: int) -> "Batch":
    share = original(self, step)
    facts = dataclasses.replace(share.facts, step_targets=share.num_targets * self.accelerator.num_processes)
    return type(share)(share.ids_BT, share.labels_BT, share.starts_BT, share.windows_B, known=facts)


@patch(
    "loop", "ranks-train-alone", "the student is not wrapped: gradients stay in their process", _PREPARE, arms=_RANKS
)
def _ranks_train_alone(_original: Call, accelerator: "Accelerator", model: "nn.Module") -> object:
    # On GPUs the wrapper that is left out is also what moves the student to the process's own.
    return model.to(accelerator.device)


@patch("dispatch", "unknown-settings-ignored", "settings that do not exist are dropped in silence", _CONFIG)
def _unknown_settings_ignored(original: Call, values: Mapping[str, object]) -> object:
    from q4kd.trainer.config.settings import DistillConfig

    known = {setting.name for setting in dataclasses.fields(DistillConfig)}
    return original({key: value for key, value in values.items() if key in known})


@patch("loss", "last-step-left-out", "a student's scale or cap after its head is left out of the loss", _LAST_STEP)
def _last_step_left_out(_original: Call, _student: object, _hidden_of: object) -> object:
    from q4kd.trainer.loss.config import LastStep

    return LastStep()


@patch("loss", "last-step-not-chained", "the gradient is passed on as if logits were the head's products", _SLOPE)
def _last_step_not_chained(_original: Call, *_arguments: object, **_options: object) -> float:
    return 1.0


@patch("loop", "weights-not-asked-for", "a student without weights starts from its seed, unasked", _FOLDER)
def _weights_not_asked_for(original: Call, folder: object, **_options: object) -> object:
    return original(folder)


@patch("loop", "loaded-not-checked", "a student is taken whatever tensors it did not get", _LOADED)
def _loaded_not_checked(_original: Call, _folder: object, _info: object) -> None:
    pass


@patch("loop", "other-weights-overlooked", "weights under other names are taken for none", _OTHERS)
def _other_weights_overlooked(_original: Call, _name: object) -> bool:
    return False


@patch("loop", "window-left-out", "the mask of packed documents takes the place of a sliding window", _WINDOW)
def _window_left_out(_original: Call, _config: object) -> None:
    return None


@patch("loop", "windows-on-every-layer", "a window of some layers is put into the mask of all of them", _LAYER_TYPES)
def _windows_on_every_layer(_original: Call, _config: object) -> bool:
    return False


@patch("checkpoint", "transposed-merged-untransposed", "square transposed layers get the update of plain ones", _MERGE)
def _transposed_merged_untransposed(
    original: Callable[[object, _State], _State], adapted: object, state: _State
) -> _State:
    merged = original(adapted, state)
    plain = {name.replace(".base_layer.", "."): value for name, value in state.items()}

    def update(name: str) -> "Tensor":
        moved = merged[name] - plain[name]
        is_square = moved.ndim == 2 and moved.shape[0] == moved.shape[1]
        return plain[name] + (moved.T if is_square else moved)

    return {name: update(name) for name in merged}
