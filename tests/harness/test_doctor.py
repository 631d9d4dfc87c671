import re
from pathlib import Path

import pytest

from q4kd.harness import doctor
from q4kd.harness.doctor import Line, examine, gpu_lines, memory_lines, show, wheel_lines
from q4kd.harness.requirements import extra_of, requirements


def everything(name):
    return None if name.startswith("cupy") else "1.0"


def states(lines):
    return {line.subject: line.state for line in lines}


def test_a_missing_package_names_the_extra_that_brings_it():
    lines = wheel_lines(lambda name: None if name in ("torch", "gguf") else everything(name), None)
    by_name = {line.subject: line for line in lines}
    assert by_name["torch"] == Line("torch", "missing", "not installed", "pip install 'q4kd[train]'")
    assert by_name["gguf"].remedy == "pip install --upgrade q4kd"
    assert by_name["numpy"] == Line("numpy", "ok", "1.0")


@pytest.mark.parametrize(
    ("cuda", "state", "remedy"),
    [
        (None, "note", None),
        (13, "missing", "pip install 'q4kd[cuda13]'"),
        (12, "missing", "pip install 'q4kd[cuda12]'"),
    ],
)
def test_cupy_is_needed_only_with_a_gpu_and_for_its_driver(cuda, state, remedy):
    line = wheel_lines(everything, cuda)[-1]
    assert (line.subject, line.state, line.remedy) == ("cupy", state, remedy)


@pytest.mark.parametrize(("cuda", "noted"), [(None, {"mkdocs-material"}), (13, {"mkdocs-material", "liger-kernel"})])
def test_what_a_run_may_do_without_is_noted_where_it_has_a_use(cuda, noted):
    absent = ("liger-kernel", "mkdocs-material")
    lines = {
        line.subject: line for line in wheel_lines(lambda name: None if name in absent else everything(name), cuda)
    }
    assert {name for name, line in lines.items() if line.state == "note"} - {"cupy"} == noted
    assert lines["mkdocs-material"].remedy == "pip install 'q4kd[docs]'"
    assert lines["bitsandbytes"].state == "ok"


@pytest.mark.parametrize("name", ["pyarrow", "peft"])
def test_training_packages_are_needed(name):
    lines = {line.subject: line for line in wheel_lines(lambda n: None if n == name else everything(n), None)}
    assert (lines[name].state, lines[name].remedy) == ("missing", "pip install 'q4kd[train]'")


def test_every_dependency_is_looked_for_and_every_extra_is_known():
    import tomllib

    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    declared = {None: project["dependencies"], **project["optional-dependencies"]}
    name = re.compile(r"[A-Za-z0-9-]+")
    expected = {(name.match(entry)[0], extra) for extra, entries in declared.items() for entry in entries}
    assert set(requirements()) == expected
    shown = {line.subject for line in wheel_lines(everything, 13)}
    assert shown - {"cupy"} == {package for package, extra in expected if extra in (None, "train", *doctor._OPTIONAL)}
    assert set(declared) - {None, "train", *doctor._OPTIONAL} == {"cuda13", "cuda12", "dev"}


@pytest.mark.parametrize(
    ("module", "extra"),
    [("torch", "train"), ("huggingface_hub", "train"), ("cupy", "cuda13"), ("liger_kernel", "liger"), ("numpy", None),
     ("nothing", None)],
)  # fmt: skip
def test_a_module_names_the_extra_that_brings_it(module, extra):
    assert extra_of(module) == extra


def test_two_cupy_wheels_overwrite_each_other():
    line = wheel_lines(lambda name: "14.0", 13)[-1]
    assert line.state == "missing"
    assert "overwrite" in line.found
    assert line.remedy.startswith("pip uninstall")


def test_a_device_without_its_own_memory_is_unified():
    devices = [
        doctor.GpuDevice("NVIDIA GB10", (12, 1), None),
        doctor.GpuDevice("NVIDIA H200", (9, 0), 141 << 30),
    ]
    unified, shared, classic, own = gpu_lines(devices)
    assert "managed memory" in shared.found and "MemAvailable" in shared.found
    assert "device memory" in own.found and "own free memory" in own.found
    assert "12.1" in unified.found
    assert "unified memory" in unified.found
    assert "141 GiB of device memory" in classic.found


def test_a_driver_that_does_not_answer_is_not_the_same_as_no_driver(monkeypatch):
    monkeypatch.setattr(doctor.Path, "exists", lambda path: str(path) == "/dev/nvidiactl")
    assert gpu_lines([])[0].state == "missing"
    monkeypatch.setattr(doctor.Path, "exists", lambda path: False)
    assert gpu_lines([])[0].state == "note"


def test_without_counter_and_kernel_log_an_oom_kill_cannot_be_proven(monkeypatch):
    monkeypatch.setattr(doctor, "memory_cgroup", lambda: None)
    monkeypatch.setattr(doctor.os, "access", lambda path, mode: False)
    found = {line.subject: line for line in memory_lines()}
    assert found["kernel log"].state == "missing"
    assert "cannot be proven" in found["kernel log"].remedy
    monkeypatch.setattr(doctor.os, "access", lambda path, mode: True)
    assert states(memory_lines())["kernel log"] == "ok"


def test_this_machine_is_described_and_the_exit_code_follows(capsys):
    lines = examine()
    assert {"python", "memory", "cgroup", "torch", "cupy"} <= set(states(lines))
    assert show([Line("a", "ok", "x"), Line("b", "note", "y", "do z")]) == 0
    assert show([Line("a", "missing", "x", "do y")]) == 1
    out = capsys.readouterr().out
    assert "-> do z" in out
    assert "MISSING  a  x" in out


def test_an_override_that_cannot_be_followed_is_named(monkeypatch):
    monkeypatch.setenv("Q4KD_UNIFIED_MEMORY", "1")
    line = doctor.placement_line(0, (9, 0))
    assert line.state == "missing"
    assert "Q4KD_UNIFIED_MEMORY" in line.remedy
    assert doctor.placement_line(0, (12, 1)).state == "ok"
