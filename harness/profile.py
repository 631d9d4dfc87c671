"""Profiles: the classes of machine that claims are judged on, with what each provides and its measured rooflines."""

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from q4kd.harness.claims_folder import default_contracts_folder
from q4kd.harness.store import Store
from q4kd.trainer.errors import InputError
from q4kd.trainer.files import read_bounded
from q4kd.trainer.yaml_lines import Document, parse_yaml

CAPABILITIES = frozenset({"cpu", "cuda", "unified"})
_KEYS = frozenset({"description", "provides", "rooflines"})
_ROOFLINE_KEYS = frozenset({"value", "unit", "measured", "source"})
_GPU_PROFILES = {"GB10": "gb10", "H200": "h200", "H100": "h200"}
_MAX_BYTES = 1 << 20


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
        raise InputError(
            "--profile", expected=f"one of {', '.join(sorted(known))}", got=repr(name), remedy="name a known profile"
        )
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
    value = _mapping(document, (), document.value, _KEYS, _KEYS)
    provides = value["provides"]
    if not isinstance(provides, list) or not provides or not CAPABILITIES.issuperset(map(str, provides)):
        raise document.error(
            ("provides",),
            expected=f"a list of {', '.join(sorted(CAPABILITIES))}",
            got=repr(provides),
            remedy="list what this machine class has",
        )
    rooflines: dict[str, Roofline] = {}
    for key, entry in _mapping(document, ("rooflines",), value["rooflines"], None, frozenset()).items():
        roof = _mapping(document, ("rooflines", key), entry, _ROOFLINE_KEYS, _ROOFLINE_KEYS)
        rate = roof["value"]
        if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 < rate < 1e30:
            raise document.error(
                ("rooflines", key, "value"), expected="a positive rate", got=repr(rate), remedy="measure it"
            )
        rooflines[str(key)] = Roofline(
            value=float(rate),
            unit=str(roof["unit"]),
            measured=_measured(document, key, roof),
            source=str(roof["source"]),
        )
    return Profile(
        name=name,
        description=str(value["description"]),
        provides=frozenset(map(str, provides)),
        rooflines=rooflines,
    )


def _measured(document: Document, key: object, roof: Mapping[str, Any]) -> bool:
    if not isinstance(roof["measured"], bool):
        raise document.error(
            ("rooflines", str(key), "measured"),
            expected="true or false",
            got=repr(roof["measured"]),
            remedy="say whether somebody measured it on this machine class",
        )
    return roof["measured"]


def _mapping(
    document: Document,
    path: tuple[str | int, ...],
    value: object,
    allowed: frozenset[str] | None,
    required: frozenset[str],
) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise document.error(path, expected="a mapping", got=type(value).__name__, remedy="see contracts/profiles")
    unknown = sorted(str(key) for key in value if allowed is not None and key not in allowed)
    missing = sorted(required - value.keys())
    if unknown or missing:
        raise document.error(
            (*path, unknown[0]) if unknown else path,
            expected=f"the keys {', '.join(sorted(allowed or required))}",
            got=f"the unknown key {unknown[0]!r}" if unknown else f"no {missing[0]!r}",
            remedy="see contracts/profiles",
        )
    return value


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
        raise InputError(
            "NVIDIA driver",
            expected="a usable GPU, since a driver is installed",
            got=found.error or "no device",
            remedy="repair the driver (try `nvidia-smi`), or choose with --profile cpu",
        )
    profiles = {
        next((profile for part, profile in _GPU_PROFILES.items() if part in name.upper()), None) for name in found.names
    }
    profile = profiles.pop()
    if profiles or profile is None:
        raise InputError(
            "GPU",
            expected=f"one of {', '.join(_GPU_PROFILES)}",
            got=", ".join(sorted(set(found.names))),
            remedy="choose the nearest profile with --profile",
        )
    return profile


def probe_gpu() -> GpuProbe:
    """Ask NVML for the devices, and the kernel whether a driver is there at all."""
    driver = Path("/proc/driver/nvidia/version").exists() or Path("/dev/nvidia0").exists()
    try:
        names = gpu_names()
    except Exception as error:  # NVML raises its own classes for a missing library, driver or permission
        return GpuProbe(driver_present=driver, error=f"{type(error).__name__}: {error}")
    return GpuProbe(driver_present=driver, names=tuple(names), error=None if names else "NVML lists no device")


def gpu_names() -> Sequence[str]:
    """Return the names of the NVIDIA devices in index order. Raises what NVML raises when it cannot tell."""
    nvml = importlib.import_module("pynvml")
    nvml.nvmlInit()
    try:
        names = []
        for index in range(nvml.nvmlDeviceGetCount()):
            name = nvml.nvmlDeviceGetName(nvml.nvmlDeviceGetHandleByIndex(index))
            names.append(name.decode("utf-8", "replace") if isinstance(name, bytes) else str(name))
        return names
    finally:
        nvml.nvmlShutdown()
