"""Keys of this installation's kill records: what ages none, and which ones a change ages."""

import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import pytest
from edited_sources import edited, reworded, with_moved

from q4kd.harness.claims.contract import load_contracts
from q4kd.harness.claims.folder import default_contracts_folder
from q4kd.harness.claims.model import Claim, Falsifier
from q4kd.harness.judging import digests
from q4kd.harness.judging.digests import record_key, record_parts, target_digests, target_tree
from q4kd.harness.judging.syntax_trees import Source, SyntaxTrees, read_source
from q4kd.harness.runs.experiment import EXPERIMENTS
from q4kd.harness.runs.faults import Fault, MissingTarget, all_faults

ROOT = Path(__file__).parents[3]
Records = dict[tuple[str, str], dict[str, str]]


@cache
def falsifiers() -> dict[str, tuple[Claim, Falsifier]]:
    claims = [claim for contract in load_contracts(default_contracts_folder()) for claim in contract.claims]
    return {claim.key: (claim, claim.falsifier) for claim in claims if claim.falsifier is not None}


def records() -> Records:
    """Return the parts of every record of the contracts, by claim and fault."""
    faults = all_faults()
    return {
        (key, name): record_parts(claim, faults[name], falsifier.experiment, "cpu", "cpu")
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
    ("oracles.block_spec", "-block_sums @", "block_sums @", "experiment", {"superblock"}),
    (
        *("subjects.robustness.probes", "_POLL_S = 0.0005", "_POLL_S = 0.001", "experiment"),
        {
            "damaged-resumes",
            "killed-runs",
            *("foreign-files", "hostile-folder", "night-in-a-project", "other-inputs"),
            *(name for name in EXPERIMENTS if name.startswith("run-") and name != "run-files"),
        },
    ),
    (
        *("subjects.runs.probes", "if message.count", "if 2 * message.count", "experiment"),
        {"refused-caches", "refused-data", "refused-exports", "refused-runs"},
    ),
    (
        *("inputs.collect", "min(counters)", "max(counters)", "experiment"),
        {
            *("cuda-distill-30b", "distill-7b", "distill-7b-long", "distill-mixture", "distill-run", "smoke-run"),
            "vocabulary-run",
        },
    ),
    (
        *("subjects.teacher.faults", "out.copy_(out.half())", "out.copy_(out.bfloat16())", "fault"),
        {"half-precision-q4k", "half-precision-q6k"},
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


def test_what_a_fault_is_called_in_its_declaration_ages_no_record(
    before: Records, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = "Q4_K's mins are taken as zero", "Q4_K's mins are forgotten"
    monkeypatch.setattr(digests, "TREES", edited("q4kd.harness.subjects.teacher.faults", old, new))
    assert stale_parts(before, records()) == {}


@pytest.mark.parametrize(
    ("module", "old", "new", "part"),
    [
        ("q4kd.harness.judging.judge", "worst = min(", "worst = max(", "judge"),
        (
            "q4kd.harness.checks.survives",
            'observation["steps"] < wanted',
            'observation["steps"] <= wanted',
            "check survives",
        ),
        ("q4kd.trainer.train.step", "def train_step(", "async def train_step(", "target train_step"),
    ],
)
def test_a_changed_judge_check_or_target_ages_the_records_that_have_it(
    before: Records, monkeypatch: pytest.MonkeyPatch, module: str, old: str, new: str, part: str
) -> None:
    monkeypatch.setattr(digests, "TREES", edited(module, old, new))
    assert stale_parts(before, records()) == {part: {record for record, parts in before.items() if part in parts}}


def test_threads_that_read_at_one_time_find_the_same_keys(before: Records, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digests, "TREES", SyntaxTrees())
    with ThreadPoolExecutor(8) as pool:
        for found in pool.map(lambda _turn: records(), range(8)):
            assert stale_parts(before, found) == {}


def test_every_record_is_keyed_within_seconds() -> None:
    start = time.process_time()
    digests.TREES, trees = SyntaxTrees(), digests.TREES
    try:
        assert len(records()) > 150
    finally:
        digests.TREES = trees
    assert time.process_time() - start < 4  # 0.9 s where it was written


MOVED = {
    "q4kd.harness.oracles.reference": "q4kd.harness.oracles.deep.reference",
    "q4kd.harness.oracles.block_spec": "q4kd.harness.oracles.deep.layouts",
    "q4kd.harness.checks.judgement": "q4kd.harness.checks.deep.judgement",
    "q4kd.harness.subjects.teacher.experiments": "q4kd.harness.subjects.elsewhere.experiments",
    "q4kd.harness.subjects.runs.probes": "q4kd.harness.subjects.elsewhere.probes_of_runs",
    "q4kd.harness.subjects.teacher.faults": "q4kd.harness.subjects.elsewhere.faults",
    "q4kd.trainer.formats.blocks.decode": "q4kd.trainer.blocks.decode",
}
SAY = """
import json
from q4kd.harness.judging import syntax_trees
from test_record_keys import records
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
        (place(new).parent / "__init__.py").touch()
        place(old).rename(place(new))
    for path in tmp_path.rglob("*.py"):
        path.write_text(with_moved(path.read_text(encoding="utf-8"), MOVED), encoding="utf-8")
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT / "tests/support"), str(Path(__file__).parent)]),
    }
    command = [sys.executable, "-c", SAY]
    process = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
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
    key = record_key(one, planted, "distill-run", "cpu", "cpu")
    for old, new, same in (
        ('file_digest(file, "sha256")', 'file_digest(file, "sha1")', False),
        ("def read_json(", "def read_json_(", True),
    ):
        monkeypatch.setattr(digests, "TREES", edited("q4kd.trainer.files", old, new))
        assert (record_key(one, planted, "distill-run", "cpu", "cpu") == key) is same


def test_a_target_is_found_without_importing_it() -> None:
    assert "FunctionDef(name='sha256_file'" in target_tree("q4kd.trainer.files:sha256_file")
    assert "decorator_list=[cached_property,]" in target_tree("q4kd.harness.records.raw_run:RawRun.exit")
    assert target_tree("q4kd.trainer.files:FieldKind").startswith("Assign(targets=[FieldKind,]")
    assert target_tree("torch.nn.functional:linear") == "torch.nn.functional:linear"
    for missing in (
        "q4kd.trainer.files:gone",
        "q4kd.trainer.gone:f",
        "q4kd.gone.files:f",
        "q4kd.harness.records.raw_run:RawRun.gone",
    ):
        with pytest.raises(MissingTarget):
            target_tree(missing)


def test_parts_are_named_without_the_places_of_modules() -> None:
    targets = ("q4kd.trainer.files:read_json", "q4kd.trainer.events:EventLog.emit", "torch.nn.functional:linear")
    assert set(target_digests(fault(*targets))) == {"target read_json", "target EventLog.emit", "target linear"}
    same = [target_digests(fault("json:dumps", "pickle:dumps")), target_digests(fault("pickle:dumps", "json:dumps"))]
    assert same[0] == same[1] != target_digests(fault("json:dumps"))
    one = next(iter(falsifiers().values()))[0]
    assert {name.partition(" ")[0] for name in record_parts(one, fault(*targets), "distill-run", "cpu", "cpu")} == {
        *("claim", "falsifier", "judge", "fault", "experiment", "check", "target")
    }


def test_every_prefix_of_what_decides_is_that_of_a_module() -> None:
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in ROOT.glob("*/**/*.py")]
    assert [prefix for prefix in digests.DECIDING if not any(f"q4kd.{name}".startswith(prefix) for name in names)] == []
