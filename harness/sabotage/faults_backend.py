"""Faults in the choice of backend, device class and allocation."""

import time
from collections.abc import Callable
from typing import Any

from q4kd.harness.sabotage.registry import declare, replace


def _override_ignored() -> None:
    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        return lambda override, *rest, **options: original("auto", *rest, **options)

    replace("q4kd.trainer.backend:choose_backend", make)


def _environment_first() -> None:
    def make(_original: Callable[..., Any]) -> Callable[..., Any]:
        import os

        def override(option: str | None, environment: Any = os.environ) -> str:
            return environment.get("Q4KD_TEACHER_BACKEND") or option or "auto"

        return override

    replace("q4kd.trainer.backend:backend_override", make)


def _hopper_is_unified() -> None:
    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        # As a rule of thumb "9.0 and later share memory" would have it.
        return lambda capability, integrated: "unified" if capability >= (9, 0) else original(capability, integrated)

    replace("q4kd.trainer.device:classify", make)


def _allocation_override_ignored() -> None:
    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        return lambda device_class, _override: original(device_class, None)

    replace("q4kd.trainer.device:allocation_policy", make)


def _new_devices_without_class() -> None:
    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        # A table that ends with the devices of its day.
        return lambda capability, integrated: original(capability, integrated) if capability < (13, 0) else "unknown"

    replace("q4kd.trainer.device:classify", make)


def _any_override_is_on() -> None:
    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        return lambda device_class, override: original(
            device_class, "1" if override not in (None, "", "0") else override
        )

    replace("q4kd.trainer.device:allocation_policy", make)


def _empty_override_is_on() -> None:
    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        return lambda device_class, override: original(device_class, "1" if override == "" else override)

    replace("q4kd.trainer.device:allocation_policy", make)


def _noisy_dense() -> None:
    """The dense backend drops the lowest bits of every weight, as a half-precision cache would."""

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def product(self: Any, x: Any) -> Any:
            weight = self._weight_RK
            rounded = (weight / weight.abs().max() * 7).round() * weight.abs().max() / 7
            return x @ rounded.T

        return product

    replace("q4kd.trainer.weights:DenseMatrix.product", make)


def _idle_steps() -> None:
    """Wait before each step, as a run does whose teacher computes on the host."""

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def step(*arguments: Any) -> Any:
            time.sleep(5)
            return original(*arguments)

        return step

    replace("q4kd.trainer.step:train_step", make)


def _short_allocation() -> None:
    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        # About what cudaMalloc reaches on a GB10 before its window ends.
        return lambda num_bytes, allocation: original(min(num_bytes, 30_000_000_000), allocation)

    replace("q4kd.trainer.cuda.allocation:allocate_bytes", make)


def _backend_misreported() -> None:
    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def emit(self: Any, event: str, **fields: Any) -> None:
            original(self, event, **(fields | {"backend": "dense"} if event == "backend_selected" else fields))

        return emit

    replace("q4kd.trainer.events:EventLog.emit", make)


for _name, _title, _target, _apply in (
    (
        "override-ignored",
        "--backend and its variable change nothing",
        "q4kd.trainer.backend:choose_backend",
        _override_ignored,
    ),
    (
        "environment-first",
        "the variable beats the option",
        "q4kd.trainer.backend:backend_override",
        _environment_first,
    ),
    (
        "hopper-is-unified",
        "every device from 9.0 on is taken for one that shares the host's memory",
        "q4kd.trainer.device:classify",
        _hopper_is_unified,
    ),
    (
        "allocation-override-ignored",
        "the allocation override changes nothing",
        "q4kd.trainer.device:allocation_policy",
        _allocation_override_ignored,
    ),
    (
        "new-devices-without-class",
        "compute capabilities from 13.0 on are of no class",
        "q4kd.trainer.device:classify",
        _new_devices_without_class,
    ),
    (
        "any-override-is-on",
        "any allocation override that is not 0 means managed memory",
        "q4kd.trainer.device:allocation_policy",
        _any_override_is_on,
    ),
    (
        "empty-override-is-on",
        "an empty allocation override means managed memory",
        "q4kd.trainer.device:allocation_policy",
        _empty_override_is_on,
    ),
    (
        "coarse-dense",
        "the dense backend keeps weights in four bits of their largest value",
        "q4kd.trainer.weights:DenseMatrix.product",
        _noisy_dense,
    ),
    (
        "backend-misreported",
        "the event of the choice always says dense",
        "q4kd.trainer.events:EventLog.emit",
        _backend_misreported,
    ),
    (
        "idle-steps",
        "the device waits five seconds before each step",
        "q4kd.trainer.step:train_step",
        _idle_steps,
    ),
    (
        "short-allocation",
        "allocations end at 30 GB in silence",
        "q4kd.trainer.cuda.allocation:allocate_bytes",
        _short_allocation,
    ),
):
    declare("dispatch", _name, _title, _apply, _target)
