"""Device class, allocation policy and budget: total tables, tested with made-up attributes."""

import itertools
from pathlib import Path

import pytest

from q4kd.trainer.device.devices import (
    ALLOCATION_VARIABLE,
    AllocationPolicy,
    allocation_override,
    allocation_policy,
    check_allocation,
    classify,
    has_visible_gpu,
    mem_available,
    memory_budget,
)
from q4kd.trainer.errors import InputError


@pytest.mark.parametrize(
    ("capability", "integrated", "expected"),
    [
        ((12, 1), True, "unified"),  # GB10
        ((12, 1), None, "unified"),
        ((12, 1), False, "unified"),
        ((8, 9), False, "classic"),  # RTX 4090
        ((9, 0), False, "classic"),  # H100, H200
        ((9, 0), None, "classic"),
        ((12, 0), False, "classic"),  # RTX 5090
        ((8, 7), None, "unified"),  # Orin
        ((19, 7), True, "unified"),  # the future, by its attribute
    ],
)
def test_known_devices(capability: tuple[int, int], integrated: bool | None, expected: str) -> None:
    assert classify(capability, integrated) == expected


def test_the_class_is_total_over_compute_capabilities_0_to_200() -> None:
    for number, integrated in itertools.product(range(201), (True, False, None)):
        found = classify(divmod(number, 10), integrated)
        assert found in ("classic", "unified")
        if integrated:
            assert found == "unified"


def test_the_allocation_table_is_total_and_the_override_wins() -> None:
    for device_class, override in itertools.product(("cpu", "classic", "unified"), (None, "", "0", "1")):
        policy = allocation_policy(device_class, override)  # type: ignore[arg-type]
        expected = {"0": "device", "1": "managed"}.get(
            override or "", "managed" if device_class == "unified" else "device"
        )
        assert policy.allocation == expected
        assert (ALLOCATION_VARIABLE in policy.reason) == bool(override)


@pytest.mark.parametrize("override", ["2", "yes", "managed", "-1"])
def test_another_override_is_refused(override: str) -> None:
    with pytest.raises(InputError, match="0, 1 or unset"):
        allocation_policy("classic", override)


def test_the_override_is_read_from_the_environment() -> None:
    assert allocation_override({ALLOCATION_VARIABLE: "1"}) == "1"
    assert allocation_override({}) is None


def test_managed_memory_is_never_taken_on_a_classic_device() -> None:
    forced = allocation_policy("classic", "1")
    assert forced.allocation == "managed"
    with pytest.raises(InputError, match=ALLOCATION_VARIABLE):
        check_allocation(forced, "classic")
    check_allocation(forced, "unified")
    check_allocation(AllocationPolicy("device", "any"), "classic")


def test_mem_available_is_read_in_bytes(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 100 kB\nMemFree: 3 kB\nMemAvailable:   42 kB\n")
    assert mem_available(meminfo) == 42 * 1024
    meminfo.write_text("MemTotal: 100 kB\n")
    with pytest.raises(OSError, match="MemAvailable"):
        mem_available(meminfo)


def test_only_a_classic_device_is_budgeted_by_its_own_free_memory() -> None:
    assert memory_budget("classic", 7, 100) == 7
    assert memory_budget("unified", 7, 100) == 100
    assert memory_budget("cpu", None, 100) == 100


def test_a_gpu_that_is_there_and_not_hidden_is_seen(tmp_path: Path) -> None:
    control = tmp_path / "nvidiactl"
    assert not has_visible_gpu({}, control)
    control.touch()
    assert [has_visible_gpu(value, control) for value in ({}, {"CUDA_VISIBLE_DEVICES": "0"})] == [True, True]
    assert [has_visible_gpu({"CUDA_VISIBLE_DEVICES": value}, control) for value in ("", "-1")] == [False, False]
