"""The options that ``q4kd distill``, ``plan`` and ``cache`` share: RUN.yaml, one flag for every setting, ``--set``.

Flags come from ``DistillConfig``'s fields, so that a setting cannot exist without its flag, its default and its unit in
``--help``. Imports no torch.
"""

import argparse
import dataclasses
import difflib
import typing
from collections.abc import Collection
from pathlib import Path
from typing import Any

from q4kd.trainer.config import DistillConfig, make_config
from q4kd.trainer.config_file import parse_assignment, read_run_file
from q4kd.trainer.errors import InputError
from q4kd.trainer.setting_value import kind_of

EPILOG = """Settings come from RUN.yaml, then from the flags, then from --set: the last one wins.
A RUN.yaml is a flat mapping of the names above, with _ for -:  lr: 1e-4
"""


# What transformers, TRL and their kin call the same setting: for the question that follows an unknown name.
ELSEWHERE = {
    "adam_beta1": "beta1",
    "adam_beta2": "beta2",
    "adam_epsilon": "eps",
    "assistant_only_loss": "completion_only",
    "completion_only_loss": "completion_only",
    "cutoff_len": "seq_len",
    "dataset": "data",
    "eval_steps": "eval_every",
    "gradient_accumulation_steps": "accumulation",
    "learning_rate": "lr",
    "logging_steps": "log_every",
    "lora_r": "lora_rank",
    "lr_scheduler_type": "schedule",
    "max_grad_norm": "clip",
    "max_length": "seq_len",
    "max_seq_length": "seq_len",
    "micro_batch_size": "batch_size",
    "model": "student",
    "model_name_or_path": "student",
    "num_epochs": "epochs",
    "num_train_epochs": "epochs",
    "optim": "optimizer",
    "output_dir": "out",
    "per_device_train_batch_size": "batch_size",
    "report_to": "trackers",
    "save_steps": "checkpoint_every",
    "save_total_limit": "keep",
    "teacher_model_name_or_path": "teacher",
    "torch_compile": "compile",
    "torch_dtype": "student_dtype",
    "train_file": "data",
}


def add_run_arguments(parser: argparse.ArgumentParser, *, omit: Collection[str] = ()) -> None:
    """Add RUN.yaml, a flag for every setting under its heading, and ``--set``.

    Args:
        parser: of the command.
        omit: settings that mean nothing to this command and get no flag; RUN.yaml may still hold them.
    """
    parser.usage = f"{parser.prog} [RUN.yaml] [options]"
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    parser.add_argument("run_file", nargs="?", type=Path, metavar="RUN.yaml", help="settings as a flat YAML mapping")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="assignments", help="any setting; null unsets"
    )
    kinds = typing.get_type_hints(DistillConfig)
    groups: dict[str, Any] = {}
    for setting in dataclasses.fields(DistillConfig):
        if setting.name in omit:
            continue
        title = setting.metadata["group"]
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        groups[title].add_argument(f"--{setting.name.replace('_', '-')}", **_describe(setting, kinds[setting.name]))


def _describe(setting: "dataclasses.Field[Any]", annotation: Any) -> dict[str, Any]:
    """Return the keywords of ``add_argument``. Bounds are checked by ``make_config``, for every source alike."""
    kind, _ = kind_of(annotation)
    unit, choices = setting.metadata["unit"], setting.metadata["choices"]
    details = [f"default: {default_text(setting)}"] if setting.default is not dataclasses.MISSING else ["required"]
    if unit:
        details.insert(0, unit)
    options: dict[str, Any] = {
        "dest": setting.name,
        "default": None,
        "help": f"{setting.metadata['help']} ({'; '.join(details)})".replace("%", "%%"),
    }
    if kind is bool:
        return options | {"action": argparse.BooleanOptionalAction}
    if choices:
        return options | {"choices": choices}
    return options | {"type": kind, "metavar": {int: "N", float: "X", Path: "PATH"}.get(kind, "TEXT")}


def default_text(setting: "dataclasses.Field[Any]") -> str:
    """Return a setting's default as ``--help`` and the documentation show it."""
    value = setting.default
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


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
    for setting in dataclasses.fields(DistillConfig):
        given = getattr(args, setting.name, None)
        if given is not None:
            values[setting.name] = given
    values |= dict(parse_assignment(text) for text in args.assignments)
    for name in values:
        if name in ELSEWHERE:
            raise InputError(
                f"setting {name}",
                expected="a known setting",
                got="its name in other trainers",
                remedy=f"did you mean {ELSEWHERE[name]}?",
            )
    return make_config(values)
