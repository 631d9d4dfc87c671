"""Faults in the choice of backend, device class and allocation."""

import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from q4kd.harness.runs.faults import Call, patch

if TYPE_CHECKING:
    from torch import Tensor

    from q4kd.trainer.teacher.cpu.weights import DenseMatrix

_CLASSIFY = "q4kd.trainer.device.devices:classify"
_POLICY = "q4kd.trainer.device.devices:allocation_policy"
_CHOOSE_BACKEND = "q4kd.trainer.device.backend:choose_backend"
_PRODUCT = "q4kd.trainer.teacher.cpu.weights:DenseMatrix.product"
_BUILD_MATRIX = "q4kd.trainer.teacher.cpu.weights:build_matrix"
_EMIT = "q4kd.trainer.events:EventLog.emit"
_ALLOCATE_BYTES = "q4kd.trainer.device.allocation:allocate_bytes"
_Classify = Callable[[tuple[int, int], bool | None], str]
_Policy = Callable[[str, str | None], object]


@patch("dispatch", "override-ignored", "--backend and its variable change nothing", _CHOOSE_BACKEND)
def _override_ignored(original: Call, _override: str, *rest: object, **options: object) -> object:
    return original("auto", *rest, **options)


@patch("dispatch", "environment-first", "the variable beats the option", "q4kd.trainer.device.backend:backend_override")
def _environment_first(_original: Call, option: str | None, environment: Mapping[str, str] | None = None) -> str:
    import os

    variables = os.environ if environment is None else environment
    return variables.get("Q4KD_TEACHER_BACKEND") or option or "auto"


@patch(
    "dispatch",
    "hopper-is-unified",
    "every device from 9.0 on is taken for one that shares the host's memory",
    _CLASSIFY,
)
def _hopper_is_unified(original: _Classify, capability: tuple[int, int], integrated: bool | None) -> str:
    # A rule of thumb says that devices from 9.0 on share memory.
    return "unified" if capability >= (9, 0) else original(capability, integrated)


@patch("dispatch", "allocation-override-ignored", "the allocation override changes nothing", _POLICY)
def _allocation_override_ignored(original: _Policy, device_class: str, _override: str | None) -> object:
    return original(device_class, None)


@patch("dispatch", "new-devices-without-class", "compute capabilities from 13.0 on are of no class", _CLASSIFY)
def _new_devices_without_class(original: _Classify, capability: tuple[int, int], integrated: bool | None) -> str:
    # The table ends with the devices of its day.
    return original(capability, integrated) if capability < (13, 0) else "unknown"


@patch("dispatch", "any-override-is-on", "any allocation override that is not 0 means managed memory", _POLICY)
def _any_override_is_on(original: _Policy, device_class: str, override: str | None) -> object:
    return original(device_class, "1" if override not in (None, "", "0") else override)


@patch("dispatch", "empty-override-is-on", "an empty allocation override means managed memory", _POLICY)
def _empty_override_is_on(original: _Policy, device_class: str, override: str | None) -> object:
    return original(device_class, "1" if override == "" else override)


@patch("dispatch", "coarse-dense", "the dense backend keeps weights in four bits of their largest value", _PRODUCT)
def _coarse_dense(_original: Call, self: "DenseMatrix", x: "Tensor") -> "Tensor":
    weight = self._weight_RK
    rounded = (weight / weight.abs().max() * 7).round() * weight.abs().max() / 7
    return x @ rounded.T


@patch("dispatch", "packed-said-dense", "the dense backend is announced, and packed matrices are used", _BUILD_MATRIX)
def _packed_said_dense(original: Call, _backend: str, *rest: object) -> object:
    return original("q4k", *rest)


@patch("dispatch", "backend-misreported", "the event of the choice always says dense", _EMIT)
def _backend_misreported(original: Call, self: object, event: str, **fields: object) -> None:
    original(self, event, **(fields | {"backend": "dense"} if event == "backend_selected" else fields))


@patch("dispatch", "idle-steps", "the device waits twice the time of each step", "q4kd.trainer.train.step:train_step")
def _idle_steps(original: Call, *arguments: object) -> object:
    started = time.monotonic()
    result = original(*arguments)
    time.sleep(2 * (time.monotonic() - started))  # as in a run whose teacher computes on the host
    return result


@patch("dispatch", "short-allocation", "allocations end at 30 GB in silence", _ALLOCATE_BYTES)
def _short_allocation(original: Call, num_bytes: int, allocation: str) -> object:
    # On a GB10 cudaMalloc reaches about this much before its window ends.
    return original(min(num_bytes, 30_000_000_000), allocation)
