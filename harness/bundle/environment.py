"""What a bundle records of its machine: an allow-list. No user names, host names or paths, and of environment variables
only those that limit instruction sets.
"""

import importlib.metadata
import os
import platform
import re
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import psutil

from q4kd.harness.claims.profile import probe_gpu
from q4kd.harness.records.json_types import JsonValue
from q4kd.harness.records.redact import redact
from q4kd.harness.runs.supervise import INSTRUCTION_LIMITS

PACKAGES = (
    "q4kd", "accelerate", "bitsandbytes", "cupy-cuda12x", "cupy-cuda13x", "gguf", "jsonschema",
    "llama-cpp-python", "numpy", "nvidia-ml-py", "psutil", "pytest", "pytest-xdist", "pyyaml", "safetensors",
    "tokenizers", "torch", "transformers", "triton",
)  # fmt: skip
_COMMIT = re.compile(r"[0-9a-f]{40,64}")
_LEVEL = re.compile(r"[A-Za-z0-9_]{1,32}")


def environment(profile: str, source: Path | None = None) -> dict[str, JsonValue]:
    """Describe this machine and this code, whose commit is that of the checkout ``source`` when git can tell.

    What could not be read, such as ``commit``, ``dirty`` or the names under ``gpu``, is None or empty, never invented.
    """
    commit, dirty = git_state(source or Path(__file__).resolve().parent)
    gpu = probe_gpu()
    return {
        "schema": "q4kd-environment/1",
        "profile": profile,
        "commit": commit,
        "dirty": dirty,
        "python": platform.python_version(),
        "implementation": platform.python_implementation(),
        "platform": {"system": platform.system(), "release": platform.release(), "machine": platform.machine()},
        "packages": package_versions(),
        "cpu": {
            "model": _cpu_model(),
            "cores_logical": psutil.cpu_count(),
            "cores_physical": psutil.cpu_count(logical=False),
            "cores_usable": len(os.sched_getaffinity(0)),
            "instruction_limits": instruction_limits(os.environ),
        },
        "memory_bytes": psutil.virtual_memory().total,
        "gpu": {
            "names": list(gpu.names),
            "driver": _driver(),
            "error": redact(gpu.error)[:200] if gpu.driver_present and gpu.error else None,
        },
        "boot_id": _line(Path("/proc/sys/kernel/random/boot_id")),
    }


def instruction_limits(variables: Mapping[str, str]) -> dict[str, JsonValue]:
    """Return the variables that keep runs to older instructions, where they are set to what looks like a level."""
    found = {name: variables[name] for name in INSTRUCTION_LIMITS if name in variables}
    return {name: value if _LEVEL.fullmatch(value) else "not a level" for name, value in found.items()}


def git_state(folder: Path) -> tuple[str | None, bool | None]:
    """Return the commit checked out in ``folder`` and whether tracked files differ; (None, None) without git."""
    commit = _git(folder, "rev-parse", "HEAD")
    if commit is None or not _COMMIT.fullmatch(commit.strip()):
        return None, None
    status = _git(folder, "status", "--porcelain", "--untracked-files=no")
    return commit.strip(), None if status is None else bool(status.strip())


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments],  # noqa: S607 - the git on PATH is the one the user works with
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
        )
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return None
    return done.stdout if done.returncode == 0 else None


def package_versions() -> dict[str, str]:
    """Return the versions of those of ``PACKAGES`` that are installed."""
    found: dict[str, str] = {}
    for name in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _cpu_model() -> str | None:
    line = _line(Path("/proc/cpuinfo"), "model name")
    return line.partition(":")[2].strip() if line is not None else None


def _driver() -> str | None:
    match = re.search(r"\b(\d{2,4}(?:\.\d+)+)\b", _line(Path("/proc/driver/nvidia/version")) or "")
    return match.group(1) if match else None


def _line(path: Path, start: str = "") -> str | None:
    """Return the first line of a file that starts so, at most 300 characters of it; None without one."""
    with suppress(OSError):
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith(start):
                return line.strip()[:300]
    return None
