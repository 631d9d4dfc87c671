"""The errors a user can cause. Each says what was expected, what was found, and what to do next."""

import errno
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")


class InputError(Exception):
    """A file, option or contract that cannot be used. The command line prints it as one line and exits with 2.

    Args:
        subject: what is wrong, such as a path or an option.
        expected: what would have been accepted.
        got: what was found.
        remedy: what the user can do about it.
    """

    def __init__(self, subject: str, *, expected: str, got: str, remedy: str) -> None:
        self.subject, self.expected, self.got, self.remedy = subject, expected, got, remedy
        super().__init__(f"{subject}: expected {expected}, got {got}; {remedy}")


def unknown_name(subject: str, name: str, known: Iterable[str], kind: str) -> InputError:
    """Return the refusal of a name that is not one of the known ones; it suggests the nearest, or lists them.

    Args:
        subject: what is wrong, such as ``setting lrr``.
        name: what was given.
        known: the names that there are.
        kind: what they name, such as ``setting``.
    """
    import difflib

    names = list(known)
    close = difflib.get_close_matches(name, names, n=1)
    remedy = f"did you mean {close[0]}?" if close else f"use one of {', '.join(names)}"
    return InputError(subject, expected=f"a known {kind}", got="an unknown one", remedy=remedy)


def unreadable(path: Path, error: OSError, expected: str = "a readable file") -> InputError:
    """Return the refusal of a file that the system would not read."""
    remedy = "name a file that is there and that you may read"
    return InputError(str(path), expected=expected, got=str(error.strerror), remedy=remedy)


def unwritable(subject: str, error: OSError, expected: str = "a writable folder") -> InputError:
    """Return the refusal of a place that the system would not write to, such as ``--out runs/1``."""
    remedy = "choose another place, with room and with permission to write"
    return InputError(subject, expected=expected, got=str(error.strerror), remedy=remedy)


def outside(subject: str, value: float, low: float, high: float) -> InputError:
    """Return the refusal of a number that is not from ``low`` to ``high``."""
    return InputError(subject, expected=f"{low} to {high}", got=str(value), remedy="choose a number in between")


def for_terminal(text: object) -> str:
    """Return a text, such as a path, with "?" for each character that could steer a terminal or cannot be encoded."""
    return "".join(character if character.isprintable() else "?" for character in str(text))


def first_line(error: Exception) -> str:
    """Return an error's type and message in at most 160 characters of one line, to be what was got."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:160]


class FrozenTeacherError(InputError):
    """A gradient was asked of the teacher, which has no parameters and no backward path by construction."""

    def __init__(self, asked: str) -> None:
        super().__init__(
            asked,
            expected="a request that needs no gradient from the teacher",
            got="a gradient request",
            remedy="the teacher is frozen: its weights are packed K-quant blocks with no derivative; train the student",
        )


class DegenerateDistillationError(InputError):
    """Teacher and student are the same function, so the distillation term would be zero throughout the run."""


class TrainingAborted(Exception):  # noqa: N818 - the run ended early; it is the event, not only the error, that matters
    """Training stopped before its last step. Its message says where and why; ``exit_code`` is the command's.

    1 another reason · 65 loss or gradient not finite · 66 a model file was changed while it was in use · 74 the run's
    folder cannot be written · 75 out of memory · 129 stopped by SIGHUP · 130 by SIGINT · 143 by SIGTERM. (124, a hang,
    needs no exception: nobody is there to catch it.)
    """

    exit_code = 1


class NotFiniteError(TrainingAborted):
    """Loss or gradient of a step is not finite; its update was not made.

    Args:
        terms: loss, its parts, the gradient's norm and the learning rate, by name.
        message: what to say instead of the terms alone.
    """

    exit_code = 65

    def __init__(self, terms: Mapping[str, float], message: str | None = None) -> None:
        self.terms = dict(terms)
        said = ", ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in terms.items())
        super().__init__(message or f"{said}: not finite, no update made")


class FileChangedError(TrainingAborted):
    """A model file that is read as it lies was cut or written to while it was in use.

    Args:
        path: the file.
        num_bytes: its bytes when it was opened.
        got: what was found.
    """

    exit_code = 66  # EX_NOINPUT

    def __init__(self, path: Path, num_bytes: int, got: str) -> None:
        expected, remedy = f"the {num_bytes:,} bytes that were opened", "restore it, and continue a run with --resume"
        super().__init__(f"{path}: expected {expected}, got {got}: it was changed while it was in use; {remedy}")


class RunFolderError(TrainingAborted):
    """The run's folder cannot be written: a full disk, for instance."""

    exit_code = 74


class OutOfMemoryError(TrainingAborted):
    """Host or device has no memory for what was asked."""

    exit_code = 75


# What torch, NumPy, CuPy and the dynamic loader say, which have no type of their own for it.
_NO_MEMORY = ("out of memory", "not enough memory", "can't allocate memory", "unable to allocate")
_NOT_MAPPED = ("failed to map segment", "cannot allocate memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that an allocation, or a mapping of a file or library, failed for want of memory."""
    said = str(error).lower()
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    if isinstance(error, ImportError):
        return any(words in said for words in _NOT_MAPPED)
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(words in said for words in _NO_MEMORY)
    )


class StoppedError(TrainingAborted):
    """Somebody asked the run to stop, by Ctrl-C, SIGTERM or SIGHUP, and it did so after writing a checkpoint.

    Args:
        message: what was kept; empty in a process beside the one that says it.
        signal_number: number of the signal.
    """

    def __init__(self, message: str, signal_number: int) -> None:
        self.exit_code = 128 + signal_number
        super().__init__(message)


def missing_path_remedy(path: Path, otherwise: str, *, pattern: str = "", repository: str = "model") -> str:
    """Return what to do about a path that is not there: nothing is fetched, so for a hub id it says how to fetch.

    Args:
        path: the path as given.
        otherwise: the remedy when it cannot be a hub id (``org/name``).
        pattern: pattern of the files that are needed; empty where all are.
        repository: kind of the repository: ``model`` or ``dataset``.
    """
    name = str(path)
    if not _HUB_ID.fullmatch(name) or path.exists():
        return otherwise
    chosen = f" --include '{pattern}'" if pattern else ""
    kind = "" if repository == "model" else f" --repo-type {repository}"
    command = f"hf download {name}{kind}{chosen} --local-dir DIR"
    return f"nothing is fetched here: for a hub id, {command}, then give the path"
