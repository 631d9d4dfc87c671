"""Which files a run learns from, by digest: a resumed run must find them again, whatever lies at their paths by then.

The digests are taken beside the loading of the run, at the speed of SHA-256 (1.8 GB/s and less than a core here).
"""

import hashlib
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from q4kd.trainer.errors import InputError, unreadable
from q4kd.trainer.files import sha256_file
from q4kd.trainer.formats.model_file import ModelFile

# What a student's folder gives to a run: its shape, its weights, its tokenizer. Other files may come and go.
_STUDENT_FILES = (
    "config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "*.jinja",
)


class InputDigests:
    """SHA-256 of a run's teacher and student, taken in the background from now on.

    Args:
        teacher: the teacher's open files; None where a cache, which has an identity of its own, takes their place.
        student: folder of the student.
    """

    def __init__(self, teacher: ModelFile | None, student: Path) -> None:
        self._teacher = None if teacher is None else _Digest(teacher.path, teacher.sha256)
        self._student = _Digest(student, lambda: digest_student(student))

    def as_settings(self) -> dict[str, str]:
        """Return the digests by the name under which a checkpoint keeps them; waits for them.

        Raises:
            InputError: when a file can no longer be read.
        """
        teacher = {} if self._teacher is None else {"teacher_sha256": self._teacher.wait()}
        return {**teacher, "student_sha256": self._student.wait()}


class _Digest:
    """The digest of what lies at a path, taken in a thread that ends with the program."""

    def __init__(self, path: Path, take: Callable[[], str]) -> None:
        self._path, self._take_digest, self._found, self._error = path, take, "", OSError()
        self._thread = threading.Thread(target=self._take, name=f"digest of {path.name}", daemon=True)
        self._thread.start()

    def _take(self) -> None:
        try:
            self._found = self._take_digest()
        except OSError as error:
            self._error = error

    def wait(self) -> str:
        self._thread.join()
        if not self._found:
            raise unreadable(self._path, self._error) from self._error
        return self._found


def digest_student(folder: Path) -> str:
    """Return the SHA-256 over names and contents of a student's config, weights and tokenizer.

    Raises:
        OSError: when one of them cannot be read.
    """
    total = hashlib.sha256()
    for path in sorted({path for pattern in _STUDENT_FILES for path in folder.glob(pattern)}):
        total.update(f"{path.name} {sha256_file(path)}\n".encode())
    return total.hexdigest()


def explain_other_input(path: Path, old: Mapping[str, Any], new: Mapping[str, str]) -> InputError | None:
    """Return the refusal of a run whose inputs are not those of its checkpoint, or None.

    Args:
        path: the checkpoint.
        old: its settings.
        new: the digests of this run's inputs.
    """
    for name, digest in new.items():
        if old.get(name) != digest:
            what = name.removesuffix("_sha256").replace("_", " ")
            expected, got = f"the {what} of that run, sha256 {old.get(name)}", f"another, sha256 {digest}"
            remedy = f"put that {what} back, or start a new run in another folder"
            return InputError(f"--resume from {path}", expected=expected, got=got, remedy=remedy)
    return None
