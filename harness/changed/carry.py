"""``falsify --changed``: which experiments are carried from the base, which are run and why, and the carrying."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from q4kd.harness.bundle.carried import DEPENDENCIES
from q4kd.harness.changed.base import Base, reopen, words_of
from q4kd.harness.changed.dependencies import dependencies_now, sources_stamp
from q4kd.harness.claims.model import Contract
from q4kd.harness.claims.plan import Plan
from q4kd.harness.judging.results import Carried
from q4kd.harness.records.json_types import JsonObject, JsonRecord
from q4kd.harness.records.raw_run import read_runs
from q4kd.harness.records.store import DirectoryStore, read_object
from q4kd.harness.runs.user_inputs import GivenFiles
from q4kd.trainer.errors import InputError
from q4kd.trainer.files import read_json, write_atomic, write_json
from q4kd.trainer.yaml_lines import printable

_SHOWN = 3


@dataclass(frozen=True)
class Decision:
    """What becomes of one experiment: ``reasons`` say why it is run, and there are none when it is carried."""

    experiment: str
    reasons: tuple[str, ...]


def experiments_of(plan: Plan, contracts: Sequence[Contract]) -> list[str]:
    """Return the experiments of the claims in scope, each once, in the order of the plan."""
    claims = {claim.key: claim for contract in contracts for claim in contract.claims}
    falsifiers = [claims[entry.key].falsifier for entry in plan.entries if entry.scope != "out_of_scope"]
    return list(dict.fromkeys(falsifier.experiment for falsifier in falsifiers if falsifier is not None))


def decide(base: Base, experiments: Sequence[str], environment: JsonRecord, given: GivenFiles) -> list[Decision]:
    """Return which experiments can be carried, by the digests of all that their runs depend on."""
    now = dependencies_now(base.words(experiments), environment, given)
    decisions = []
    for name in experiments:
        unfit = base.unfit(name)
        reasons = now.differences(base.dependencies, name) or ([unfit] if unfit is not None else [])
        decisions.append(Decision(name, tuple(reasons)))
    return decisions


def lines(base: Base, decisions: Sequence[Decision]) -> Iterator[str]:
    """Yield what a person is told before anything runs."""
    carried = [decision for decision in decisions if not decision.reasons]
    yield f"base: {base.name}, made {base.findings.created}, verified; the same machine"
    for decision in decisions:
        shown = "; ".join(decision.reasons[:_SHOWN])
        more = f"; {len(decision.reasons) - _SHOWN} more" if len(decision.reasons) > _SHOWN else ""
        if decision.reasons:
            yield printable(f"run      {decision.experiment}: {shown}{more}", 400)
            continue
        origin = base.origin(decision.experiment)
        modules = len(base.dependencies.experiments[decision.experiment][1])
        told = f"nothing that it depends on has changed since {origin.created}: experiment, {modules} modules, packages"
        yield printable(f"carried  {decision.experiment}: {told}", 400)
    yield f"{len(carried)} of {len(decisions)} experiments are carried, {len(decisions) - len(carried)} are run"


def write_order(path: Path, base: Base, decisions: Sequence[Decision], stamp: str) -> None:
    """Write down for another process what to carry from where, and of which sources that was decided."""
    carried = [base.origin(decision.experiment).to_json() for decision in decisions if not decision.reasons]
    write_json(path, {"base": str(base.path), "digest": base.digest, "stamp": stamp, "carried": carried})


@dataclass(frozen=True)
class Taken:
    """What a session took over, the stamp of the sources for which that holds, and the digests of the base's inputs."""

    carried: tuple[Carried, ...] = ()
    stamp: str = ""
    inputs: JsonObject = field(default_factory=dict)

    @staticmethod
    def nothing() -> "Taken":
        """Return what a session has that runs everything."""
        return Taken(stamp=sources_stamp())


def take(order: Path, bundle: Path) -> Taken:
    """Copy the runs that an order names into a bundle that has just been opened.

    Raises:
        InputError: the base is not the one that was verified, or lacks a run.
    """
    asked: JsonRecord = read_json(order)
    store = reopen(Path(asked["base"]), asked["digest"])
    carried = tuple(Carried.from_json(entry) for entry in asked["carried"])
    for entry in carried:
        for run in entry.runs:
            for name in store.names():
                if name.startswith(f"runs/{run}/"):
                    target = bundle / name
                    target.parent.mkdir(parents=True, exist_ok=True)
                    write_atomic(target, store.read(name))
    # Files that a person gave count for what runs today alone.
    made = {name: entry for name, entry in read_object(store, "inputs.json").items() if not name.startswith("given/")}
    return Taken(carried, asked["stamp"], made if carried else {})


def record_dependencies(bundle: Path, experiments: Sequence[str], given: GivenFiles, taken: Taken) -> str | None:
    """Write what the runs of a bundle depend on; return what is wrong when that cannot be said any more.

    Then nothing is written, and the bundle is no base for others.
    """
    if taken.stamp != sources_stamp():
        return "the sources changed while it ran: nobody can say what its runs depend on" if taken.carried else None
    store = DirectoryStore(bundle)
    try:
        found = dependencies_now(words_of(experiments, read_runs(store)), read_object(store, "environment.json"), given)
    except InputError as error:
        return f"what its runs depend on could not be found: {error}" if taken.carried else None
    write_json(bundle / DEPENDENCIES, found.to_json())
    return None
