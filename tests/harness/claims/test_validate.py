"""``q4kd contracts validate``: what loads, what is refused, and how an editor sees the same files."""

import contextlib
import functools
import itertools
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from q4kd.harness.__main__ import main
from q4kd.harness.claims.contract import load_contract, parse_contract
from q4kd.harness.claims.folder import default_contracts_folder
from q4kd.harness.claims.plan import make_plan
from q4kd.harness.claims.profile import load_profile
from q4kd.harness.claims.schema import render_schema
from q4kd.harness.judging.judge import judge_claim
from q4kd.harness.judging.results import ClaimResult
from q4kd.trainer.errors import InputError
from q4kd.trainer.yaml_lines import parse_yaml

PROVABLE = Path(__file__).parents[2] / "provable"
CLAIMS = {
    "binding": 0,
    "layer-norm-kernel-v1": 2,
    "layout-rules-v1": 1,
    "open-questions-v1": 5,
    "queue-anchor-v1": 3,
    "token-sampler-v1": 3,
}
GOOD = """\
metadata: {description: d}
falsification_tests:
  - id: A-001
    rule: r
    prediction: p
    if_fails: f
    falsifier:
      check: parity
      experiment: teacher-parity
      params: {arm: demo, array: float64, metric: cosine, min: 0.999}
      profiles: {gb10: {params: {min: 0.99, arm: null}}}
      min_observations: 64
      sabotage: [wrong-subblock-scale]
"""


@pytest.mark.parametrize(("name", "count"), CLAIMS.items())
def test_files_of_the_upstream_format_load_unchanged_as_prose(name: str, count: int) -> None:
    contract = load_contract(PROVABLE / f"{name}.yaml")
    assert len(contract.claims) == count
    assert contract.raw == parse_yaml((PROVABLE / f"{name}.yaml").read_bytes(), "x").value  # nothing is dropped
    plan = make_plan([contract], load_profile("cpu"))
    assert [entry.scope for entry in plan.entries] == ["required"] * count
    for claim in contract.claims:
        assert claim.rule or "doubt" in claim.prose
        assert claim.falsifier is None
        assert judge_claim(claim, {}, "cpu") == ClaimResult.inconclusive("prose")


def test_prose_is_read_under_its_older_names() -> None:
    first, second, _ = load_contract(PROVABLE / "token-sampler-v1.yaml").claims
    assert (first.rule, first.if_fails) == ("The k-th largest is kept", "ties are dropped")
    assert second.prediction == "T == 0 gives Err(InvalidTemperature)"
    anchor = load_contract(PROVABLE / "queue-anchor-v1.yaml")
    assert anchor.claims[0].prediction == "the log names each job once; the counter equals the number of jobs"
    assert [claim.id for claim in anchor.claims[:2]] == ["1", "2"]
    assert anchor.claims[1].prose["evidence"] is None
    assert any("line 22" in warning and "no spaces" in warning for warning in anchor.warnings)


def test_an_entry_without_an_id_is_named_after_what_it_says() -> None:
    def ids(*entries: str) -> list[str]:
        data = "falsification_tests:\n" + "".join(f"  - {entry}\n" for entry in entries)
        return [claim.id for claim in parse_contract("a", data.encode(), "a.yaml").claims]

    one, two = "a cache helps", "{rule: it is bounded, test: see below}"
    first, second = ids(one, two)
    assert ids(two, one) == [second, first]
    assert ids(two.replace("below", "above"), one) == [second, first]
    assert ids(one, one, one) == [first, f"{first}-2", f"{first}-3"]
    assert first != second and first.startswith("prose-")


def test_the_entries_may_stand_under_one_of_two_names_and_not_both() -> None:
    text = "falsification_test: [a]\nfalsification_tests: [b]\n"
    with pytest.raises(InputError, match=r"a\.yaml:1: .*under falsification_test as well"):
        parse_contract("a", text.encode(), "a.yaml")
    assert len(parse_contract("a", b"falsification_test: [a]\nfalsification_tests:\n", "a.yaml").claims) == 1


def test_prose_may_be_odd_and_a_falsifier_may_not() -> None:
    for bad in ("id: A 1", "id:", "id: 7"):
        with pytest.raises(InputError, match=r"a\.yaml"):
            parse_contract("a", GOOD.replace("id: A-001", bad).encode(), "a.yaml")


def test_validate_counts_and_accepts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["contracts", "validate", str(PROVABLE)]) == 0
    out = capsys.readouterr().out
    assert "6 contracts (6 active), 14 claims: 0 executable, 14 prose; 0 failed to load" in out
    (tmp_path / "a.yaml").write_text(GOOD)
    assert main(["contracts", "validate", str(tmp_path / "a.yaml")]) == 0
    assert "1 contract (1 active), 1 claim: 1 executable, 0 prose" in capsys.readouterr().out


def test_control_characters_of_a_file_reach_no_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hostile = GOOD.replace("description: d", r'description: "\e[31mred"').replace("rule: r", r'rule: "\e[2J"')
    (tmp_path / "a.yaml").write_text(hostile)
    (tmp_path / "b.yaml").write_text(r'falsification_tests: [{id: "\e[1m", rule: odd id}]')
    assert main(["contracts", "show", "a", "--contracts", str(tmp_path)]) == 0
    assert main(["contracts", "validate", str(tmp_path)]) == 0
    (tmp_path / "c.yaml").write_text(GOOD.replace("check: parity", r'check: "\e[1m"'))
    assert main(["contracts", "validate", str(tmp_path)]) == 2
    shown = capsys.readouterr()
    assert "red" in shown.out and "cannot be used" in shown.out and "c.yaml:8" in shown.err
    assert "\x1b" not in shown.out + shown.err


def test_two_folders_may_each_have_a_file_of_one_name(tmp_path: Path) -> None:
    for folder in (tmp_path / "one", tmp_path / "two"):
        folder.mkdir()
        (folder / "a.yaml").write_text(GOOD)
    assert main(["contracts", "validate", str(tmp_path / "one"), str(tmp_path / "two")]) == 0


@pytest.mark.parametrize(
    ("old", "new", "line", "said"),
    [
        ("check: parity", "check: party", 8, "did you mean 'parity'?"),
        ("experiment: teacher-parity", "experiment: teacher-party", 9, "did you mean 'teacher-parity'?"),
        ("[wrong-subblock-scale]", "[wrong-superblock-scale]", 13, "did you mean 'wrong-subblock-scale'?"),
        ("[wrong-subblock-scale]", "[zzz]", 13, "the registry is closed"),
        ("min_observations: 64", "min_observation: 64", 12, "did you mean 'min_observations'?"),
        ("min: 0.999", "min: .nan", 10, "finite"),
        ("min: 0.999", "min: 1e999", 10, "finite"),
        ("min: 0.99,", "min: high,", 11, "'high' is not of type 'number'"),
        ("min_observations: 64", "check: parity", 12, "again (first on line 8)"),
        ("description: d", "description: *x", 1, "known anchor"),
        ("rule: r", "rule: ]", 4, "well-formed"),
    ],
)
def test_what_is_wrong_is_refused_with_file_line_and_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], old: str, new: str, line: int, said: str
) -> None:
    assert old in GOOD
    path = tmp_path / "a.yaml"
    path.write_text(GOOD.replace(old, new, 1))
    assert main(["contracts", "validate", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"q4kd: {path}:{line}: `{path.read_text().splitlines()[line - 1].strip()}`"), err
    assert said in err and err.count("\n") == 1


def test_a_file_that_would_take_long_takes_no_longer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.yaml").write_text("falsification_tests:\n" + "- the same\n" * 10_000)
    (tmp_path / "b.yaml").write_text("".join(f"falsification_tezts{i}: 1\n" for i in range(20_000)))
    needs = ", ".join(f"n{i}" for i in range(20_000))
    (tmp_path / "c.yaml").write_text(GOOD.replace("min_observations: 64", f"needs: [{needs}]"))
    start = time.process_time()
    assert main(["contracts", "validate", str(tmp_path)]) == 2
    assert time.process_time() - start < 5
    shown = capsys.readouterr()
    assert shown.out.count("b.yaml") == 21
    assert "10000 claims" in shown.out and "b.yaml: 19981 more" in shown.out and "c.yaml:12" in shown.err


def test_every_broken_file_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.yaml").write_text(GOOD)
    (tmp_path / "b.yaml").write_text(GOOD.replace("parity", "party"))
    (tmp_path / "c.yaml").write_bytes(b"x" * ((4 << 20) + 1))
    assert main(["contracts", "validate", str(tmp_path)]) == 2
    shown = capsys.readouterr()
    assert [part in shown.err for part in ("a.yaml", "b.yaml:8", "c.yaml", "4194304 bytes")] == [
        False,
        True,
        True,
        True,
    ]
    assert "1 contract" in shown.out and "2 failed to load" in shown.out


def test_an_empty_set_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("no YAML here")
    for path in (tmp_path / "empty", tmp_path / "other", tmp_path / "none", PROVABLE / "binding.yaml"):
        assert main(["contracts", "validate", str(path)]) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_names_are_looked_up_without_torch(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(GOOD.replace("[wrong-subblock-scale]", "[wrong-superblock-scale]"))
    code = (
        "import sys; sys.modules['torch'] = None; from q4kd.harness.__main__ import main; sys.exit(main(sys.argv[1:]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "contracts", "validate", str(tmp_path)],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 2 and "did you mean 'wrong-subblock-scale'?" in done.stderr


def test_a_thousand_files_are_validated_in_under_five_seconds(tmp_path: Path) -> None:
    shipped = [path.read_bytes() for path in sorted(default_contracts_folder().glob("*v1.yaml"))[:3]]
    texts = itertools.cycle([*(path.read_bytes() for path in sorted(PROVABLE.glob("*.yaml"))), *shipped])
    for index in range(1000):
        (tmp_path / f"c{index}.yaml").write_bytes(next(texts))
    start = time.process_time()
    assert main(["contracts", "validate", str(tmp_path)]) == 0
    assert time.process_time() - start < 5


# --- editors ---


@functools.cache
def schema() -> Any:
    return json.loads(render_schema())


def errors(text: str) -> list[str]:
    return [error.message for error in Draft202012Validator(schema()).iter_errors(parse_yaml(text.encode(), "x").value)]


def test_the_committed_schema_knows_what_is_registered() -> None:
    committed = (default_contracts_folder() / "contract.schema.json").read_text()
    remedy = "run `q4kd contracts schema --out contracts/contract.schema.json`"
    assert committed == render_schema(), remedy


def test_the_schema_is_one_and_describes_every_field() -> None:
    Draft202012Validator.check_schema(schema())

    def undescribed(node: object, path: str) -> list[str]:
        found = []
        if isinstance(node, dict):
            for name, field in node.get("properties", {}).items():
                conditional = path.endswith(("/then", "/if", "/else"))
                if not conditional and "description" not in field and "$ref" not in field:
                    found.append(f"{path}/{name}")
            for key, value in node.items():
                found += undescribed(value, f"{path}/{key}")
        return found

    # What the registries hold is described by its owners.
    assert [path for path in undescribed(schema(), "") if not path.startswith("/$defs/registered/")] == []


FILES = sorted([*default_contracts_folder().glob("*.yaml"), *PROVABLE.glob("*.yaml")])


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_contract_and_fixture_obeys_the_schema(path: Path) -> None:
    assert errors(path.read_text()) == []


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("check: parity", "check: party"),
        ("check: parity", "chek: parity"),
        ("experiment: teacher-parity", "experiment: teacher-party"),
        ("[wrong-subblock-scale]", "[wrong-superblock-scale]"),
        ("min: 0.999", "minimum: 0.999"),
        ("metric: cosine", "metric: angle"),
        ("{min: 0.99, arm: null}", "{mn: 0.99}"),
        ("min_observations: 64", "min_observations: 0"),
        ("min_observations: 64", "needs: [gpu]"),
        ("min_observations: 64", "also: [{check: parity, params: {array: x, metric: cosine}}]"),
        ("min_observations: 64", "also: [{check: party}]"),
        ("min_observations: 64", "timeout: 64"),
        ("    if_fails: f\n", ""),
        ("id: A-001", "id: A 001"),
    ],
)
def test_schema_and_loader_refuse_the_same(tmp_path: Path, old: str, new: str) -> None:
    assert old in GOOD and errors(GOOD) == []
    broken = GOOD.replace(old, new, 1)
    assert errors(broken) != []
    (tmp_path / "a.yaml").write_text(broken)
    assert main(["contracts", "validate", str(tmp_path)]) == 2


# --- anything at all ---


def documents() -> Iterator[st.SearchStrategy[Any]]:
    scalars = st.none() | st.booleans() | st.integers(-9, 9) | st.floats() | st.text(max_size=8)
    anything = st.recursive(
        scalars, lambda below: st.lists(below, max_size=3) | st.dictionaries(scalars, below, max_size=3), max_leaves=8
    )
    words = ("check", "experiment", "params", "also", "profiles", "needs", "work", "sabotage", "min_observations")
    falsifier = st.fixed_dictionaries(
        {"check": st.just("parity") | anything, "experiment": st.just("teacher-parity") | anything},
        optional=dict.fromkeys(words[2:], anything),
    )
    keys = ("id", "rule", "name", "prediction", "test", "evidence", "if_fails")
    entry = st.fixed_dictionaries({}, optional=dict.fromkeys(keys, anything) | {"falsifier": falsifier | anything})
    tops = ("metadata", "equations", "falsification_test", "qa_gate")
    yield st.fixed_dictionaries(
        {"falsification_tests": st.lists(entry | anything, max_size=3) | anything},
        optional=dict.fromkeys(tops, anything),
    )


@settings(max_examples=300, deadline=None)
@given(next(documents()))
def test_any_document_loads_or_is_refused_in_one_line(value: Any) -> None:
    with contextlib.suppress(yaml.YAMLError):
        data = yaml.safe_dump(value, allow_unicode=True).encode("utf-8", "surrogatepass")
        try:
            contract = parse_contract("a", data, "a.yaml")
        except InputError as error:
            assert "\n" not in str(error).strip()
        else:
            assert len({claim.key for claim in contract.claims}) == len(contract.claims)
