"""Puts the fake world in the place of the real one, in this process: ``-p fakeworld.plugin``, or ``install``."""

import sys
import types

from fakeworld import check, program
from q4kd.harness.checks import CHECKS
from q4kd.harness.runs import experiment
from q4kd.harness.runs import faults as registry


def install(put=setattr):
    for module in (registry, experiment):
        put(module, "subject_modules", lambda kind: (f"fakeworld.{kind}",))
    put(registry, "_FAULTS", {})
    put(experiment.EXPERIMENTS, "_known", {})
    put(experiment.EXPERIMENTS, "_modules", {})
    put(experiment.EXPERIMENTS, "_loaded", False)
    put(CHECKS, "_names", (*CHECKS._names, "fake"))
    put(CHECKS, "_modules", {**CHECKS._modules, "fake": check})
    for module in ("fakeworld.faults", "fakeworld.experiments"):
        sys.modules.pop(module, None)  # importing them registers
    from q4kd.harness.runs import runner

    put(runner, "LAUNCHER", (sys.executable, "-m", "fakeworld.launch"))


def install_probe():
    probes = types.ModuleType("q4kd.harness.runs.probes")
    probes.PROBES = {"fake": program.main}
    sys.modules["q4kd.harness.runs.probes"] = probes


def pytest_load_initial_conftests():
    install()
