"""Contracts, experiments and faults refer to each other by name: every name must lead somewhere, and be used."""

import inspect
from pathlib import Path

import pytest

from q4kd.harness.bundle.findings import NOT_RUN, PROSE
from q4kd.harness.checks import REASONS
from q4kd.harness.claims.contract import load_contracts
from q4kd.harness.claims.folder import default_contracts_folder
from q4kd.harness.judging.mutations import NOT_SHOWN
from q4kd.harness.judging.results import KillStatus
from q4kd.harness.runs.experiment import EXPERIMENTS, Arm
from q4kd.harness.runs.faults import all_faults, resolve
from q4kd.harness.session import HARNESS_ERROR

CLAIMS = [claim for contract in load_contracts(default_contracts_folder()) for claim in contract.claims]


def test_every_claim_is_executable_with_known_names() -> None:
    for claim in CLAIMS:
        assert claim.falsifier is not None, claim.key
        assert claim.falsifier.experiment in EXPERIMENTS, claim.key
        assert claim.falsifier.sabotage, claim.key
        assert set(claim.falsifier.sabotage) <= set(all_faults()), claim.key
        assert claim.if_fails.strip()


def test_every_experiment_and_every_fault_is_used() -> None:
    falsifiers = [claim.falsifier for claim in CLAIMS if claim.falsifier]
    assert {falsifier.experiment for falsifier in falsifiers} == set(EXPERIMENTS)
    assert {fault for falsifier in falsifiers for fault in falsifier.sabotage} == set(all_faults())


# What each check of time or memory judges. A ratio's pairs may be of anything, but all that we have are of times.
MEASURED = {
    "memory_ceiling": "memory",
    "residency": "memory",
    "gpu_utilization": "time",
    "latency": "time",
    "ratio": "time",
}


def test_experiments_declare_what_they_measure_of_their_process() -> None:
    for claim in CLAIMS:
        assert claim.falsifier is not None
        experiment = EXPERIMENTS[claim.falsifier.experiment]
        for check in claim.falsifier.checks:
            wanted = MEASURED.get(check.check)
            # One that has the accelerator to itself is started by itself, and feeds it with cores of its own.
            assert wanted is None or wanted in experiment.measures or experiment.exclusive, (claim.key, check.check)
    default = Arm(None, lambda _inputs: []).interval_s
    for name, experiment in EXPERIMENTS.items():
        if any(arm.interval_s < default for arm in experiment.arms):  # its memory is sampled finely for a reason
            assert "memory" in experiment.measures or experiment.exclusive, name


@pytest.mark.parametrize("name", sorted(all_faults()))
def test_every_fault_has_its_targets(name: str) -> None:
    for target in all_faults()[name].targets:
        resolve(target)


@pytest.mark.parametrize("name", sorted(all_faults()))
def test_what_stands_in_for_a_target_takes_what_the_target_takes(name: str) -> None:
    fault = all_faults()[name]
    function = inspect.unwrap(fault.apply)
    if function is fault.apply:
        return  # it calls ``replace`` itself
    _original, *taken = inspect.signature(function).parameters.values()
    is_open = any(one.kind in (one.VAR_POSITIONAL, one.VAR_KEYWORD) for one in taken)
    for target in fault.targets:
        replaced = getattr(resolve(target)[2], "__func__", resolve(target)[2])
        if callable(replaced):
            assert is_open or len(taken) >= len(inspect.signature(replaced).parameters), target


def test_the_faults_everyone_asks_for_are_there() -> None:
    wanted = {
        "dequantize-at-load",
        "silent-dequantize",
        "wrong-subblock-scale",
        "swapped-nibbles",
        "ballast",
        "sigkill-at-step",
        "hang-at-step-0",
        "kd-term-zero",
        "labels-shuffled",
    }
    assert wanted <= set(all_faults())


def test_the_trainer_knows_nothing_of_the_harness_and_plants_no_faults() -> None:
    import q4kd.trainer

    folder = Path(q4kd.trainer.__path__[0])
    for path in folder.rglob("*.py"):
        text = path.read_text()
        assert "q4kd.harness" not in text, path
        assert "sabotage" not in text, path


def test_reasons_given_outside_the_checks_are_of_the_same_closed_list() -> None:
    assert {NOT_RUN, PROSE, NOT_SHOWN, KillStatus.STALE, HARNESS_ERROR} <= set(REASONS)
