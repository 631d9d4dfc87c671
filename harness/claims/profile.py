"""Profiles: the classes of machine that claims are judged on, with what each provides and its measured rooflines.

What machines of one class differ in (``EXTRAS``) is looked for before anything runs, and kept in the plan.
"""

import importlib.metadata
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from q4kd.harness.claims.folder import default_contracts_folder
from q4kd.harness.claims.schema_match import Schema
from q4kd.harness.records.json_types import JsonObject, JsonRecord
from q4kd.harness.records.store import Store
from q4kd.harness.runs.memory import device_name, nvml_session
from q4kd.harness.runs.user_inputs import ROLES
from q4kd.trainer.errors import InputError
from q4kd.trainer.files import read_bounded
from q4kd.trainer.yaml_lines import parse_yaml

CAPABILITIES = frozenset({"cpu", "cuda", "unified"})
# What a machine of any class may have beside what its profile provides, and what is said where it has not.
EXTRAS: Mapping[str, str] = {
    "two_gpus": "this machine has fewer than two GPUs that CUDA may use",
    "bitsandbytes": "bitsandbytes is not installed (pip install 'q4kd[bnb]')",
    "llama_cpp": "llama.cpp is not installed (pip install llama-cpp-python, which builds for minutes)",
    "no_gpu": "this machine has a GPU, on which the same is claimed",
    "real_files": "no files were given (--teacher, --student and --data; see nox -s real)",
    "teacher_30b": "its file of 18.6 GB is made only where Q4KD_TEACHER_30B=1 asks for it",
}
# The variable by which a person asks for what takes much disk.
ASKED_FOR: Mapping[str, str] = {"teacher_30b": "Q4KD_TEACHER_30B"}
# The extras that are packages, and the distribution of each.
EXTRA_PACKAGES: Mapping[str, str] = {"bitsandbytes": "bitsandbytes", "llama_cpp": "llama-cpp-python"}
_GPU_PROFILES = {"GB10": "gb10", "H200": "h200", "H100": "h200"}
_MAX_BYTES = 1 << 20
_ROOFLINE: JsonObject = {
    "type": "object",
    "additionalProperties": False,
    "required": ["value", "unit", "measured", "source"],
    "properties": {
        "value": {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1e30, "description": "a positive rate"},
        "unit": True,
        "measured": {"type": "boolean", "description": "true or false: was it measured on this machine class?"},
        "source": True,
    },
}
_SCHEMA = Schema(
    {
        "type": "object",
        "additionalProperties": False,
        "required": ["description", "provides", "rooflines"],
        "properties": {
            "description": True,
            "provides": {"type": "array", "minItems": 1, "items": {"enum": sorted(CAPABILITIES)}},
            "rooflines": {"type": "object", "additionalProperties": _ROOFLINE},
        },
    }
)


@dataclass(frozen=True, kw_only=True)
class Roofline:
    """An upper bound on a machine's rate, such as FLOP/s or B/s, and where the figure comes from."""

    value: float
    unit: str
    measured: bool
    source: str


@dataclass(frozen=True, kw_only=True)
class Profile:
    """A machine class. ``provides`` holds capabilities: cpu (the CPU path), cuda, unified (one memory for both).

    ``rooflines`` are by name: ``bf16_flops`` (FLOP/s of dense bf16 products) and ``bytes_per_s`` (memory traffic) are
    the two that feasibility is judged by.
    """

    name: str
    description: str
    provides: frozenset[str]
    rooflines: Mapping[str, Roofline]


@dataclass(frozen=True, kw_only=True)
class GpuProbe:
    """What the machine shows of NVIDIA: device names, or why they could not be read although a driver is there."""

    driver_present: bool
    names: tuple[str, ...] = ()
    error: str | None = None


def load_profile(name: str, folder: Path | None = None) -> Profile:
    """Load ``profiles/<name>.yaml`` of a contracts folder, or of the installed one when the folder has none.

    Raises:
        InputError: no such profile, listing those there are; or a malformed file.
    """
    return parse_profile(name, profile_bytes(name, folder), f"profiles/{name}.yaml")


def profile_bytes(name: str, folder: Path | None = None) -> bytes:
    """Return the bytes of the profile's file (see ``load_profile``), which a bundle keeps beside its contracts."""
    known = _profile_files(folder)
    if name not in known:
        expected = f"one of {', '.join(sorted(known))}"
        raise InputError("--profile", expected=expected, got=repr(name), remedy="name a known profile")
    return read_bounded(known[name], _MAX_BYTES)


def load_profiles(folder: Path | None = None) -> list[Profile]:
    """Load every profile that ``load_profile`` knows for a contracts folder, sorted by name (InputError as it does)."""
    return [load_profile(name, folder) for name in sorted(_profile_files(folder))]


def _profile_files(folder: Path | None) -> dict[str, Path]:
    known: dict[str, Path] = {}
    for root in (default_contracts_folder(), folder):
        if root is not None:
            known.update((file.stem, file) for file in sorted((root / "profiles").glob("*.yaml")))
    return known


def read_profile(name: str, store: Store) -> Profile:
    """Load the profile that a bundle was made with, ``contracts/profiles/<name>.yaml`` of its store."""
    file = f"contracts/profiles/{name}.yaml"
    return parse_profile(name, store.read(file, _MAX_BYTES), file)


def parse_profile(name: str, data: bytes, origin: str) -> Profile:
    """Parse a profile.

    Raises:
        InputError: quoting the line, for an unknown key, an unknown capability or a roofline without a source.
    """
    document = parse_yaml(data, origin)
    _SCHEMA.require(document, (), document.value, "write it as those in contracts/profiles are written")
    value = cast("JsonRecord", document.value)
    rooflines = {
        str(key): Roofline(
            value=float(roof["value"]), unit=str(roof["unit"]), measured=roof["measured"], source=str(roof["source"])
        )
        for key, roof in value["rooflines"].items()
    }
    return Profile(
        name=name, description=str(value["description"]), provides=frozenset(value["provides"]), rooflines=rooflines
    )


def detect_profile(probe: Callable[[], GpuProbe] | None = None) -> str:
    """Return the profile of the GPU that is present, else ``cpu``.

    Raises:
        InputError: a GPU is present but unusable or of no known class. Falling back to ``cpu`` would put every CUDA
            claim out of scope without a word.
    """
    found = (probe or probe_gpu)()
    if not found.names:
        if not found.driver_present:
            return "cpu"
        got, remedy = found.error or "no device", "repair the driver (try `nvidia-smi`), or choose with --profile cpu"
        raise InputError("NVIDIA driver", expected="a usable GPU, since a driver is installed", got=got, remedy=remedy)
    profiles = {
        next((profile for part, profile in _GPU_PROFILES.items() if part in name.upper()), None) for name in found.names
    }
    profile = profiles.pop()
    if profiles or profile is None:
        got, remedy = ", ".join(sorted(set(found.names))), "choose the nearest profile with --profile"
        raise InputError("GPU", expected=f"one of {', '.join(_GPU_PROFILES)}", got=got, remedy=remedy)
    return profile


def probe_gpu() -> GpuProbe:
    """Ask NVML for the devices, and the kernel whether a driver is there at all."""
    driver = Path("/proc/driver/nvidia/version").exists() or Path("/dev/nvidia0").exists()
    try:
        names = gpu_names()
    except Exception as error:  # NVML raises its own classes for a missing library, driver or permission
        return GpuProbe(driver_present=driver, error=f"{type(error).__name__}: {error}")
    return GpuProbe(driver_present=driver, names=tuple(names), error=None if names else "NVML lists no device")


def find_extras(
    probe: Callable[[], GpuProbe] | None = None,
    environment: Mapping[str, str] = os.environ,
    given: Collection[str] = ROLES,
) -> frozenset[str]:
    """Return which of ``EXTRAS`` this machine and the run have. Nothing is imported, and no GPU is touched.

    ``given`` are the roles of given files. Faults are shown without any: what stands in for them is made.
    """
    names = (probe or probe_gpu)().names
    shown = environment.get("CUDA_VISIBLE_DEVICES")
    gpus = len(names) if shown is None else min(len(names), len([part for part in shown.split(",") if part.strip()]))
    has = {"two_gpus": gpus >= 2, "no_gpu": not names, "real_files": set(given) == set(ROLES)}
    has |= {extra: environment.get(variable) == "1" for extra, variable in ASKED_FOR.items()}
    for extra, package in EXTRA_PACKAGES.items():
        has[extra] = False
        with suppress(importlib.metadata.PackageNotFoundError):
            has[extra] = bool(importlib.metadata.version(package))
    return frozenset(name for name in EXTRAS if has[name])


def gpu_names() -> Sequence[str]:
    """Return the names of the NVIDIA devices in index order. Raises what NVML raises when it cannot tell."""
    with nvml_session() as library:
        handles = map(library.nvmlDeviceGetHandleByIndex, range(library.nvmlDeviceGetCount()))
        return [device_name(library, handle) for handle in handles]
