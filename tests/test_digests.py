"""Digests of meaning: what changes no key, and which keys each change does change, by name."""

import ast
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
import tokenize
from collections.abc import Callable, Mapping
from functools import cache
from io import StringIO
from pathlib import Path

import pytest
from edited_sources import edited

from q4kd.harness import digests
from q4kd.harness.checks import CHECKS
from q4kd.harness.contract import Claim, Falsifier, default_contracts_folder, load_contracts
from q4kd.harness.digests import check_digest, digest_of, record_key, record_parts, target_digests, target_tree
from q4kd.harness.experiment import EXPERIMENTS
from q4kd.harness.sabotage.registry import Fault, MissingTarget, all_faults
from q4kd.harness.syntax_trees import Source, SyntaxTrees, read_source
from q4kd.trainer.errors import InputError

ROOT = Path(__file__).parents[1]

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
from q4kd.harness.experiment import Arm, Experiment, get_experiment, register

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
from q4kd.harness.sabotage.registry import Fault, replace

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


def with_moved(text: str, modules: Mapping[str, str]) -> str:
    """Return a module's text with other modules under their new names, as a tool for moving them writes it."""
    for old, new in modules.items():
        (home, _, name), (folder, _, file) = old.rpartition("."), new.rpartition(".")
        text = text.replace(f"from {home} import {name}\n", f"from {folder} import {file} as {name}\n")
        text = text.replace(f"from .{name} import ", f"from {new} import ")
        text = re.sub(rf"{re.escape(old)}\b", new, text)
    return text


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


def reworded(text: str) -> str:
    """Return a module's text with other words in every comment and docstring, at the same lines."""
    lines = text.splitlines(keepends=True)
    for token in tokenize.generate_tokens(StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column] + "# in other words\n"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            for row in range(node.lineno - 1, node.end_lineno or 0):
                lines[row] = re.sub(r"(?<=[A-Za-z ])[a-z](?=[a-z ])", "x", lines[row])
    return "".join(lines)


# --- this installation ---

Records = dict[tuple[str, str], dict[str, str]]


@cache
def falsifiers() -> dict[str, tuple[Claim, Falsifier]]:
    claims = [claim for contract in load_contracts(default_contracts_folder()) for claim in contract.claims]
    return {claim.key: (claim, claim.falsifier) for claim in claims if claim.falsifier is not None}


def records() -> Records:
    """Return the parts of every record of the contracts, by claim and fault."""
    faults = all_faults()
    return {
        (key, name): record_parts(claim, faults[name], falsifier.experiment, "cpu")
        for key, (claim, falsifier) in falsifiers().items()
        for name in falsifier.sabotage
    }


@pytest.fixture(scope="module")
def before() -> Records:
    return records()


def stale_parts(before: Records, after: Records) -> dict[str, set[tuple[str, str]]]:
    """Return the records whose keys differ, by the part that does."""
    found: dict[str, set[tuple[str, str]]] = {}
    for record, parts in before.items():
        assert parts.keys() == after[record].keys()
        for name in parts:
            if parts[name] != after[record][name]:
                found.setdefault(name, set()).add(record)
    return found


def test_other_words_in_every_comment_and_docstring_age_no_record(
    before: Records, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = 0

    def read(module: str) -> Source | None:
        nonlocal texts
        source = read_source(module)
        if source is None:
            return None
        text = reworded(source.text)
        texts += text != source.text
        return source._replace(text=text)

    monkeypatch.setattr(digests, "TREES", SyntaxTrees(read))
    assert stale_parts(before, records()) == {}
    assert texts > 100


# What a change ages: the part of a record, and the experiments, faults or parts of claims that it belongs to.
CHANGES = [
    ("block_spec", "-block_sums @", "block_sums @", "experiment", {"superblock"}),
    (
        *("probes_robust", "_POLL_S = 0.0005", "_POLL_S = 0.001", "experiment"),
        {"damaged-resumes", "killed-runs", *(name for name in EXPERIMENTS if name.startswith("run-"))},
    ),
    (
        *("probes_runs", "if message.count", "if 2 * message.count", "experiment"),
        {"refused-caches", "refused-data", "refused-exports", "refused-runs"},
    ),
    (
        *("experiments_training", "min(counters)", "max(counters)", "experiment"),
        {"distill-7b", "distill-7b-long", "distill-run", "smoke-run", "vocabulary-run"},
    ),
    (
        *("sabotage.faults_quant", "make(original)", "make(make(original))", "fault"),
        {"half-precision-q4k", "half-precision-q6k", "q5k-high-bits-dropped", "q6k-offset", "swapped-nibbles"},
    ),
]


@pytest.mark.parametrize(("module", "old", "new", "part", "names"), CHANGES, ids=[change[0] for change in CHANGES])
def test_a_change_here_ages_the_records_that_depend_on_it(
    before: Records, monkeypatch: pytest.MonkeyPatch, module: str, old: str, new: str, part: str, names: set[str]
) -> None:
    monkeypatch.setattr(digests, "TREES", edited(f"q4kd.harness.{module}", old, new))
    asked = {
        (claim, planted)
        for claim, planted in before
        if (falsifiers()[claim][1].experiment if part == "experiment" else planted) in names
    }
    assert asked and stale_parts(before, records()) == {part: asked}


@pytest.mark.parametrize(
    ("module", "old", "new", "part"),
    [
        ("q4kd.harness.judge", "worst = min(", "worst = max(", "judge"),
        (
            "q4kd.harness.checks.survives",
            'observation["steps"] < wanted',
            'observation["steps"] <= wanted',
            "check survives",
        ),
        ("q4kd.trainer.step", "def train_step(", "async def train_step(", "target train_step"),
    ],
)
def test_a_changed_judge_check_or_target_ages_the_records_that_have_it(
    before: Records, monkeypatch: pytest.MonkeyPatch, module: str, old: str, new: str, part: str
) -> None:
    monkeypatch.setattr(digests, "TREES", edited(module, old, new))
    assert stale_parts(before, records()) == {part: {record for record, parts in before.items() if part in parts}}


def test_every_record_is_keyed_within_seconds() -> None:
    start = time.process_time()
    digests.TREES, trees = SyntaxTrees(), digests.TREES
    try:
        assert len(records()) > 150
    finally:
        digests.TREES = trees
    assert time.process_time() - start < 4  # 0.9 s where it was written


MOVED = {
    "q4kd.harness.reference": "q4kd.harness.oracles.reference",
    "q4kd.harness.block_spec": "q4kd.harness.oracles.block_spec",
    "q4kd.harness.checks.judgement": "q4kd.harness.checks.deep.judgement",
    "q4kd.harness.experiments_teacher": "q4kd.harness.experiments_of.teacher",
    "q4kd.harness.probes_runs": "q4kd.harness.probes_of.runs",
    "q4kd.harness.sabotage.faults_quant": "q4kd.harness.sabotage.faults_of.quant",
    "q4kd.trainer.quant": "q4kd.trainer.blocks.decode",
}
SAY = """
import json
from q4kd.harness import syntax_trees
from test_digests import records
print(syntax_trees.__file__)
print(json.dumps([[*key, parts] for key, parts in records().items()]))
"""


def test_modules_moved_to_other_folders_age_no_record(before: Records, tmp_path: Path) -> None:
    for folder in ("harness", "trainer"):
        shutil.copytree(
            ROOT / folder, tmp_path / "q4kd" / folder, ignore=shutil.ignore_patterns("*.gguf", "__pycache__")
        )

    def place(module: str) -> Path:
        return tmp_path.joinpath(*module.split(".")).with_suffix(".py")

    for old, new in MOVED.items():
        place(new).parent.mkdir(exist_ok=True)
        place(old).rename(place(new))
    for path in tmp_path.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        for old, new in MOVED.items():
            (home, _, name), (place_, _, _) = old.rpartition("."), new.rpartition(".")
            text = re.sub(
                rf"{re.escape(old)}\b",
                new,
                text.replace(f"from {home} import {name}\n", f"from {place_} import {name}\n"),
            )
        path.write_text(text, encoding="utf-8")
    paths = os.pathsep.join([str(tmp_path), str(ROOT / "tests")])
    process = subprocess.run(
        [sys.executable, "-c", SAY],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert process.returncode == 0, process.stderr
    used, _, said = process.stdout.partition("\n")
    assert used.startswith(str(tmp_path))
    after = {(claim, fault): parts for claim, fault, parts in json.loads(said)}
    assert stale_parts(before, after) == {}


# --- parts of a record ---


def fault(*targets: str) -> Fault:
    return Fault("f", "t", "loss", targets, print)


def test_the_key_follows_the_patched_function_and_not_its_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    one, planted = next(iter(falsifiers().values()))[0], fault("q4kd.trainer.files:sha256_file")
    key = record_key(one, planted, "distill-run", "cpu")
    for old, new, same in (
        ("digest.update(piece)", "digest.update(piece[:1])", False),
        ("def read_json(", "def read_json_(", True),
    ):
        monkeypatch.setattr(digests, "TREES", edited("q4kd.trainer.files", old, new))
        assert (record_key(one, planted, "distill-run", "cpu") == key) is same


def test_a_target_is_found_without_importing_it() -> None:
    assert "FunctionDef(name='sha256_file'" in target_tree("q4kd.trainer.files:sha256_file")
    assert "decorator_list=[cached_property,]" in target_tree("q4kd.harness.raw:RawRun.exit")
    assert target_tree("q4kd.trainer.files:_CHUNK").startswith("Assign(targets=[_CHUNK,]")
    assert target_tree("torch.nn.functional:linear") == "torch.nn.functional:linear"
    for missing in (
        "q4kd.trainer.files:gone",
        "q4kd.trainer.gone:f",
        "q4kd.gone.files:f",
        "q4kd.harness.raw:RawRun.gone",
    ):
        with pytest.raises(MissingTarget):
            target_tree(missing)


def test_parts_are_named_without_the_places_of_modules() -> None:
    targets = ("q4kd.trainer.files:read_json", "q4kd.trainer.events:EventLog.emit", "torch.nn.functional:linear")
    assert set(target_digests(fault(*targets))) == {"target read_json", "target EventLog.emit", "target linear"}
    same = [target_digests(fault("json:dumps", "pickle:dumps")), target_digests(fault("pickle:dumps", "json:dumps"))]
    assert same[0] == same[1] != target_digests(fault("json:dumps"))
    one = next(iter(falsifiers().values()))[0]
    assert {name.partition(" ")[0] for name in record_parts(one, fault(*targets), "distill-run", "cpu")} == {
        *("claim", "falsifier", "judge", "fault", "experiment", "check", "target")
    }


def test_every_prefix_of_what_decides_is_that_of_a_module() -> None:
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in ROOT.glob("*/**/*.py")]
    assert [prefix for prefix in digests.DECIDING if not any(f"q4kd.{name}".startswith(prefix) for name in names)] == []
