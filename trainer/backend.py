"""Which backend a teacher gets: a total decision table over override, device and tensor types.

``q4k`` keeps the file's blocks and decodes tiles; ``dense`` decodes every weight at load. Any K-quant tensor makes
``q4k`` the default on every device; a teacher without one has nothing to keep packed.
"""

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from q4kd.trainer.errors import InputError
from q4kd.trainer.formats import FORMATS

BACKENDS = ("q4k", "dense")
OVERRIDES = ("auto", *BACKENDS)
BACKEND_VARIABLE = "Q4KD_TEACHER_BACKEND"
DEVICES = ("cpu",)


@dataclass(frozen=True)
class BackendChoice:
    """The backend and the one-line reason that is announced with it."""

    backend: str
    reason: str


def choose_backend(override: str, types: Collection[str]) -> BackendChoice:
    """Choose the backend for a teacher whose tensors have these GGML types.

    Raises:
        InputError: for an override that is not one of ``OVERRIDES``.
    """
    if override not in OVERRIDES:
        raise InputError("backend", expected=" or ".join(OVERRIDES), got=repr(override), remedy="choose one of these")
    if override != "auto":
        return BackendChoice(override, f"asked for by override '{override}'")
    k_quants = sorted(name for name in set(types) if name in FORMATS and FORMATS[name].is_k_quant)
    if k_quants:
        return BackendChoice("q4k", f"the file holds {' and '.join(k_quants)} tensors, which stay packed")
    return BackendChoice("dense", "the file holds no K-quant tensor")


def backend_override(option: str | None, environment: Mapping[str, str] = os.environ) -> str:
    """Return the override in force: the option if given, else the environment variable, else ``auto``."""
    return option or environment.get(BACKEND_VARIABLE) or "auto"


def check_device(device: str) -> None:
    """Refuse a device that this version has no backend for.

    Raises:
        InputError: for any device but the CPU.
    """
    if device not in DEVICES:
        raise InputError(
            "--device",
            expected=" or ".join(DEVICES),
            got=repr(device),
            remedy="the CUDA backend is not built yet; use cpu",
        )
