"""Which backend a teacher gets: a total decision table over override, tensor types, device class and what fits.

``q4k`` keeps the file's blocks and decodes tiles into a bounded scratch; ``dense`` decodes every weight at load.
A quantised teacher is ``q4k`` on every device; one without quantised tensors has nothing to keep packed, and is
``dense`` unless only the file's own types fit.

| override | quantised | dense fits | backend |
|---|---|---|---|
| q4k   | any | any | q4k   |
| dense | any | any | dense |
| auto  | yes | any | q4k   |
| auto  | no  | yes | dense |
| auto  | no  | no  | q4k   |
"""

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from q4kd.trainer.device.devices import DeviceClass
from q4kd.trainer.errors import InputError
from q4kd.trainer.formats.blocks.layout import FORMATS

BACKENDS = ("q4k", "dense")
OVERRIDES = ("auto", *BACKENDS)
BACKEND_VARIABLE = "Q4KD_TEACHER_BACKEND"
DEVICES = ("cpu", "cuda")


@dataclass(frozen=True)
class BackendChoice:
    """The backend and the one-line reason that is announced with it."""

    backend: str
    reason: str


def choose_backend(
    override: str, types: Collection[str], device_class: DeviceClass = "cpu", *, dense_fits: bool = True
) -> BackendChoice:
    """Choose the backend for a teacher whose tensors have these GGML types.

    The device class is named in the reason and has no influence on the answer. ``dense_fits`` says whether the decoded
    weights fit into the memory that is left.

    Raises:
        InputError: for an override that is not one of ``OVERRIDES``.
    """
    if override not in OVERRIDES:
        raise InputError("backend", expected=" or ".join(OVERRIDES), got=repr(override), remedy="choose one of these")
    where = "on the CPU" if device_class == "cpu" else f"on a {device_class} device"
    if override != "auto":
        return BackendChoice(override, f"asked for by override '{override}', {where}")
    quantised = sorted(name for name in set(types) if name in FORMATS and FORMATS[name].is_quantized)
    if quantised:
        held = " and ".join([", ".join(quantised[:-1]), quantised[-1]] if len(quantised) > 1 else quantised)
        return BackendChoice("q4k", f"the file holds {held} tensors, which stay packed {where}")
    if dense_fits:
        return BackendChoice("dense", f"the file holds no quantised tensor, {where}")
    return BackendChoice("q4k", f"decoded weights would not fit {where}; they stay in the file's own types")


def backend_override(option: str | None, environment: Mapping[str, str] = os.environ) -> str:
    """Return the override in force: the option if given, else the environment variable, else ``auto``."""
    return option or environment.get(BACKEND_VARIABLE) or "auto"


def check_device(device: str) -> None:
    """Raise InputError for a name that is not one of ``DEVICES``."""
    if device not in DEVICES:
        raise InputError("--device", expected=" or ".join(DEVICES), got=repr(device), remedy="choose one of these")
