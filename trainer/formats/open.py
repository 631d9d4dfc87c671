"""Open a teacher file with the reader of its container."""

import stat
from pathlib import Path

from q4kd.trainer.errors import InputError, missing_path_remedy
from q4kd.trainer.formats.apr.reader import open_apr
from q4kd.trainer.formats.gguf.reader import open_gguf
from q4kd.trainer.formats.gguf.unsupported import Unsupported, find_unsupported
from q4kd.trainer.formats.model_file import ModelFile

_APR_MAGICS = (b"APR\0", b"APR2", b"APRN")


def open_model(path: Path) -> ModelFile:
    """Open and check a teacher, GGUF or .apr; the content decides which, not the name.

    Raises:
        InputError: for a file of another kind, a truncated one, one with an architecture, tensor or type that is not
            implemented, or whose shapes contradict its metadata.
    """
    try:
        kind = path.stat().st_mode
        if not (stat.S_ISREG(kind) or stat.S_ISDIR(kind)):  # A pipe would be waited for.
            expected, got = "a file that can be mapped", "a pipe, socket or device"
            raise InputError(str(path), expected=expected, got=got, remedy="write it to a file first")
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        remedy = missing_path_remedy(path, "name a file that is there", pattern="*.gguf")
        if path.is_dir():
            remedy = f"q4kd export {path} --format gguf makes one of a Hugging Face folder"
        raise InputError(str(path), expected="a readable model file", got=str(error.strerror), remedy=remedy) from error
    return open_apr(path) if magic in _APR_MAGICS else open_gguf(path)


def explain_refusal(path: Path) -> list[Unsupported]:
    """Return every part that is not supported of a GGUF that ``open_model`` refused; nothing where that is no reason.

    A file that cannot be read, or is none, has no such parts, and an .apr is not looked at.
    """
    if not path.is_file():
        return []
    try:
        return find_unsupported(path)
    except InputError:
        return []
