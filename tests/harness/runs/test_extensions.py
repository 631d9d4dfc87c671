"""Entry points of other distributions: loaded, refused when broken or when they shadow, and always named."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from q4kd.harness import checks
from q4kd.harness.checks import CHECKS
from q4kd.harness.runs import experiment, extensions
from q4kd.harness.runs import faults as registry
from q4kd.harness.runs.experiment import EXPERIMENTS
from q4kd.trainer.errors import InputError

Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Put a distribution with one module and one entry point on the path; the registries forget what they loaded."""
    fresh = experiment._Registry()
    len(EXPERIMENTS)
    fresh._known = dict(EXPERIMENTS._known)
    monkeypatch.setattr(experiment, "EXPERIMENTS", fresh)
    monkeypatch.setattr(registry, "_FAULTS", dict(registry.all_faults()))
    monkeypatch.setattr(CHECKS, "_added", None)
    extensions.load_extensions.cache_clear()
    monkeypatch.syspath_prepend(str(tmp_path))

    def make(name: str, group: str, point: str, text: str) -> None:
        module = name.replace("-", "_")
        sys.modules.pop(module, None)
        (tmp_path / f"{module}.py").write_text(text)
        info = tmp_path / f"{module}-2.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 2.0\n")
        (info / "entry_points.txt").write_text(f"[{group}]\n{point.replace('MODULE', module)}\n")
        extensions.load_extensions.cache_clear()
        CHECKS._added = None  # type: ignore[attr-defined]

    return make


@pytest.fixture(autouse=True)
def forget() -> object:
    yield
    extensions.load_extensions.cache_clear()


EXPERIMENT = """from q4kd.harness.runs.experiment import Arm, Experiment
E = Experiment({!r}, 't', (), (Arm(None, lambda i: []),))
"""
FAULT = "from q4kd.harness.runs.faults import Fault\nF = [Fault({!r}, 't', 'loop', ('json:dumps',), lambda: None)]\n"


LOOKS: dict[str, Callable[[], object]] = {
    "q4kd.experiments": lambda: len(experiment.EXPERIMENTS),
    "q4kd.faults": registry.all_faults,
    "q4kd.checks": lambda: list(checks.CHECKS),
}


def test_an_object_or_several_may_be_named(install: Install) -> None:
    install("acme-one", "q4kd.experiments", "x = MODULE:E", EXPERIMENT.format("acme-run"))
    install("acme-two", "q4kd.faults", "x = MODULE:F", FAULT.format("acme-fault"))
    assert "acme-run" in experiment.EXPERIMENTS
    assert experiment.EXPERIMENTS.module("acme-run") == "acme_one"
    assert "acme-fault" in registry.all_faults()
    assert registry.tested_packages() == {"q4kd", "acme_two"}


@pytest.mark.parametrize(
    ("group", "point", "text", "said"),
    [
        ("q4kd.experiments", "x = MODULE:E", EXPERIMENT.format("load-teacher"), "'load-teacher' is registered twice"),
        ("q4kd.experiments", "x = MODULE:E", "E = 3", "not iterable"),
        ("q4kd.experiments", "x = MODULE:E", "E = [3]", "expected an Experiment, got int"),
        ("q4kd.faults", "x = MODULE:F", FAULT.format("ballast"), "'ballast' is registered twice"),
        ("q4kd.faults", "x = MODULE:F", "F = [3]", "AttributeError"),
        ("q4kd.checks", "parity = MODULE", "NAME = 'parity'", "the name of a built-in check"),
        ("q4kd.checks", "mine = MODULE", "NAME, PARAMS = 'mine', {'type': 3}", "SchemaError"),
        (
            "q4kd.checks",
            "mine = MODULE",
            "NAME, PARAMS, DIRECTIONS, READS = 'mine', {}, {}, ('wallet',)",
            "READS must name some of argv",
        ),
        ("q4kd.checks", "mine = MODULE", "NAME, PARAMS, DIRECTIONS, READS = 'mine', {}, {}, ('facts',)", "'extract'"),
        ("q4kd.checks", "mine = MODULE", "raise SystemError('out of sorts')", "SystemError: out of sorts"),
    ],
)
def test_what_is_broken_or_shadows_is_refused_by_name(
    install: Install, group: str, point: str, text: str, said: str
) -> None:
    install("acme-bad", group, point, text)
    with pytest.raises(InputError) as refused:
        LOOKS[group]()
    assert said in str(refused.value)
    assert "of acme-bad 2.0" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_two_distributions_cannot_share_a_name(install: Install) -> None:
    for name in ("acme-one", "acme-two"):
        install(name, "q4kd.checks", "mine = MODULE", "")
    with pytest.raises(InputError, match=r"of acme-two 2\.0.*taken by q4kd\.checks 'mine' of acme-one 2\.0"):
        list(checks.CHECKS)


def test_a_built_in_check_is_found_without_a_look_at_extensions(install: Install) -> None:
    install("acme-bad", "q4kd.checks", "mine = MODULE", "raise SystemError")
    assert CHECKS["parity"].NAME == "parity"
