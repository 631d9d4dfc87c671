"""The student: a Hugging Face causal LM, and the module that turns its hidden states into the distillation loss."""

import contextlib
import dataclasses
import functools
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from q4kd.trainer import wall
from q4kd.trainer.config.settings import DistillConfig
from q4kd.trainer.errors import InputError
from q4kd.trainer.kernels.compile import cache_folder
from q4kd.trainer.loss.config import KDLossConfig, LastStep
from q4kd.trainer.loss.last_step import apply_last_step
from q4kd.trainer.loss.signal import LossOptions, TeacherSignal, cross_entropy
from q4kd.trainer.loss.sums import LossTerms
from q4kd.trainer.student.architecture import check_head_kind
from q4kd.trainer.student.folder import check_folder, reading_student, refuse_student
from q4kd.trainer.student.loaded import cap_attention, check_finite, check_head, check_loaded, without_report
from q4kd.trainer.student.logits import find_last_step
from q4kd.trainer.student.lora import effective_weight
from q4kd.trainer.student.packing import has_layer_types, packed_inputs, sliding_window, without_packing_search
from q4kd.trainer.student.step_clock import StepClock

_LIGER = "setting student_kernels liger"


def quiet_transformers() -> None:
    """Keep transformers' own progress bars out of this program's output."""
    from transformers.utils import logging

    quiet: Any = logging.disable_progress_bar
    quiet()


def student_dtype(config: DistillConfig) -> torch.dtype:
    """Return the dtype of the student's weights and products that the settings mean."""
    by_device = "bfloat16" if config.device == "cuda" else "float32"
    name = by_device if config.student_dtype == "auto" else config.student_dtype
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]


def load_student(folder: Path, seed: int, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Load a student, or make a fresh one from config.json and ``seed``, whose weights are then rounded to ``dtype``.

    Raises:
        InputError: when the folder is not a causal LM (see ``check_folder``), or its weights are not those of its
            config, or not numbers.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    quiet_transformers()
    is_loaded = check_folder(folder)
    with reading_student(folder), without_report():
        if is_loaded:
            load: Any = AutoModelForCausalLM.from_pretrained
            model, info = load(
                folder,
                dtype=dtype,
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
            check_loaded(folder, info)
            check_finite(folder, model)
        else:
            config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            torch.manual_seed(seed)
            make: Any = AutoModelForCausalLM.from_config
            # Weights are drawn in float32 for every dtype, so that a seed makes the same student in each. Buffers, such
            # as RoPE's frequencies, stay float32.
            model = make(config, dtype=torch.float32, trust_remote_code=False)
            for parameter in model.parameters():
                parameter.data = parameter.data.to(dtype)
        check_head(folder, model)
        cap_attention(model)
    module: nn.Module = model
    return module


def set_up_student(student: Any, config: DistillConfig) -> None:
    """Apply what the settings ask of the student's own forward and backward pass, in place.

    Raises:
        InputError: when it needs a package or a device that is not there, or the architecture does not offer it.
    """
    if config.student_kernels == "liger":
        _apply_liger(student, config.device)
    if config.gradient_checkpointing:
        if not student.supports_gradient_checkpointing:
            subject, got = "setting gradient_checkpointing", type(student).__name__
            raise InputError(subject, expected="an architecture that offers it", got=got, remedy="leave it out")
        # transformers 5 renames it.
        enable = getattr(student, "activation_checkpointing_enable", student.gradient_checkpointing_enable)
        enable({"use_reentrant": False})
    if config.compile:
        _keep_compiled_code()
        _time_compilation()
        # Compiling in place keeps the names of parameters; the loss, which is fused by hand, stays out.
        student.base_model.compile()


def _keep_compiled_code() -> None:
    """Let torch.compile keep its code in this user's private folder, where it survives a restart of the machine."""
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    folder, name = cache_folder("torch-compile"), "TORCHINDUCTOR_CACHE_DIR"
    # torch sets its own default, in the folder for temporary files, when something of it is imported.
    if folder is not None and os.environ.get(name, default_cache_dir()) == default_cache_dir():
        os.environ[name] = str(folder)


@functools.cache
def _time_compilation() -> None:
    """Count what torch.compile does in the middle of a step as compiling; once in a process."""
    from torch._dynamo.callback import callback_handler

    running = contextlib.ExitStack()

    # torch 2.6 calls without arguments.
    def begin(*_given: object) -> None:
        running.enter_context(wall.phase("compile", "the student"))

    def end(*_given: object) -> None:
        running.close()

    callback_handler.register_start_callback(begin)
    callback_handler.register_end_callback(end)


def _apply_liger(student: Any, device: str) -> None:
    if device != "cuda" or importlib.util.find_spec("liger_kernel") is None:
        got = f"device {device}" if device != "cuda" else "no liger-kernel"
        remedy = "use student_kernels torch" if device != "cuda" else "pip install 'q4kd[liger]'"
        raise InputError(_LIGER, expected="liger-kernel and device cuda", got=got, remedy=remedy)
    from liger_kernel.transformers import _apply_liger_kernel_to_instance
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    if student.config.model_type not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        expected = "an architecture that liger-kernel has kernels for"
        raise InputError(_LIGER, expected=expected, got=student.config.model_type, remedy="use student_kernels torch")
    # Only norms, SwiGLU and RoPE are Liger's: the loss is ours, and the head is multiplied in it.
    _apply_liger_kernel_to_instance(
        student, rope=True, rms_norm=True, swiglu=True, cross_entropy=False, fused_linear_cross_entropy=False
    )


def load_tokenizer(folder: Path) -> Any:
    """Load the student's tokenizer.

    Raises:
        InputError: when there is none or it names no end-of-text token.
    """
    from transformers import AutoTokenizer

    with reading_student(folder):
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    # Where its files are missing, transformers makes up a tokenizer that has only special tokens.
    files = sorted(set(tokenizer.vocab_files_names.values()))
    if not any((folder / name).is_file() for name in files):
        remedy = "copy the tokenizer's files of its model there"
        raise refuse_student(folder, f"its tokenizer: {' or '.join(files)}", "none", remedy)
    if tokenizer.eos_token_id is None:
        raise refuse_student(folder, "an end-of-text token", "none", "set eos_token in tokenizer_config.json")
    return tokenizer


def encoder(tokenizer: Any) -> Callable[[list[str]], list[list[int]]]:
    """Return a function from texts to token ids, without special tokens and without length warnings."""

    def encode(texts: list[str]) -> list[list[int]]:
        options = {"add_special_tokens": False, "return_attention_mask": False, "return_token_type_ids": False}
        ids: list[list[int]] = tokenizer(texts, verbose=False, **options)["input_ids"]
        return ids

    return encode


@dataclass(frozen=True)
class StudentHead:
    """What makes logits of a student's hidden states: its head ``[V, H]`` and the step after it."""

    weight: Tensor
    last_step: LastStep

    def logits(self, hidden_MH: Tensor) -> Tensor:
        """Return logits float32 ``[M, V]``; the product is in the weights' type."""
        return apply_last_step((hidden_MH @ self.weight.T).float(), self.last_step)


class DistillationModel(nn.Module):
    """Student plus loss in one module, so that data-parallel wrappers see a forward that returns the loss.

    The loss takes the student's last step from head to logits from the student itself (see ``logits.py``), whatever
    ``config`` says of it. The student has its weights, and neither adapters nor compiled layers yet.

    Args:
        student: a Hugging Face causal LM whose output embedding has no bias.

    Raises:
        InputError: when the output embedding has a bias, or the logits are another function of it.
    """

    def __init__(self, student: Any, config: KDLossConfig) -> None:
        super().__init__()
        self.student = student
        # The clock is told where the student ends and the loss begins; whoever times steps sets it.
        self.clock: StepClock | None = None
        self.window, self._by_kind = sliding_window(student.config), has_layer_types(student.config)
        # FSDP shards the student's own layers as units; the head stays in the root unit, whole in ``forward``.
        self._no_split_modules = getattr(student, "_no_split_modules", None)
        check_head_kind(student)
        self.config = dataclasses.replace(config, last_step=find_last_step(student, self.hidden))

    @property
    def head_weight(self) -> Tensor:
        """The student's head ``[V, H]``."""
        return effective_weight(self.student.get_output_embeddings())

    @property
    def head(self) -> StudentHead:
        """The student's head and the step after it."""
        return StudentHead(self.head_weight, self.config.last_step)

    def tie_weights(self) -> None:
        """Make head and embedding one tensor again, as the student's config says."""
        self.student.tie_weights()

    def hidden(self, ids_BT: Tensor, starts_BT: Tensor | None = None) -> Tensor:
        """Return the student's final hidden states, float ``[B, T, H]``.

        With ``starts_BT`` (int64, the first position of each position's document) no position attends to one before
        its document, nor further back than a sliding window, and positions count from its start, for students whose
        position embeddings are absolute.
        """
        packed: dict[str, Any] = {}
        if starts_BT is not None:
            packed = packed_inputs(starts_BT, self.head_weight.dtype, self.window, by_kind=self._by_kind)
        with without_packing_search() if starts_BT is None else contextlib.nullcontext():
            outputs = self.student.base_model(input_ids=ids_BT, use_cache=False, **packed)
        hidden: Tensor = outputs.last_hidden_state
        return hidden

    def forward(
        self,
        ids_BT: Tensor,
        labels_BT: Tensor,
        signal: TeacherSignal | None,
        num_targets: float,
        starts_BT: Tensor | None = None,
        *,
        positions_P: Tensor | None = None,
        use: Callable[[Tensor, StudentHead], Any] | None = None,
    ) -> LossTerms | Any:
        """Return the loss of a batch against the teacher's signal, or without one; see ``hidden`` and ``kd_loss``.

        With ``use``, return instead what it makes of hidden states ``[M, H]`` and head. Under FSDP these are whole only
        inside this call, when the model is called through its wrapper.
        """
        hidden_MH = self.hidden(ids_BT, starts_BT).flatten(0, 1)
        if use is not None:
            return use(hidden_MH, self.head)
        if self.clock is not None:
            self.clock.mark("student")
        loss = cross_entropy if signal is None else signal.loss
        options: LossOptions = {"num_targets": num_targets, "config": self.config, "positions_P": positions_P}
        terms = loss(hidden_MH, self.head_weight, labels_BT.flatten(), **options)
        if self.clock is not None:
            self.clock.mark("loss")
        return terms
