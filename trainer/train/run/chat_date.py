"""The day that chat templates are read on: one for a whole run, so that it may be resumed after midnight."""

import dataclasses
import datetime
from pathlib import Path

from q4kd.trainer.config.settings import DistillConfig
from q4kd.trainer.errors import InputError
from q4kd.trainer.files import read_json, write_json
from q4kd.trainer.train.checkpoint import list_checkpoints

# In the folder of a cache: the day on which its chats were rendered.
_CACHE_FILE = "chat.json"


def with_chat_date(config: DistillConfig, *, resume: bool = False, cache: Path | None = None) -> DistillConfig:
    """Return the settings with ``chat_date`` set: the one given, that of the run or cache that goes on, or today.

    Args:
        config: the settings.
        resume: whether the run in ``out`` goes on; its newest checkpoint says on which day it began.
        cache: folder of the cache that is trained on, or goes on.
    """
    if config.chat_date is not None:
        return config
    kept = _of_checkpoint(config.out) if resume else None
    if kept is None and cache is not None:
        kept = _of_file(cache / _CACHE_FILE, ())
    return dataclasses.replace(config, chat_date=kept or _today())


def keep_chat_date(config: DistillConfig) -> None:
    """Write the day of a cache into its folder."""
    write_json(config.out / _CACHE_FILE, {"chat_date": config.chat_date})


def describe_date(config: DistillConfig, tokenizer: object) -> str:
    """Return what is to be said of the date; empty where the chat template asks for none."""
    if "strftime_now" not in str(getattr(tokenizer, "chat_template", None) or ""):
        return ""
    return f"chat template: it writes the date, {config.chat_date} for the whole run (chat_date)"


def _today() -> str:
    return datetime.date.today().isoformat()


def _of_checkpoint(out: Path) -> str | None:
    checkpoints = list_checkpoints(out)
    return _of_file(checkpoints[-1] / "state.json", ("config",)) if checkpoints else None


def _of_file(path: Path, inside: tuple[str, ...]) -> str | None:
    try:
        value = read_json(path)
        for name in (*inside, "chat_date"):
            value = value.get(name) if isinstance(value, dict) else None
        return datetime.date.fromisoformat(value).isoformat() if isinstance(value, str) else None
    except (InputError, ValueError):
        return None  # who needs the file will say what is wrong with it
