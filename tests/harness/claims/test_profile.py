from pathlib import Path

import pytest

from q4kd.harness.claims.profile import (
    EXTRAS,
    GpuProbe,
    detect_profile,
    find_extras,
    load_profile,
    load_profiles,
    parse_profile,
)
from q4kd.trainer.errors import InputError

GOOD = "description: d\nprovides: [cpu]\nrooflines: {r: {value: 1.0e9, unit: B/s, measured: true, source: s}}\n"


@pytest.mark.parametrize(
    ("probe", "expected"),
    [
        (GpuProbe(driver_present=False), "cpu"),
        (GpuProbe(driver_present=False, error="NVMLError_LibraryNotFound"), "cpu"),
        (GpuProbe(driver_present=True, names=("NVIDIA GB10",)), "gb10"),
        (GpuProbe(driver_present=True, names=("NVIDIA H200", "NVIDIA H200")), "h200"),
        (GpuProbe(driver_present=True, names=("NVIDIA H100 80GB HBM3",)), "h200"),
    ],
)
def test_the_profile_is_that_of_the_gpu_present(probe: GpuProbe, expected: str) -> None:
    assert detect_profile(lambda: probe) == expected


@pytest.mark.parametrize(
    ("probe", "said"),
    [
        (GpuProbe(driver_present=True, error="NVMLError_DriverNotLoaded"), "NVMLError_DriverNotLoaded"),
        (GpuProbe(driver_present=True), "no device"),
        (GpuProbe(driver_present=True, names=("NVIDIA GeForce RTX 4090",)), "--profile"),
        (GpuProbe(driver_present=True, names=("NVIDIA H200", "NVIDIA GB10")), "--profile"),
    ],
)
def test_an_unusable_or_unknown_gpu_is_an_error_and_never_cpu(probe: GpuProbe, said: str) -> None:
    with pytest.raises(InputError, match=said):
        detect_profile(lambda: probe)


def test_the_installed_profiles_load_and_say_where_their_figures_come_from() -> None:
    profiles = {name: load_profile(name) for name in ("cpu", "h200", "gb10")}
    assert {name: set(profile.provides) for name, profile in profiles.items()} == {
        "cpu": {"cpu"},
        "h200": {"cuda"},
        "gb10": {"cuda", "unified"},
    }
    assert all(roof.source for profile in profiles.values() for roof in profile.rooflines.values())
    for profile in profiles.values():
        # What was derived on paper is not called a measurement, and a measurement names where it can be read.
        assert all(("arithmetic" in roof.source) != roof.measured for roof in profile.rooflines.values())
    assert profiles["cpu"].rooflines == {}


def test_profiles_are_the_installed_ones_and_those_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "profiles").mkdir()
    (tmp_path / "profiles" / "mine.yaml").write_text(GOOD)
    assert [profile.name for profile in load_profiles(tmp_path)] == ["cpu", "gb10", "h200", "mine"]
    assert [profile.name for profile in load_profiles()] == ["cpu", "gb10", "h200"]


def test_a_folder_may_bring_its_own_profile(tmp_path: Path) -> None:
    (tmp_path / "profiles").mkdir()
    (tmp_path / "profiles" / "mine.yaml").write_text(GOOD)
    assert load_profile("mine", tmp_path).rooflines["r"].value == 1e9
    assert load_profile("cpu", tmp_path).name == "cpu"
    with pytest.raises(InputError, match="cpu, gb10, h200, mine"):
        load_profile("other", tmp_path)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("provides: [cpu]", "provides: [gpu]", "p.yaml:2"),
        ("provides: [cpu]", "provides: []", "p.yaml:2"),
        ("description", "descripton", "descripton"),
        (", source: s", "", "source"),
        ("value: 1.0e9", "value: 0", "positive"),
        ("value: 1.0e9", "value: .inf", "positive"),
        ("measured: true", "measured: probably", "true or false"),
    ],
)
def test_a_malformed_profile_is_refused(old: str, new: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        parse_profile("p", GOOD.replace(old, new).encode(), "p.yaml")


@pytest.mark.parametrize(
    ("names", "shown", "two"),
    [
        ((), None, False),
        (("NVIDIA H200",), None, False),
        (("NVIDIA H200", "NVIDIA H200"), None, True),
        (("NVIDIA H200", "NVIDIA H200"), "1", False),
        (("NVIDIA H200", "NVIDIA H200"), "", False),
        (("NVIDIA H200", "NVIDIA H200"), "0,1", True),
        (("NVIDIA H200",), "0,1", False),
    ],
)
def test_two_gpus_are_those_that_cuda_may_use(names: tuple[str, ...], shown: str | None, two: bool) -> None:
    environment = {} if shown is None else {"CUDA_VISIBLE_DEVICES": shown}
    found = find_extras(lambda: GpuProbe(driver_present=True, names=names), environment)
    assert ("two_gpus" in found) == two and found <= EXTRAS.keys()


@pytest.mark.parametrize("there", [True, False])
def test_a_package_is_looked_for_without_importing_it(
    there: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    if there:
        (tmp_path / "bitsandbytes.py").write_text("raise SystemExit('imported')")
        (tmp_path / "bitsandbytes-0.50.2.dist-info").mkdir()
        (tmp_path / "bitsandbytes-0.50.2.dist-info" / "METADATA").write_text("Name: bitsandbytes\nVersion: 0.50.2\n")
    assert ("bitsandbytes" in find_extras(lambda: GpuProbe(driver_present=False), {})) == there
