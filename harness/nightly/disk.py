"""Bounded disk of the nightly: which bundles are kept, and how much a night needs before it begins."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from q4kd.harness.claims.profile import Profile, detect_profile
from q4kd.harness.doctor import Line, examine
from q4kd.harness.records.packing import SUFFIXES
from q4kd.harness.runs.user_inputs import GivenFiles
from q4kd.trainer.errors import InputError

# An allowance for the runs, logs and bundle of a night, not a measurement.
_BASE_DISK = 4 << 30
# The 7B experiments make two files of 4.4 GB when no teacher is given.
_MADE_TEACHERS = 10 << 30
# A 0.5B student leaves a checkpoint and a model: 494 M weights x (4 of weights + 8 of AdamW) bytes, twice while one
# replaces the other, and 2 GB of model.
_CHECKPOINTS = 14 << 30
# float32 weights, gradients and two moments, for bfloat16 weights on disk.
_STUDENT_FACTOR = 8
_BASE_MEMORY = 2 << 30
_CUDA_MEMORY = 8 << 30


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """Bundles kept: at most ``keep`` files and ``max_bytes`` bytes."""

    keep: int
    max_bytes: int


def preflight(profile: Profile, given: GivenFiles, out: Path) -> list[Line]:
    """Return what the doctor says, and whether disk, memory and GPU suffice for a night on this profile."""
    cuda = "cuda" in profile.provides
    lines = examine()
    try:
        found = detect_profile()
        fits = found == profile.name or not cuda
        remedy = None if fits else f"--profile {found}"
        lines.append(Line("profile", "ok" if fits else "missing", f"{profile.name}; this machine is {found}", remedy))
    except InputError as error:
        lines.append(Line("profile", "missing" if cuda else "note", str(error), "nvidia-smi"))
    disk = _BASE_DISK + (_CHECKPOINTS if cuda else 0) + (_MADE_TEACHERS if cuda and given.teacher is None else 0)
    lines.append(_enough("disk", shutil.disk_usage(out).free, disk, f"free it, or --out on a larger disk than {out}"))
    memory = needed_memory(given, cuda=cuda)
    lines.append(_enough("free memory", psutil.virtual_memory().available, memory, "end what else runs here"))
    lines += [Line(role, "ok", path.name) for role, path in given.paths()]
    return lines


def needed_memory(given: GivenFiles, *, cuda: bool) -> int:
    """Return the bytes that must be available: the teacher's file, the student's training state, and the programs."""
    teacher = given.teacher.stat().st_size if given.teacher is not None else 0
    student = GivenFiles(student=given.student).size() * _STUDENT_FACTOR
    return _BASE_MEMORY + (_CUDA_MEMORY + teacher + student if cuda else 0)


def _enough(subject: str, have: int, need: int, remedy: str) -> Line:
    found = f"{have / 2**30:.1f} GiB, {need / 2**30:.1f} GiB needed"
    return Line(subject, "ok", found) if have >= need else Line(subject, "missing", found, remedy)


def is_green(bundle: Path) -> bool:
    """Return whether a bundle's findings passed the gate; one that cannot be read is not green."""
    from q4kd.harness.records.store import open_store, read_object

    try:
        return read_object(open_store(bundle), "findings.json").get("exit_code") == 0
    except InputError:
        return False


def packed_in(folder: Path) -> list[Path]:
    """Return the packed bundles of a folder by name, those of before among them."""
    files = (path for path in folder.iterdir() if path.is_file() and not path.is_symlink())
    return sorted(path for path in files if path.name.endswith(SUFFIXES))


def prune_bundles(bundles: Sequence[Path], bounds: Bounds) -> list[Path]:
    """Remove the oldest of a night's own bundles over the bounds, by name, and return them.

    The newest and the newest green one are never removed, even when they alone are over the bounds.
    """
    bundles = sorted(bundles)
    kept = set(bundles[-1:]) | set(next(([path] for path in reversed(bundles) if is_green(path)), []))
    sizes = {path: path.stat().st_size for path in bundles}
    removed: list[Path] = []
    for path in bundles:
        left = [other for other in bundles if other not in removed]
        if len(left) <= bounds.keep and sum(sizes[other] for other in left) <= bounds.max_bytes:
            break
        if path not in kept:
            path.unlink()
            removed.append(path)
    return removed
