"""The options that commands share: RUN.yaml, one flag for every setting, ``--set``; whole numbers within bounds.

Flags come from ``settings()``, so that no setting exists without its flag, its default and its unit in ``--help``.
Imports no torch.
"""

import argparse
import difflib
from collections.abc import Collection
from pathlib import Path
from typing import Any

from q4kd.trainer.config.run_file import parse_assignment, read_run_file
from q4kd.trainer.config.settings import DistillConfig, make_config, settings
from q4kd.trainer.config.value import Setting
from q4kd.trainer.errors import InputError

EPILOG = """Settings come from RUN.yaml, then from the flags, then from --set: the last one wins.
A RUN.yaml is a flat mapping of the names above, with _ for -:  lr: 1e-4
"""
# What other trainers, such as transformers and TRL, call the same setting; an unknown name is looked up here.
ELSEWHERE = {
    "output_dir": "out", "train_file": "data", "dataset": "data", "teacher_model_name_or_path": "teacher",
    "model": "student", "model_name_or_path": "student", "torch_dtype": "student_dtype", "torch_compile": "compile",
    "assistant_only_loss": "completion_only", "completion_only_loss": "completion_only",
    "cutoff_len": "seq_len", "max_length": "seq_len", "max_seq_length": "seq_len",
    "micro_batch_size": "batch_size", "per_device_train_batch_size": "batch_size",
    "gradient_accumulation_steps": "accumulation", "num_epochs": "epochs", "num_train_epochs": "epochs",
    "learning_rate": "lr", "lr_scheduler_type": "schedule", "max_grad_norm": "clip", "lora_r": "lora_rank",
    "optim": "optimizer", "adam_beta1": "beta1", "adam_beta2": "beta2", "adam_epsilon": "eps",
    "report_to": "trackers", "logging_steps": "log_every", "eval_steps": "eval_every",
    "save_steps": "checkpoint_every", "save_total_limit": "keep",
}  # fmt: skip


def add_run_arguments(parser: argparse.ArgumentParser, *, omit: Collection[str] = ()) -> None:
    """Add RUN.yaml, a flag for every setting under its heading, and ``--set``.

    Args:
        parser: parser of the command.
        omit: settings that mean nothing to this command and get no flag; RUN.yaml may still hold them.
    """
    parser.usage = f"{parser.prog} [RUN.yaml] [options]"
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    parser.add_argument("run_file", nargs="?", type=Path, metavar="RUN.yaml", help="settings as a flat YAML mapping")
    options: dict[str, Any] = {"action": "append", "default": [], "dest": "assignments", "metavar": "KEY=VALUE"}
    parser.add_argument("--set", **options, help="any setting; null unsets")
    groups: dict[str, Any] = {}
    for name, setting in settings().items():
        if name in omit:
            continue
        if setting.group not in groups:
            groups[setting.group] = parser.add_argument_group(setting.group)
        groups[setting.group].add_argument(f"--{name.replace('_', '-')}", **_describe(setting))


def _describe(setting: Setting) -> dict[str, Any]:
    """Return the keywords of ``add_argument``. Bounds are checked by ``make_config``, for every source alike."""
    details = "required" if setting.is_required else f"default: {setting.default_text}"
    text = f"{setting.help} ({setting.unit}; {details})" if setting.unit else f"{setting.help} ({details})"
    options: dict[str, Any] = {"dest": setting.name, "default": None, "help": text.replace("%", "%%")}
    if setting.kind is bool:
        return options | {"action": argparse.BooleanOptionalAction}
    if setting.choices:
        return options | {"choices": setting.choices}
    metavar = {int: "N", float: "X", Path: "PATH"}.get(setting.kind, "TEXT")
    return options | {"type": setting.kind, "metavar": metavar}


def suggest_option(word: str, known: Collection[str]) -> str | None:
    """Return the known option that an unknown one may mean, by what other trainers call it, then by its letters."""
    name = word.partition("=")[0]
    meant = ELSEWHERE.get(name.removeprefix("--").replace("-", "_"))
    if meant and f"--{meant.replace('_', '-')}" in known:
        return f"--{meant.replace('_', '-')}"
    close = difflib.get_close_matches(name, known, n=1)
    return close[0] if name and close else None


def read_run_arguments(args: argparse.Namespace) -> DistillConfig:
    """Return the settings of RUN.yaml, overridden by the flags, overridden by ``--set``.

    Raises:
        InputError: for a file that is not a mapping, and for an unknown, missing or unacceptable setting.
    """
    values: dict[str, object] = read_run_file(args.run_file) if args.run_file else {}
    given = {name: getattr(args, name, None) for name in settings()}
    values |= {name: value for name, value in given.items() if value is not None}
    values |= dict(parse_assignment(text) for text in args.assignments)
    for name in filter(ELSEWHERE.get, values):
        remedy, got = f"did you mean {ELSEWHERE[name]}?", "its name in other trainers"
        raise InputError(f"setting {name}", expected="a known setting", got=got, remedy=remedy)
    return make_config(values)


def count(option: str, text: str, most: int) -> int:
    """Return a number from 1 to ``most``.

    Raises:
        InputError: naming the option.
    """
    if not (text.isascii() and text.isdigit() and len(text) <= 8 and 1 <= int(text) <= most):
        expected = f"a whole number from 1 to {most}"
        raise InputError(option, expected=expected, got=repr(text)[:40], remedy="choose a number in between")
    return int(text)
