"""Real files that a person gives a run in the place of made ones: a teacher, a student, a text.

A contract can name neither a path nor a model: whoever starts the run does, with ``--teacher``, ``--student`` and
``--data``. The experiments at the size of 7B then read these instead of random weights. ``plan.json`` records the
names, ``inputs.json`` the digests; no path gets into the bundle.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from q4kd.trainer.errors import InputError
from q4kd.trainer.files import sha256_file

Role = Literal["teacher", "student", "data"]
ROLES: tuple[Role, ...] = get_args(Role)
# Which made inputs (see inputs/demo.py and subjects/cuda/accelerator.py) each role stands in for.
REPLACES: dict[str, Role] = {
    "teacher-7b.gguf": "teacher",
    "teacher-7b-tokens.gguf": "teacher",
    "student-0.5b": "student",
    "argparse.txt": "data",
}
_MAX_FILES = 10_000
_HUB_ID = re.compile(r"([A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95})(?::([\w.-][\w./-]{0,199}))?")
# What a student folder needs of a repository: not other frameworks' copies of the same weights.
_STUDENT_FILES = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja")


@dataclass(frozen=True, kw_only=True)
class GivenFiles:
    """Local paths by role, checked by ``resolve_given``; None where the run makes its own input."""

    teacher: Path | None = None
    student: Path | None = None
    data: Path | None = None

    def path(self, name: str) -> Path | None:
        """Return the file that stands in for the input ``name``, or None when the run makes it."""
        role = REPLACES.get(name)
        return None if role is None else self._paths()[role]

    def pair(self) -> tuple[Path, Path, Path] | None:
        """Return teacher, student and data where all three were given, else None."""
        if self.teacher is None or self.student is None or self.data is None:
            return None
        return self.teacher, self.student, self.data

    def paths(self) -> list[tuple[Role, Path]]:
        """Return what was given, in the order of the roles."""
        return [(role, path) for role, path in self._paths().items() if path is not None]

    def names(self) -> dict[str, str]:
        """Return the last part of each given path by role, for ``plan.json``."""
        return {role: path.name for role, path in self.paths()}

    def digests(self) -> dict[str, dict[str, str | int]]:
        """Return ``{"given/<role>/<name>": {"sha256", "bytes"}}`` of every file, those of folders included."""
        found: dict[str, dict[str, str | int]] = {}
        for role, path in self.paths():
            for file in _files(path):
                name = file.relative_to(path.parent).as_posix()
                found[f"given/{role}/{name}"] = {"sha256": sha256_file(file), "bytes": file.stat().st_size}
        return found

    def size(self) -> int:
        """Return the bytes of all given files."""
        return sum(file.stat().st_size for _, path in self.paths() for file in _files(path))

    def options(self) -> list[str]:
        """Return the options that hand the same files to another command."""
        return [word for role, path in self.paths() for word in (f"--{role}", str(path))]

    def _paths(self) -> dict[Role, Path | None]:
        return {role: getattr(self, role) for role in ROLES}


def _files(path: Path) -> Iterator[Path]:
    """Yield a file with the other shards of its model, or a folder's files in order (InputError for over 10,000)."""
    if path.is_file():
        from q4kd.trainer.formats.gguf.split import model_paths

        yield from model_paths(path)
        return
    for number, file in enumerate(sorted(path.rglob("*"))):
        if number > _MAX_FILES:
            expected = f"at most {_MAX_FILES} files"
            raise InputError(str(path), expected=expected, got="more", remedy="name a smaller folder")
        if file.is_file() and not any(part.startswith(".") for part in file.relative_to(path).parts):
            yield file


def resolve_given(teacher: str | None, student: str | None, data: str | None) -> GivenFiles:
    """Find what was named and check that it is what its role needs.

    Args:
        teacher: a GGUF file, or ``org/name[:file]`` on the Hugging Face hub, looked for in its local cache first.
        student: a folder with a config.json, or ``org/name``.
        data: a text or JSONL file, or a folder.

    Raises:
        InputError: for what is not there or is something else.
        ModuleNotFoundError: for a hub id without huggingface_hub.
    """
    found = GivenFiles(
        teacher=_resolve("teacher", teacher), student=_resolve("student", student), data=_resolve("data", data)
    )
    if found.teacher is not None:
        _check_teacher(found.teacher)
    if found.student is not None and not (found.student / "config.json").is_file():
        expected = "a Hugging Face folder with a config.json"
        remedy = "name the folder, or an id such as Qwen/Qwen2.5-Coder-0.5B-Instruct"
        raise InputError(f"--student {found.student}", expected=expected, got="none", remedy=remedy)
    return found


def _check_teacher(path: Path) -> None:
    from q4kd.trainer.formats.open import open_model

    if not path.is_file():
        raise InputError(f"--teacher {path}", expected="a GGUF file", got="a folder", remedy="name the file in it")
    with path.open("rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise InputError(f"--teacher {path}", expected="a GGUF file", got=repr(magic), remedy="name a GGUF file")
    open_model(path)  # refuses what cannot be used before an hour is spent on it


def _resolve(role: Role, text: str | None) -> Path | None:
    if text is None:
        return None
    path = Path(text).expanduser()
    if path.exists():
        # Not resolved further than its folder: a file of the hub's cache is a link whose target has no name.
        return path.parent.resolve() / path.name if path.name else path.resolve()
    match = _HUB_ID.fullmatch(text)
    if role == "data" or match is None:
        expected = "an existing path" if role == "data" else "an existing path, or a hub id org/name[:file]"
        got = "neither" if role != "data" else "none"
        remedy = "name what is there; a relative path starts at the working folder"
        raise InputError(f"--{role} {text}", expected=expected, got=got, remedy=remedy)
    return _from_hub(role, match.group(1), match.group(2))


def _from_hub(role: Role, repository: str, file: str | None) -> Path:
    """Return the local copy of a hub file or repository: from the cache when it is there, else downloaded."""
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def fetch(local: bool) -> Path:
        options: dict[str, Any] = {"repo_id": repository, "local_files_only": local}
        if role == "student":
            return Path(huggingface_hub.snapshot_download(**options, allow_patterns=list(_STUDENT_FILES)))
        if file is not None:
            from q4kd.trainer.formats.gguf.split import shard_names

            # The shards of a split model belong together.
            paths = {name: huggingface_hub.hf_hub_download(**options, filename=name) for name in shard_names(file)}
            return Path(paths[file])
        if local:
            folder = Path(huggingface_hub.snapshot_download(**options, allow_patterns=["*.gguf"]))
            names = [path.relative_to(folder).as_posix() for path in folder.rglob("*.gguf")]
        else:
            names = [name for name in huggingface_hub.list_repo_files(repository) if name.endswith(".gguf")]
        return Path(huggingface_hub.hf_hub_download(**options, filename=choose_gguf(repository, names)))

    try:
        try:
            return fetch(local=True)
        except (LocalEntryNotFoundError, InputError):
            print(f"{repository}: not in the local cache, downloading", flush=True)
            return fetch(local=False)
    except InputError:
        raise
    except Exception as error:  # No network, no such file, no permission: the hub client and httpx have types for each.
        expected, got = "a repository that can be read", f"{type(error).__name__}: {error}"[:200]
        remedy = f"check the id and the network, or download it elsewhere: hf download {repository}"
        raise InputError(f"--{role} {repository}", expected=expected, got=got, remedy=remedy) from error


def choose_gguf(repository: str, names: list[str]) -> str:
    """Return the one whole Q4_K_M file of a repository.

    Raises:
        InputError: when there is none or more than one.
    """
    whole = [name for name in names if "q4_k_m" in name.lower() and not re.search(r"-\d{5}-of-\d{5}\.gguf$", name)]
    if len(whole) != 1:
        expected = "one whole file with q4_k_m in its name"
        got, remedy = f"{len(whole)} of {len(names)} GGUF files", f"name it: {repository}:FILE.gguf"
        raise InputError(f"--teacher {repository}", expected=expected, got=got, remedy=remedy)
    return whole[0]
