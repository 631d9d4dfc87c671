"""The settings of a distillation run: one frozen dataclass whose fields say what they mean, in what unit, within what.

``settings()`` is the one source of ``q4kd distill --help``, of the JSON Schema of RUN.yaml, of the reference in the
documentation and of the checks in ``make_config``.
"""

import dataclasses
import datetime
import functools
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from q4kd.trainer.config.value import Setting, read_number
from q4kd.trainer.errors import InputError, unknown_name
from q4kd.trainer.loss.config import Divergence, KDLossConfig, LogitsType, Mode

LARGE = 1 << 40
DataFormat = Literal["auto", "text", "jsonl", "parquet", "chat", "tokens"]
Packing = Literal["documents", "stream", "none"]
BeginOfText = Literal["auto", "true", "false"]
StudentDtype = Literal["auto", "float32", "bfloat16"]
StudentKernels = Literal["torch", "liger"]
OptimizerName = Literal["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"]
Schedule = Literal["cosine", "linear", "constant"]
BestMetric = Literal["kl", "loss", "agreement"]
Backend = Literal["auto", "q4k", "dense"]
Device = Literal["cpu", "cuda"]
TeacherDtype = Literal["auto", "float32", "bfloat16"]


def _setting(
    default: Any, group: str, text: str, low: float | None = None, high: float | None = None, unit: str = ""
) -> Any:
    """Declare a field: its default (``...``: it must be given), its heading, what it means, its bounds and its unit."""
    metadata = {"group": group, "help": text, "low": low, "high": high, "unit": unit}
    return field(default=dataclasses.MISSING if default is ... else default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """What a run does. Field names are the keys of RUN.yaml and of ``--set key=value``."""

    teacher: Path | None = _setting(None, "files", "GGUF or .apr file; not needed with teacher_cache")
    student: Path = _setting(..., "files", "Hugging Face causal LM folder")
    data: Path = _setting(..., "files", "training data: a file or a folder")
    out: Path = _setting(..., "files", "folder of the run")
    teacher_cache: Path | None = _setting(None, "files", "folder written by q4kd cache; trains without a teacher")

    data_format: DataFormat = _setting("auto", "data", "what the files hold; auto goes by their names")
    data_glob: str = _setting("**/*", "data", "which files of a data folder are read")
    data_max_bytes: int = _setting(0, "data", "stop reading after this much text; 0 reads all", 0, 1 << 60, "bytes")
    text_field: str = _setting("text", "data", "field of a record that holds its text")
    messages_field: str = _setting("messages", "data", "field of a chat record that holds its messages")
    begin_of_text: BeginOfText = _setting(
        "auto",
        "data",
        "put the begin-of-text token before every text and prompt; auto: where the student's tokenizer does so itself",
    )
    chat_date: str | None = _setting(
        None, "data", "day that a chat template gets for today, as 2026-11-30; without it that on which the run began"
    )
    ignore_fields: str = _setting(
        "", "data", "fields of records and messages to train without, separated by commas, such as label,images"
    )
    completion_only: bool = _setting(False, "data", "of chats, only what the assistant says has a label")
    held_out: Path | None = _setting(None, "data", "evaluation data; without it a hash of each document's name decides")
    packing: Packing = _setting(
        "documents",
        "data",
        "documents: windows are filled with several, none of which attends to another; stream: they do; "
        "none: one document a window, padded",
    )
    streaming: bool = _setting(
        False, "data", "read as training goes, with a bounded shuffle buffer, instead of at the start"
    )
    shuffle_buffer: int = _setting(10_000, "data", "documents among which a streaming run draws", 1, LARGE, "documents")

    seq_len: int = _setting(256, "batch", "positions of a sequence", 2, 1 << 20, "tokens")
    batch_size: int = _setting(8, "batch", "sequences of a micro-batch, for each process", 1, 1 << 16, "sequences")
    accumulation: int = _setting(1, "batch", "micro-batches of a step", 1, 1 << 16)

    epochs: float = _setting(1.0, "schedule", "passes over the training data, when steps is not given", 1e-6, 1e6)
    steps: int | None = _setting(None, "schedule", "optimiser steps of the full run", 1, LARGE)
    max_steps: int | None = _setting(None, "schedule", "smoke run: exactly this many steps, no final model", 1, LARGE)
    lr: float = _setting(2e-5, "schedule", "peak learning rate", 0.0, 10.0)
    schedule: Schedule = _setting("cosine", "schedule", "of the learning rate after warm-up")
    warmup_steps: int = _setting(20, "schedule", "steps of linear warm-up", 0, LARGE, "steps")

    alpha: float = _setting(
        0.1, "loss", "weight of the cross-entropy; 1 - alpha is that of the distillation term", 0.0, 1.0
    )
    temperature: float = _setting(1.0, "loss", "divides both logits", 1e-3, 1e3)
    divergence: Divergence = _setting("forward_kl", "loss", "distance from the teacher")
    beta: float = _setting(0.5, "loss", "mixture weight of jsd", 1e-3, 1 - 1e-3)
    loss_mode: Mode = _setting("fast", "loss", "fast holds the teacher's head decoded; low tiles the vocabulary too")
    loss_logits: LogitsType = _setting(
        "float32",
        "loss",
        "in what CUDA holds the logits of bfloat16 products; bfloat16 is faster and rounds each logit to 8 bits",
    )
    chunk_tokens: int = _setting(0, "loss", "tokens whose logits exist at one time; 0 chooses", 0, 1 << 20, "tokens")

    student_dtype: StudentDtype = _setting(
        "auto",
        "student",
        "of weights and products; bfloat16 keeps float32 master weights in the optimiser; auto is float32 on the CPU, "
        "bfloat16 on CUDA",
    )
    from_scratch: bool = _setting(
        False, "student", "draw the weights from the seed: the folder holds a config and a tokenizer, but no weights"
    )
    student_kernels: StudentKernels = _setting(
        "torch", "student", "liger: Triton kernels that store fewer activations (CUDA)"
    )
    gradient_checkpointing: bool = _setting(
        False, "student", "compute activations again in the backward pass to save memory"
    )
    compile: bool = _setting(False, "student", "pass the student through torch.compile")
    lora_rank: int = _setting(0, "student", "rank of LoRA adapters; 0 trains every weight", 0, 4096)
    lora_alpha: float = _setting(
        32.0, "student", "LoRA scaling: the update is multiplied by lora_alpha / lora_rank", 0.0, 1e6
    )
    lora_dropout: float = _setting(0.0, "student", "dropout before the adapters", 0.0, 0.99)
    lora_targets: str = _setting(
        "all-linear", "student", "modules with adapters: all-linear, or names separated by commas"
    )

    optimizer: OptimizerName = _setting(
        "adamw", "optimizer", "adamw_8bit needs bitsandbytes, the paged ones CUDA as well"
    )
    beta1: float = _setting(0.9, "optimizer", "decay of the first moment", 0.0, 0.99999)
    beta2: float = _setting(0.999, "optimizer", "decay of the second moment", 0.0, 0.99999)
    eps: float = _setting(1e-8, "optimizer", "added to the root of the second moment", 1e-30, 1.0)
    weight_decay: float = _setting(0.0, "optimizer", "decoupled weight decay", 0.0, 10.0)
    clip: float = _setting(1.0, "optimizer", "largest gradient norm; larger gradients are scaled to it", 1e-9, 1e9)

    backend: Backend | None = _setting(None, "teacher", "auto, q4k or dense; null follows Q4KD_TEACHER_BACKEND")
    device: Device = _setting("cpu", "teacher", "cpu or cuda")
    dtype: TeacherDtype = _setting(
        "auto",
        "teacher",
        "of the teacher's matrix products; auto is bfloat16 on CUDA, and on a CPU where that was measured to be faster "
        "for batch_size x seq_len positions",
    )
    threads: int = _setting(0, "teacher", "CPU threads of torch; 0 leaves torch's choice", 0, 4096)

    log_every: int = _setting(
        10, "reporting", "steps between Step N/M lines; 0 prints epoch lines only", 0, LARGE, "steps"
    )
    trackers: str = _setting(
        "", "reporting", "tensorboard, wandb or trackio, separated by commas; each must be installed"
    )
    eval_every: int = _setting(
        0,
        "reporting",
        "steps between held-out evaluations; 0 evaluates before the first and after the last step only",
        0,
        LARGE,
        "steps",
    )
    eval_tokens: int = _setting(16_384, "reporting", "held-out tokens evaluated", 0, LARGE, "tokens")

    checkpoint_every: int = _setting(
        500, "checkpoints", "steps between checkpoints; 0 writes one after the last step only", 0, LARGE, "steps"
    )
    keep: int = _setting(2, "checkpoints", "newest checkpoints kept, beside the best one", 1, 1 << 20)
    best_metric: BestMetric = _setting("kl", "checkpoints", "held-out figure by which the best checkpoint is chosen")
    best_resumable: bool = _setting(
        False, "checkpoints", "keep the best checkpoint whole; without it its weights alone are kept, to be exported"
    )

    seed: int = _setting(0, "guards", "of the data order, of a fresh student and of dropout", 0, (1 << 32) - 1)
    allow_degenerate_kd: bool = _setting(False, "guards", "train although teacher and student are the same function")
    hang_s: float = _setting(
        900.0, "guards", "a step that takes longer has its stacks written and the run ended; 0 never", 0.0, 1e7, "s"
    )

    @property
    def loss(self) -> KDLossConfig:
        """The loss's part of the settings."""
        return KDLossConfig(
            alpha=self.alpha,
            temperature=self.temperature,
            divergence=self.divergence,
            beta=self.beta,
            mode=self.loss_mode,
            chunk_tokens=self.chunk_tokens,
            logits=self.loss_logits,
        )

    def to_json(self) -> dict[str, Any]:
        """Return plain values, paths as strings."""
        return {key: str(value) if isinstance(value, Path) else value for key, value in vars(self).items()}


@functools.cache
def settings() -> Mapping[str, Setting]:
    """Return every setting by its name, in the order of the fields."""
    annotations = typing.get_type_hints(DistillConfig)
    return {field.name: Setting.of(field, annotations[field.name]) for field in dataclasses.fields(DistillConfig)}


def _settings_of_cached_run(values: Mapping[str, object]) -> Mapping[str, object]:
    """Refuse what a cache cannot give; the best checkpoint is that of the lowest held-out loss."""
    wrong = {
        "temperature": (1, "cached log-probabilities are those of temperature 1: leave it out"),
        "streaming": (False, "a stream has no fixed order: leave it out"),
        "best_metric": ("loss", "there is no teacher to compare held-out text with: leave it out"),
    }
    for name, (only, remedy) in wrong.items():
        given = values.get(name, only)
        given = read_number(given) if name == "temperature" else given
        if given != only:
            expected, got = f"{only} with teacher_cache", repr(given)[:80]
            raise InputError(f"setting {name}", expected=expected, got=got, remedy=remedy)
    return {**values, "best_metric": "loss"}


def no_stream() -> InputError:
    """Return the refusal to cache a teacher's signals of a stream."""
    expected = "data in a fixed order, for a teacher's cache"
    remedy = "set streaming to false; tokens that do not fit in memory are kept on disk"
    return InputError("setting streaming", expected=expected, got="a stream", remedy=remedy)


def make_config(values: Mapping[str, object]) -> DistillConfig:
    """Check settings and build the config.

    Raises:
        InputError: for an unknown, missing or unacceptable setting.
    """
    known = settings()
    for name in sorted(set(values) - set(known)):
        raise unknown_name(f"setting {name[:60]}", name, known, "setting")
    needed = [name for name, setting in known.items() if setting.is_required]
    if values.get("teacher_cache"):
        values = _settings_of_cached_run(values)
    else:
        needed.insert(0, "teacher")
    for name in needed:
        if values.get(name) is None:
            remedy = f"pass --{name} or set it in RUN.yaml"
            raise InputError(f"setting {name}", expected="a path", got="nothing", remedy=remedy)
    config = DistillConfig(**{name: known[name].convert(value) for name, value in values.items()})
    if config.chat_date is not None:
        _check_date(config.chat_date)
    return config


def _check_date(text: str) -> None:
    try:
        datetime.date.fromisoformat(text)
    except ValueError as error:
        expected, remedy = "a day such as 2026-11-30", "write year, month and day"
        raise InputError("setting chat_date", expected=expected, got=repr(text)[:40], remedy=remedy) from error
