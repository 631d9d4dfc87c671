"""The settings of a distillation run: one frozen dataclass, read from YAML, options and ``--set``, checked once."""

import dataclasses
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from q4kd.trainer.errors import InputError
from q4kd.trainer.files import read_bounded
from q4kd.trainer.kd_loss import DIVERGENCES, Divergence, KDLossConfig

MAX_CONFIG_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """What a run does. Field names are the keys of RUN.yaml and of ``--set key=value``.

    Attributes:
        teacher: GGUF or .apr file.
        student: Hugging Face causal LM folder; without weights it is initialised from ``seed``.
        data: text file, JSONL file (objects with ``text``) or folder of text files.
        out: folder of the run.
        seq_len: positions per sequence.
        batch_size: sequences per step and micro-batch.
        accumulation: micro-batches per optimiser step.
        epochs: passes over the training data, when ``steps`` is not given.
        steps: optimiser steps of the full run.
        max_steps: smoke run: stop after exactly this many steps and write no final model.
        lr: peak learning rate of AdamW.
        warmup_steps: steps of linear warm-up, before cosine decay to zero.
        weight_decay: decoupled weight decay of AdamW.
        clip: largest gradient norm; larger gradients are scaled to it.
        alpha: weight of the cross-entropy (see kd_loss).
        temperature: divides both logits (see kd_loss).
        divergence: forward_kl, reverse_kl or jsd.
        beta: mixture weight of jsd.
        chunk_tokens: tokens whose logits exist at one time.
        seed: of the data order and of a fresh student.
        log_every: steps between "Step N/M" lines; 0 prints epoch lines only.
        eval_every: steps between held-out evaluations; 0 evaluates only before the first and after the last step.
        eval_tokens: held-out tokens evaluated.
        checkpoint_every: steps between checkpoints; 0 writes one after the last step only.
        keep: checkpoints kept.
        data_glob: which files of a data folder are read.
        data_max_bytes: stop reading data after this many bytes; 0 reads all.
        backend: teacher backend: auto, q4k or dense; null follows Q4KD_TEACHER_BACKEND.
        device: cpu or cuda.
        dtype: of the teacher's matrix products: auto, float32 or bfloat16.
        threads: CPU threads of torch; 0 leaves torch's choice.
        allow_degenerate_kd: train although teacher and student are the same function.
    """

    teacher: Path
    student: Path
    data: Path
    out: Path
    seq_len: int = 256
    batch_size: int = 8
    accumulation: int = 1
    epochs: float = 1.0
    steps: int | None = None
    max_steps: int | None = None
    lr: float = 2e-5
    warmup_steps: int = 20
    weight_decay: float = 0.0
    clip: float = 1.0
    alpha: float = 0.1
    temperature: float = 1.0
    divergence: Divergence = "forward_kl"
    beta: float = 0.5
    chunk_tokens: int = 256
    seed: int = 0
    log_every: int = 10
    eval_every: int = 0
    eval_tokens: int = 16_384
    checkpoint_every: int = 500
    keep: int = 2
    data_glob: str = "**/*"
    data_max_bytes: int = 0
    backend: str | None = None
    device: str = "cpu"
    dtype: str = "auto"
    threads: int = 0
    allow_degenerate_kd: bool = False

    @property
    def loss(self) -> KDLossConfig:
        """The loss's part of the settings."""
        return KDLossConfig(
            alpha=self.alpha,
            temperature=self.temperature,
            divergence=self.divergence,
            beta=self.beta,
            chunk_tokens=self.chunk_tokens,
        )

    def to_json(self) -> dict[str, Any]:
        """Return plain values, paths as strings."""
        return {
            key: str(value) if isinstance(value, Path) else value for key, value in dataclasses.asdict(self).items()
        }


# (low, high) inclusive; what lies outside is refused, whatever its type would admit.
_RANGES: dict[str, tuple[float, float]] = {
    "seq_len": (2, 1 << 20),
    "batch_size": (1, 1 << 16),
    "accumulation": (1, 1 << 16),
    "epochs": (1e-6, 1e6),
    "steps": (1, 1 << 40),
    "max_steps": (1, 1 << 40),
    "lr": (0.0, 10.0),
    "warmup_steps": (0, 1 << 40),
    "weight_decay": (0.0, 10.0),
    "clip": (1e-9, 1e9),
    "alpha": (0.0, 1.0),
    "temperature": (1e-3, 1e3),
    "beta": (1e-3, 1 - 1e-3),
    "chunk_tokens": (1, 1 << 20),
    "seed": (0, (1 << 32) - 1),
    "log_every": (0, 1 << 40),
    "eval_every": (0, 1 << 40),
    "eval_tokens": (0, 1 << 40),
    "checkpoint_every": (0, 1 << 40),
    "keep": (1, 1 << 20),
    "data_max_bytes": (0, 1 << 60),
    "threads": (0, 4096),
}


def _convert(key: str, value: object, kind: Any) -> Any:
    """Return ``value`` as the annotated type, or refuse it."""
    options = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    if value is None and type(None) in options:
        return None
    target = next(option for option in options if option is not type(None))
    if key == "divergence":
        accepted = value in DIVERGENCES
    elif target is Path:
        accepted, value = isinstance(value, str | Path), Path(str(value))
    elif target is float:
        # YAML 1.1 reads "1e-3" as text, and people write it.
        value = _number(value)
        accepted = isinstance(value, int | float) and not isinstance(value, bool)
    else:
        accepted = isinstance(value, target) and (target is bool or not isinstance(value, bool))
    low, high = _RANGES.get(key, (float("-inf"), float("inf")))
    if accepted and key in _RANGES:
        accepted = low <= typing.cast(float, value) <= high
    if not accepted:
        wanted = " or ".join(DIVERGENCES) if key == "divergence" else getattr(target, "__name__", str(target))
        limits = f" from {low:g} to {high:g}" if key in _RANGES else ""
        raise InputError(
            f"setting {key}",
            expected=f"{wanted}{limits}",
            got=repr(value)[:80],
            remedy="correct it; see q4kd distill --help",
        )
    return float(typing.cast(float, value)) if target is float else value


def _number(value: object) -> object:
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def make_config(values: Mapping[str, object]) -> DistillConfig:
    """Check settings and build the config.

    Raises:
        InputError: for an unknown, missing or unacceptable setting.
    """
    kinds = typing.get_type_hints(DistillConfig)
    unknown = sorted(set(values) - set(kinds))
    if unknown:
        raise InputError(
            f"setting {unknown[0]}",
            expected="a known setting",
            got="an unknown one",
            remedy=f"use one of {', '.join(kinds)}",
        )
    missing = [key for key in ("teacher", "student", "data", "out") if values.get(key) is None]
    if missing:
        raise InputError(
            f"setting {missing[0]}",
            expected="a path",
            got="nothing",
            remedy=f"pass --{missing[0]} or set it in RUN.yaml",
        )
    return DistillConfig(**{key: _convert(key, value, kinds[key]) for key, value in values.items()})


def read_run_file(path: Path) -> dict[str, object]:
    """Read RUN.yaml: a flat mapping of settings.

    Raises:
        InputError: when it is not such a mapping.
    """
    try:
        content = yaml.safe_load(read_bounded(path, MAX_CONFIG_BYTES))
    except (yaml.YAMLError, RecursionError, UnicodeDecodeError) as error:
        raise InputError(
            str(path), expected="YAML", got=str(error).replace("\n", " ")[:160], remedy="correct the file"
        ) from error
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise InputError(str(path), expected="a mapping of settings", got=type(content).__name__, remedy="see the docs")
    return content


def parse_assignment(text: str) -> tuple[str, object]:
    """Parse ``key=value`` of ``--set``; the value is YAML, or plain text where it is not YAML (``**/*.py``).

    Raises:
        InputError: when there is no ``=``.
    """
    key, separator, value = text.partition("=")
    if not separator or not key:
        raise InputError(f"--set {text}", expected="key=value", got=text, remedy="for example --set lr=1e-4")
    try:
        return key.strip(), yaml.safe_load(value)
    except yaml.YAMLError:
        return key.strip(), value
