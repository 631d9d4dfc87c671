"""Digests of meaning: what changes no key, and which keys each change does change, by name."""

import importlib
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from edited_sources import reworded, with_moved

from q4kd.harness.checks import CHECKS
from q4kd.harness.judging import digests
from q4kd.harness.judging.digests import check_digest, digest_of, target_digests
from q4kd.harness.judging.syntax_trees import SyntaxTrees
from q4kd.harness.runs.faults import Fault
from q4kd.trainer.errors import InputError

ROOT = Path(__file__).parents[3]

# --- a small package, written, imported and keyed anew for each change ---

PACKAGE = {
    "__init__": '"""Another project."""',
    "numbers": '''
"""Helpers."""

import math as m
from functools import cache

LIMIT = 3
TABLE = {"first": 1}
TABLE["second"] = 2


def scaled(x: int, factor=2) -> int:
    """Return it scaled."""
    # By the factor.
    return x * factor + LIMIT


@cache
def rooted(x):
    return m.sqrt(x)


def looked_up(name):
    def LIMIT(scaled):
        return scaled

    return LIMIT(TABLE[name])


def unused(x):
    return rooted(x) - scaled(x)
''',
    "shared": "from acme.numbers import *\n\n\ndef halved(x):\n    return x // 2\n",
    "probing": '''
from .numbers import looked_up


def measure(arguments):
    """Measure."""
    return looked_up("first")


PROBES = {"measure": measure}
''',
    "runs": '''
import functools

import acme.numbers
from acme import numbers
from acme import shared as common
from q4kd.harness.runs.experiment import Arm, Experiment, get_experiment, register

HALF = 0.5


def by_name(inputs):
    """Import it here."""
    from acme.numbers import scaled as twice

    return [str(twice(3))]


def by_attribute(power, inputs):
    return [str(numbers.rooted(power))]


def by_dotted_name(inputs):
    return [str(acme.numbers.rooted(4)), HALF]


def through_a_star(run_dir, inputs):
    return {"value": common.scaled(3)}


def made(words):
    return lambda inputs: [*words]


def probing(inputs):
    return ["probe", "measure"]


def of_another(run_dir, inputs):
    return get_experiment("acme-name").collect(run_dir, inputs)


class Counter:
    step = 1

    def count(self):
        return self.step


EXPERIMENTS = (
    Experiment("acme-name", "its title", (), (Arm(None, by_name),)),
    Experiment("acme-attribute", "t", (), (Arm("a", functools.partial(by_attribute, 4)), Arm("b", made(["b"])))),
    Experiment("acme-dotted", "t", ("cpu",), (Arm(None, by_dotted_name, env={"OMP_NUM_THREADS": "1"}),)),
    Experiment("acme-star", "t", (), (Arm(None, made(["c"])),), collect=through_a_star),
    Experiment("acme-probe", "t", (), (Arm(None, probing),)),
    Experiment("acme-other", "t", (), (Arm(None, made(["d"])),), collect=of_another),
    Experiment("acme-lambda", "t", (), (Arm(None, lambda inputs: [str(common.halved(8))]),)),
    Experiment("acme-object", "t", (), (Arm(None, made([Counter().count])),)),
)
''',
    "checking": """
from acme.numbers import LIMIT

NAME, PARAMS, DIRECTIONS, READS = "acme", {}, {}, ("facts",)


def extract(runs, params, least):
    return {"value": 1}


def judge(observation, params, least):
    return observation["value"] > LIMIT


def mutate(observation, params, least):
    return []
""",
    "planted": """
from q4kd.harness.runs.faults import Fault, replace

NUMBERS = "acme.numbers"


def _scale(by):
    def apply():
        replace(f"{NUMBERS}:scaled", lambda original: lambda x: by * original(x))

    return apply


FAULTS = (
    Fault("acme-ten", "t", "loop", ("acme.numbers:scaled",), _scale(10)),
    Fault("acme-nil", "t", "loop", ("acme.numbers:scaled",), _scale(0)),
)
""",
}
KeysOf = Callable[..., dict[str, str]]


@pytest.fixture
def keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> KeysOf:
    """Return a function that installs the package, some of its modules edited, and returns every digest by name."""

    def installed(edit: Mapping[str, Callable[[str], str]] = {}, modules: Mapping[str, str] = {}) -> dict[str, str]:
        shutil.rmtree(tmp_path / "acme", ignore_errors=True)
        for name, text in PACKAGE.items():
            path = tmp_path.joinpath("acme", *modules.get(name, name).split(".")).with_suffix(".py")
            path.parent.mkdir(parents=True, exist_ok=True)
            text = edit.get(name, str)(text)
            path.write_text(with_moved(text, {f"acme.{old}": f"acme.{new}" for old, new in modules.items()}))
        monkeypatch.syspath_prepend(str(tmp_path))
        monkeypatch.setattr(sys, "dont_write_bytecode", True)
        for name in [name for name in sys.modules if name.partition(".")[0] == "acme"]:
            del sys.modules[name]
        importlib.invalidate_caches()
        monkeypatch.setattr(digests, "TREES", SyntaxTrees())
        monkeypatch.setattr(digests, "tested_packages", lambda: frozenset({"q4kd", "acme"}))
        runs, probing, checking, planted = (
            importlib.import_module(f"acme.{modules.get(name, name)}")
            for name in ("runs", "probing", "checking", "planted")
        )
        found = {}
        monkeypatch.setattr(digests, "get_experiment", {one.name: one for one in runs.EXPERIMENTS}.__getitem__)
        for one in runs.EXPERIMENTS:
            found[one.name] = digest_of(one, probing.PROBES)
        for fault in planted.FAULTS:
            found[fault.name] = digest_of(fault)
            found |= {f"{name} of {fault.name}": digest for name, digest in target_digests(fault).items()}
        monkeypatch.setitem(CHECKS._modules, "table", checking)  # type: ignore[attr-defined]
        return found | {"check": check_digest("table")}

    return installed


def changed(before: Mapping[str, str], after: Mapping[str, str]) -> set[str]:
    assert before.keys() == after.keys()
    return {name for name in before if before[name] != after[name]}


def swap(old: str, new: str) -> Callable[[str], str]:
    def edit(text: str) -> str:
        assert text.count(old) == 1, old
        return text.replace(old, new)

    return edit


SCALED = {"acme-name", "acme-star", "acme-other"}
TARGET = {f"target scaled of acme-{name}" for name in ("ten", "nil")}
ROOTED = {"acme-attribute", "acme-dotted"}


@pytest.mark.parametrize(
    ("module", "old", "new", "names"),
    [
        ("numbers", "x * factor + LIMIT", "x * factor - LIMIT", SCALED | TARGET),
        ("numbers", "factor=2", "factor=3", SCALED | TARGET),
        ("numbers", "LIMIT = 3", "LIMIT = 4", {*SCALED, "check"}),
        ("numbers", "@cache\n", "", ROOTED),
        ("numbers", "import math as m", "import cmath as m", ROOTED),
        ("numbers", 'TABLE["second"] = 2', 'TABLE["second"] = 3', {"acme-probe"}),
        ("numbers", "rooted(x) - scaled(x)", "rooted(x) + scaled(x)", set()),
        ("shared", "x // 2", "x / 2", {"acme-lambda"}),
        ("probing", 'looked_up("first")', 'looked_up("second")', {"acme-probe"}),
        ("runs", '"measure"]', '"other"]', {"acme-probe"}),
        ("runs", "HALF = 0.5", "HALF = 0.25", {"acme-dotted"}),
        ("runs", "by_attribute, 4", "by_attribute, 9", {"acme-attribute"}),
        ("runs", 'made(["b"])', 'made(["e"])', {"acme-attribute"}),
        ("runs", '("cpu",)', '("cuda",)', {"acme-dotted"}),
        ("runs", '"OMP_NUM_THREADS": "1"', '"OMP_NUM_THREADS": "2"', {"acme-dotted"}),
        ("runs", "by_name),)", "by_name, exits=(2,)),)", {"acme-name", "acme-other"}),
        ("runs", "common.halved(8)", "common.halved(9)", {"acme-lambda"}),
        ("runs", "step = 1", "step = 2", {"acme-object"}),
        ("runs", "its title", "another title", set()),
        ("runs", "[*words]", "[*words, '']", {"acme-attribute", "acme-star", "acme-other", "acme-object"}),
        ("checking", "> LIMIT", ">= LIMIT", {"check"}),
        ("checking", '"value": 1', '"value": 2', {"check"}),
        ("checking", "return []", "return [1]", set()),
        ("planted", "_scale(0)", "_scale(1)", {"acme-nil"}),
        ("planted", "by * original(x)", "by + original(x)", {"acme-ten", "acme-nil"}),
        ("planted", "{NUMBERS}:scaled", "{NUMBERS}:rooted", {"acme-ten", "acme-nil"}),
    ],
)
def test_a_change_ages_what_depends_on_it_and_nothing_else(
    keys: KeysOf, module: str, old: str, new: str, names: set[str]
) -> None:
    assert changed(keys(), keys({module: swap(old, new)})) == names


def test_what_changes_no_meaning_ages_nothing(keys: KeysOf) -> None:
    before = keys()
    assert changed(before, keys(dict.fromkeys(PACKAGE, reworded))) == set()
    assert (
        changed(before, keys({"numbers": swap("x: int, factor=2) -> int", "x, factor: float = 2) -> float")})) == set()
    )
    assert (
        changed(before, keys({"numbers": lambda text: text.replace("import math as m", "import sys, math as m")}))
        == set()
    )
    assert changed(before, keys({"runs": lambda text: text.replace('"t"', '"more of a title"')})) == set()


def test_a_moved_module_ages_nothing(keys: KeysOf) -> None:
    before = keys()
    assert changed(before, keys(modules={"numbers": "deep.figures", "planted": "faults", "runs": "deep.runs"})) == set()


def test_definitions_of_one_name_in_two_modules_both_count(keys: KeysOf) -> None:
    second = "\n\ndef scaled(x):\n    return x\n"

    def shared(text: str) -> str:
        return (
            text
            + second
            + "\n\ndef both(x):\n    from acme.numbers import scaled as other\n\n    return other(scaled(x))\n"
        )

    def runs(text: str) -> str:
        return text.replace("common.halved(8)", "common.both(8)")

    before = keys({"shared": shared, "runs": runs})
    for edit in ({"numbers": swap("x * factor", "x ** factor")}, {"shared": lambda text: shared(text) + "    + 0"}):
        assert "acme-lambda" in changed(before, keys({"shared": shared, "runs": runs} | edit))
    after = keys(
        {"runs": runs, "shared": lambda text: shared(text).replace(second, second.replace("return x", "return -x"))}
    )
    assert changed(before, after) == {"acme-lambda", "acme-star"}


def test_every_definition_of_an_experiments_sources_counts(keys: KeysOf) -> None:
    runs = swap("by_name),)),", 'by_name),), sources=("acme.shared",)),')
    before = keys({"runs": runs})
    assert changed(keys(), before) == {"acme-name", "acme-other"}
    after = keys({"runs": runs, "shared": swap("x // 2", "x / 2")})
    assert changed(before, after) == {"acme-name", "acme-other", "acme-lambda"}
    assert changed(before, keys({"runs": runs, "shared": reworded}, {})) == set()
    with pytest.raises(InputError, match=r"module 'acme.gone': expected an installed module"):
        keys({"runs": swap("by_name),)),", 'by_name),), sources=("acme.gone",)),')})


@pytest.mark.parametrize("function", [eval("lambda inputs: []"), eval("lambda: None", {"__name__": "nowhere"})])
def test_a_function_without_source_is_refused(function: Callable[..., object]) -> None:
    with pytest.raises(InputError, match="expected a function defined in the source of an installed module"):
        digest_of(Fault("f", "t", "loop", ("json:dumps",), function))  # type: ignore[arg-type]


def test_a_function_may_hold_itself() -> None:
    def made() -> Callable[[int], int]:
        def count(n: int) -> int:
            return n and count(n - 1)

        return count

    assert digest_of(made()) == digest_of(made()) != digest_of([made()])
