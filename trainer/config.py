"""The settings of a distillation run: one frozen dataclass whose fields say what they mean, in what unit, within what.

Each field's metadata is the one source of ``q4kd distill --help``, of the JSON Schema of RUN.yaml, of the reference in
the documentation and of the checks in ``make_config``.
"""

import dataclasses
import difflib
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from q4kd.trainer.errors import InputError
from q4kd.trainer.loss_config import Divergence, KDLossConfig, LogitsType, Mode
from q4kd.trainer.setting_value import convert, read_number

LARGE = 1 << 40
DataFormat = Literal["auto", "text", "jsonl", "parquet", "chat", "tokens"]
Packing = Literal["documents", "stream", "none"]
StudentDtype = Literal["auto", "float32", "bfloat16"]
StudentKernels = Literal["torch", "liger"]
OptimizerName = Literal["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"]
Schedule = Literal["cosine", "linear", "constant"]
BestMetric = Literal["kl", "loss", "agreement"]


def _setting(
    default: Any,
    group: str,
    text: str,
    *,
    unit: str = "",
    low: float | None = None,
    high: float | None = None,
    choices: tuple[str, ...] = (),
) -> Any:
    """Declare a field: its default, the heading it is listed under, what it means and what is accepted."""
    metadata = {"group": group, "help": text, "unit": unit, "low": low, "high": high, "choices": choices}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """What a run does. Field names are the keys of RUN.yaml and of ``--set key=value``."""

    teacher: Path | None = _setting(None, "files", "GGUF or .apr file; not needed with teacher_cache")
    student: Path = _setting(
        dataclasses.MISSING, "files", "Hugging Face causal LM folder; without weights it starts from seed"
    )
    data: Path = _setting(dataclasses.MISSING, "files", "training data: a file or a folder")
    out: Path = _setting(dataclasses.MISSING, "files", "folder of the run")
    teacher_cache: Path | None = _setting(None, "files", "folder written by q4kd cache; trains without a teacher")

    data_format: DataFormat = _setting(
        "auto", "data", "what the files hold; auto goes by their names", choices=typing.get_args(DataFormat)
    )
    data_glob: str = _setting("**/*", "data", "which files of a data folder are read")
    data_max_bytes: int = _setting(
        0, "data", "stop reading after this much text; 0 reads all", unit="bytes", low=0, high=1 << 60
    )
    text_field: str = _setting("text", "data", "field of a record that holds its text")
    messages_field: str = _setting("messages", "data", "field of a chat record that holds its messages")
    completion_only: bool = _setting(False, "data", "of chats, only what the assistant says has a label")
    held_out: Path | None = _setting(None, "data", "evaluation data; without it a hash of each document's name decides")
    packing: Packing = _setting(
        "documents", "data",
        "documents: windows are filled with several, none of which attends to another; stream: they do; "
        "none: one document a window, padded",
        choices=typing.get_args(Packing),
    )  # fmt: skip
    streaming: bool = _setting(
        False, "data", "read as training goes, with a bounded shuffle buffer, instead of at the start"
    )
    shuffle_buffer: int = _setting(
        10_000, "data", "documents among which a streaming run draws", unit="documents", low=1, high=LARGE
    )

    seq_len: int = _setting(256, "batch", "positions of a sequence", unit="tokens", low=2, high=1 << 20)
    batch_size: int = _setting(
        8, "batch", "sequences of a micro-batch, for each process", unit="sequences", low=1, high=1 << 16
    )
    accumulation: int = _setting(1, "batch", "micro-batches of a step", low=1, high=1 << 16)

    epochs: float = _setting(
        1.0, "schedule", "passes over the training data, when steps is not given", low=1e-6, high=1e6
    )
    steps: int | None = _setting(None, "schedule", "optimiser steps of the full run", low=1, high=LARGE)
    max_steps: int | None = _setting(
        None, "schedule", "smoke run: exactly this many steps, no final model", low=1, high=LARGE
    )
    lr: float = _setting(2e-5, "schedule", "peak learning rate", low=0.0, high=10.0)
    schedule: Schedule = _setting(
        "cosine", "schedule", "of the learning rate after warm-up", choices=typing.get_args(Schedule)
    )
    warmup_steps: int = _setting(20, "schedule", "steps of linear warm-up", unit="steps", low=0, high=LARGE)

    alpha: float = _setting(
        0.1, "loss", "weight of the cross-entropy; 1 - alpha is that of the distillation term", low=0.0, high=1.0
    )
    temperature: float = _setting(1.0, "loss", "divides both logits", low=1e-3, high=1e3)
    divergence: Divergence = _setting(
        "forward_kl", "loss", "distance from the teacher", choices=typing.get_args(Divergence)
    )
    beta: float = _setting(0.5, "loss", "mixture weight of jsd", low=1e-3, high=1 - 1e-3)
    loss_mode: Mode = _setting(
        "fast",
        "loss",
        "fast holds the teacher's head decoded; low tiles the vocabulary too",
        choices=typing.get_args(Mode),
    )
    loss_logits: LogitsType = _setting(
        "float32",
        "loss",
        "in what CUDA holds the logits of bfloat16 products; bfloat16 is faster and rounds each logit to 8 bits",
        choices=typing.get_args(LogitsType),
    )
    chunk_tokens: int = _setting(
        0, "loss", "tokens whose logits exist at one time; 0 chooses", unit="tokens", low=0, high=1 << 20
    )

    student_dtype: StudentDtype = _setting(
        "auto", "student",
        "of weights and products; bfloat16 keeps float32 master weights in the optimiser; auto is float32 on the CPU, "
        "bfloat16 on CUDA",
        choices=typing.get_args(StudentDtype),
    )  # fmt: skip
    student_kernels: StudentKernels = _setting(
        "torch",
        "student",
        "liger: Triton kernels that store fewer activations (CUDA)",
        choices=typing.get_args(StudentKernels),
    )
    gradient_checkpointing: bool = _setting(
        False, "student", "compute activations again in the backward pass to save memory"
    )
    compile: bool = _setting(False, "student", "pass the student through torch.compile")
    lora_rank: int = _setting(0, "student", "rank of LoRA adapters; 0 trains every weight", low=0, high=4096)
    lora_alpha: float = _setting(
        32.0, "student", "LoRA scaling: the update is multiplied by lora_alpha / lora_rank", low=0.0, high=1e6
    )
    lora_dropout: float = _setting(0.0, "student", "dropout before the adapters", low=0.0, high=0.99)
    lora_targets: str = _setting(
        "all-linear", "student", "modules with adapters: all-linear, or names separated by commas"
    )

    optimizer: OptimizerName = _setting(
        "adamw",
        "optimizer",
        "adamw_8bit and the paged ones need bitsandbytes and CUDA",
        choices=typing.get_args(OptimizerName),
    )
    beta1: float = _setting(0.9, "optimizer", "decay of the first moment", low=0.0, high=0.99999)
    beta2: float = _setting(0.999, "optimizer", "decay of the second moment", low=0.0, high=0.99999)
    eps: float = _setting(1e-8, "optimizer", "added to the root of the second moment", low=1e-30, high=1.0)
    weight_decay: float = _setting(0.0, "optimizer", "decoupled weight decay", low=0.0, high=10.0)
    clip: float = _setting(
        1.0, "optimizer", "largest gradient norm; larger gradients are scaled to it", low=1e-9, high=1e9
    )

    backend: str | None = _setting(
        None, "teacher", "auto, q4k or dense; null follows Q4KD_TEACHER_BACKEND", choices=("auto", "q4k", "dense")
    )
    device: str = _setting("cpu", "teacher", "cpu or cuda", choices=("cpu", "cuda"))
    dtype: str = _setting(
        "auto", "teacher", "of the teacher's matrix products", choices=("auto", "float32", "bfloat16")
    )
    threads: int = _setting(0, "teacher", "CPU threads of torch; 0 leaves torch's choice", low=0, high=4096)

    log_every: int = _setting(
        10, "reporting", "steps between Step N/M lines; 0 prints epoch lines only", unit="steps", low=0, high=LARGE
    )
    trackers: str = _setting(
        "", "reporting", "tensorboard, wandb or trackio, separated by commas; each must be installed"
    )
    eval_every: int = _setting(
        0, "reporting", "steps between held-out evaluations; 0 evaluates before the first and after the last step only",
        unit="steps", low=0, high=LARGE,
    )  # fmt: skip
    eval_tokens: int = _setting(16_384, "reporting", "held-out tokens evaluated", unit="tokens", low=0, high=LARGE)

    checkpoint_every: int = _setting(
        500,
        "checkpoints",
        "steps between checkpoints; 0 writes one after the last step only",
        unit="steps",
        low=0,
        high=LARGE,
    )
    keep: int = _setting(2, "checkpoints", "newest checkpoints kept, beside the best one", low=1, high=1 << 20)
    best_metric: BestMetric = _setting(
        "kl",
        "checkpoints",
        "held-out figure by which the best checkpoint is chosen",
        choices=typing.get_args(BestMetric),
    )

    seed: int = _setting(0, "guards", "of the data order, of a fresh student and of dropout", low=0, high=(1 << 32) - 1)
    allow_degenerate_kd: bool = _setting(False, "guards", "train although teacher and student are the same function")
    hang_s: float = _setting(
        900.0,
        "guards",
        "a step that takes longer has its stacks written and the run ended; 0 never",
        unit="s",
        low=0.0,
        high=1e7,
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
        return {
            key: str(value) if isinstance(value, Path) else value for key, value in dataclasses.asdict(self).items()
        }


def _settings_of_cached_run(values: Mapping[str, object]) -> Mapping[str, object]:
    """Refuse what a cache cannot give; the best checkpoint is that of the lowest held-out loss."""
    wrong = {
        "temperature": (1, "cached log-probabilities are those of temperature 1: leave it out"),
        "streaming": (False, "a stream has no fixed order: leave it out"),
        "best_metric": ("loss", "there is no teacher to compare held-out text with: leave it out"),
    }
    for name, (only, remedy) in wrong.items():
        given = read_number(values.get(name, only)) if name == "temperature" else values.get(name, only)
        if given != only:
            raise InputError(
                f"setting {name}", expected=f"{only} with teacher_cache", got=repr(given)[:80], remedy=remedy
            )
    return {**values, "best_metric": "loss"}


def make_config(values: Mapping[str, object]) -> DistillConfig:
    """Check settings and build the config.

    Raises:
        InputError: for an unknown, missing or unacceptable setting.
    """
    settings = {setting.name: setting for setting in dataclasses.fields(DistillConfig)}
    unknown = sorted(set(values) - set(settings))
    if unknown:
        close = difflib.get_close_matches(unknown[0], settings, n=1)
        raise InputError(
            f"setting {unknown[0][:60]}",
            expected="a known setting",
            got="an unknown one",
            remedy=f"did you mean {close[0]}?" if close else f"use one of {', '.join(settings)}",
        )
    if values.get("teacher_cache"):
        values = _settings_of_cached_run(values)
    needed = ["student", "data", "out"] if values.get("teacher_cache") else ["teacher", "student", "data", "out"]
    missing = [key for key in needed if values.get(key) is None]
    if missing:
        raise InputError(
            f"setting {missing[0]}",
            expected="a path",
            got="nothing",
            remedy=f"pass --{missing[0]} or set it in RUN.yaml",
        )
    kinds = typing.get_type_hints(DistillConfig)
    return DistillConfig(**{key: convert(settings[key], value, kinds[key]) for key, value in values.items()})
