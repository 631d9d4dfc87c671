"""Digests of meaning: what a kill record is filed under, so that a mended comment or a moved file ages nothing.

A digest is taken over the syntax trees of the definitions that something depends on, found by following names from the
functions that were registered. Lambdas, partials and functions made by a factory count with the values they hold.
"""

import dataclasses
import functools
import hashlib
import importlib
import inspect
import json
import sys
import threading
import types
from collections.abc import Iterable, Mapping, Sequence, Set
from pathlib import PurePath
from typing import Any

from q4kd.harness.claims.model import Claim
from q4kd.harness.claims.place import Place
from q4kd.harness.judging.judge import judge_claim
from q4kd.harness.judging.normal_form import PACKAGE, bound_in, top_level
from q4kd.harness.judging.syntax_trees import Definition, SyntaxTrees
from q4kd.harness.runs.experiment import Arm, Experiment, get_experiment
from q4kd.harness.runs.faults import Fault, MissingTarget, tested_packages
from q4kd.trainer.errors import InputError

# The modules that decide what is measured and how it is judged, by the beginnings of their names: experiments, probes,
# faults, what they are given and compared with, checks and the judge. Names are followed into these; neither into the
# rest of the harness, which records, nor into the trainer, which is what is measured.
DECIDING = (
    "q4kd.harness.subjects.",
    "q4kd.harness.inputs.",
    "q4kd.harness.oracles.",
    "q4kd.harness.checks.",
    "q4kd.harness.judging.judge",
    "q4kd.trainer.bench.synthetic",
)
PROBES_MODULE = "q4kd.harness.runs.probes"
TREES = SyntaxTrees()
# What was read of modules is shared: two threads that fill it at one time would each see half of it.
_READING = threading.Lock()


def record_parts(claim: Claim, fault: Fault, experiment: str, profile: str, place: Place) -> dict[str, str]:
    """Return the digest of every part that makes a kill record valid, by the part's name.

    Args:
        claim: the claim whose falsifier was run.
        fault: the fault it was run against.
        experiment: the experiment's name.
        profile: the profile whose overrides the falsifier is taken with; its name is no part of the record.
        place: where the experiment ran.

    Raises:
        MissingTarget: when a patched function is no longer in its module.
        InputError: when the experiment is unknown, or has a function whose source cannot be found.
        ValueError: when the claim is prose.
    """
    if claim.falsifier is None:
        raise ValueError(f"{claim.key} is prose: it has no falsifier")
    falsifier = claim.falsifier.for_profile(profile)
    asked = dataclasses.asdict(falsifier)
    del asked["sabotage"], asked["timeout_s"]  # neither changes what a caught fault showed
    probes = _probes()
    with _READING:
        parts = {
            "claim": _sha256(f"{claim.key} {place}"),
            "falsifier": _sha256(_canonical(asked)),
            "judge": digest_of(judge_claim),
            "fault": digest_of(fault),
            "experiment": digest_of(get_experiment(experiment), probes),
        }
        checks = {f"check {use.check}": check_digest(use.check) for use in falsifier.checks}
        return parts | checks | target_digests(fault)


def _probes() -> dict[str, object]:
    # A copy: the registry asks for its modules anew at every look.
    return dict(importlib.import_module(PROBES_MODULE).PROBES)


def record_key(claim: Claim, fault: Fault, experiment: str, profile: str, place: Place) -> str:
    """Return the SHA-256 over ``record_parts`` that a kill record is filed under. Raises as it does."""
    return parts_digest(record_parts(claim, fault, experiment, profile, place))


def parts_digest(parts: Mapping[str, str]) -> str:
    """Return the SHA-256 over the digests of a record's parts and their names."""
    return _sha256(_canonical(parts))


def digest_of(value: object, named: Mapping[str, object] | None = None) -> str:
    """Return the digest of an object: its plain values, and every definition that its functions depend on.

    Args:
        value: an experiment, a fault or a function, or any nesting of these in plain containers.
        named: objects that are reached by a string alone, as a probe is in an experiment's arguments.

    Raises:
        InputError: when a function's source cannot be found.
    """
    closure = Closure(named or {})
    return closure.digest(closure.plain(value))


def experiment_closure(experiment: Experiment) -> tuple[str, "Closure"]:
    """Return the digest of an experiment and its probes, the ``experiment`` of a kill record, and what it is made of.

    Raises:
        InputError: when a function's source cannot be found.
    """
    closure = Closure(_probes())
    with _READING:
        return closure.digest(closure.plain(experiment)), closure


def check_digest(name: str) -> str:
    """Return the digest of what a check extracts and how it judges that; its mutations show nothing of a fault.

    Raises:
        InputError: when the check's source cannot be found.
    """
    from q4kd.harness.checks import CHECKS

    check: Any = CHECKS[name]
    if not inspect.ismodule(check):
        return digest_of([check.extract, check.judge])
    closure = Closure({})
    for part in ("extract", "judge"):
        closure.defined(check.__name__, part)
    return closure.digest(None)


def target_digests(fault: Fault) -> dict[str, str]:
    """Return ``{"target Qual.name": digest}`` of the definitions that a fault replaces, without what these use.

    A target in a package that is not under test stands for itself by name: its source changes with every release.

    Raises:
        MissingTarget: when a module or a definition is not there.
    """
    trees: dict[str, list[str]] = {}
    for target in fault.targets:
        trees.setdefault(target.partition(":")[2], []).append(target_tree(target))
    return {f"target {name}": _sha256("\n".join(sorted(texts))) for name, texts in trees.items()}


def target_tree(target: str) -> str:
    """Return the normal form of what ``module:Qual.name`` defines, or the target. Raises as ``target_digests`` does."""
    module, _, qualname = target.partition(":")
    if top_level(module) not in tested_packages():
        return target
    tree = TREES.module(module)
    node: Any = tree and tree.tree
    for part in qualname.split("."):
        node = next((child for child in reversed(getattr(node, "body", ())) if part in bound_in([child])), None)
    if tree is None or node is None:
        raise MissingTarget(target)
    return "".join(tree.read(node).text)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _canonical(value: object) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, default=dict)


class Closure:
    """Turns objects into plain values, and collects every definition that their functions depend on.

    Attributes:
        definitions: what was collected.
        texts: the texts among the plain values, as they stand.
    """

    def __init__(self, named: Mapping[str, object]) -> None:
        self._named = named
        self._packages = tested_packages()
        self.definitions: set[Definition] = set()
        self.texts: set[str] = set()
        self._asked: dict[str, object] = {}
        self._open: set[int] = set()

    def digest(self, plain: object) -> str:
        """Return the SHA-256 over plain values and what was collected; a definition of two modules counts twice."""
        return _sha256(_canonical([plain, self._asked, sorted(found.digest for found in self.definitions)]))

    def plain(self, value: object) -> object:
        """Return what JSON can say of a value. A path counts by its name; another object by its type alone."""
        value = inspect.unwrap(value) if callable(value) else value
        match value:
            case None | bool() | int() | float() | complex() | bytes():
                return repr(value)
            case str():
                self.texts.add(value)
                if value in self._named:
                    self._ask(value, self._named[value])
                return repr(TREES.shorten(value, self._packages))
            case PurePath():
                return value.name
            case Mapping():
                return sorted(([self.plain(key), self.plain(item)] for key, item in value.items()), key=_canonical)
            case Sequence():
                return [self.plain(item) for item in value]
            case Set():
                return sorted((self.plain(item) for item in value), key=_canonical)
            case functools.partial():
                return [self.plain(part) for part in (value.func, value.args, value.keywords)]
            case types.MethodType():
                return [self.plain(part) for part in (value.__func__, value.__self__)]
            case types.FunctionType():
                return self._function(value)
            case Experiment() | Arm() | Fault():
                for module in getattr(value, "sources", ()):
                    self._module(module)
                # What is measured decides beside what a run is done and how it is started, which changes no result.
                fields = {field.name for field in dataclasses.fields(value)} - {"title", "sources", "measures"}
                return {name: self.plain(getattr(value, name)) for name in fields}
        kind: Any = value if hasattr(value, "__qualname__") else type(value)
        module = kind.__module__ or ""
        if top_level(module) in self._packages:
            self.follow(TREES.resolve(module, (top_level(kind.__qualname__),)))
        return kind.__qualname__

    def defined(self, module: str, name: str, line: int | None = None) -> None:
        """Follow a definition, or the lambdas on a line when the name is not that of a definition.

        Raises:
            InputError: when it is not in its module's source.
        """
        if top_level(module) in sys.stdlib_module_names or not _is_followed(module):
            return
        found, tree = TREES.resolve(module, (name,)), TREES.module(module)
        if not found and tree is not None and line is not None:
            found = tree.lambdas.get(line, [])
        if not found:
            expected = "a function defined in the source of an installed module"
            remedy = "define it with `def` in a module, so that a kill record can be keyed by what it does"
            raise InputError(f"{module}:{name}", expected=expected, got="no such definition", remedy=remedy)
        self.follow(found)

    def _module(self, name: str) -> None:
        if TREES.module(name) is None:
            remedy = "name modules that are installed among the sources of the experiment"
            raise InputError(
                f"module {name!r}", expected="an installed module", got="none with a source", remedy=remedy
            )
        self.follow(TREES.resolve(name, ()))

    def follow(self, definitions: Iterable[Definition]) -> None:
        """Collect definitions and all that they depend on."""
        waiting = list(definitions)
        while waiting:
            definition = waiting.pop()
            if definition in self.definitions or not _is_followed(definition.module.name):
                continue
            self.definitions.add(definition)
            waiting += TREES.used_by(definition)
            for name in definition.reading.strings & self._named.keys():
                self._ask(name, self._named[name])
            for name in definition.reading.experiments:
                self._ask(f"experiment {name}", get_experiment(name))

    def _ask(self, name: str, value: object) -> None:
        if name not in self._asked:
            self._asked[name] = None
            self._asked[name] = self.plain(value)

    def _function(self, function: types.FunctionType) -> object:
        code = function.__code__
        self.defined(function.__module__, top_level(code.co_qualname), code.co_firstlineno)
        if "<" not in code.co_qualname or id(function) in self._open:
            return code.co_qualname
        # A lambda or an inner function: what it holds was decided where it was made.
        self._open.add(id(function))
        cells = [_content(cell) for cell in function.__closure__ or ()]
        held = self.plain([cells, function.__defaults__, function.__kwdefaults__])
        self._open.discard(id(function))
        return [code.co_qualname, held]


def _is_followed(module: str) -> bool:
    """Say whether what a module defines counts; of another project's package everything may."""
    return top_level(module) != PACKAGE or module.startswith(DECIDING)


def _content(cell: types.CellType) -> object:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None
