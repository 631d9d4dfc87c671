import contextlib
from pathlib import Path

import pytest
from example_bundle import CONTRACT, PROSE, register
from hypothesis import given
from hypothesis import strategies as st

from q4kd.harness.claims.contract import load_contract, load_contracts, parse_contract
from q4kd.harness.claims.model import merge
from q4kd.trainer.errors import InputError
from q4kd.trainer.yaml_lines import parse_yaml, plain_scalar


@pytest.fixture(autouse=True)
def checks(monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch)


def parse(text: str) -> object:
    return parse_contract("demo-v1", text.encode(), "dir/demo-v1.yaml", profiles=["cpu", "gb10"])


def test_a_contract_is_read_with_its_lines_and_identity() -> None:
    contract = parse_contract("demo-v1", (CONTRACT + PROSE).encode(), "demo-v1.yaml")
    first, second, third = contract.claims
    assert (first.key, first.line) == ("demo-v1::DEMO-001", 5)
    assert first.falsifier is not None and first.falsifier.params == {"limit": 100.5}
    assert second.falsifier is not None and second.falsifier.needs == ("cuda",)
    assert third.falsifier is None and third.prediction == "nobody checks this"
    assert contract.status == "active" and contract.description == "a demonstration"


@pytest.mark.parametrize(
    ("old", "new", "line", "quoted", "said"),
    [
        ("limit: 100.5", "limt: 100.5", 12, "params: {limt: 100.5}", "did you mean 'limit'?"),
        ("limit: 100.5", "limit: low", 12, "params: {limit: low}", "'low' is not of type 'number'"),
        ("limit: 100.5", "limit: .nan", 12, "params: {limit: .nan}", "finite"),
        ("check: peak", "check: paek", 10, "check: paek", "did you mean 'peak'?"),
        ("check: peak", "check: log_absent", 10, "check: log_absent", "log checks alone"),
        ("experiment: demo\n", "experiment: ../demo\n", 11, "experiment: ../demo", "does not match"),
        ("min_observations: 3", "min_observation: 3", 13, "min_observation: 3", "did you mean 'min_observations'?"),
        ("min_observations: 3", "min_observations: 0", 13, "min_observations: 0", "minimum"),
        ("sabotage: [ballast]", "sabotage: [a, b, a]", 14, "sabotage: [a, b, a]", "each name once"),
        ("needs: [cuda]", "needs: [cuda, cuda]", 23, "needs: [cuda, cuda]", "each name once"),
        ("sabotage: [ballast]", "sabotage: []", 9, "falsifier:", "at least one fault"),
        ("    falsifier:", "    falsifer:", 9, "falsifer:", "'falsifier'"),
        ("    rule: the peak stays low\n", "", 5, "- id: DEMO-001", "'rule' is a required property"),
        ("DEMO-002", "DEMO-001", 15, "- id: DEMO-001", "again (first on line 5)"),
        ("min_observations: 3", "work: {flops: 1}", 13, "work: {flops: 1}", "only beside a check that bounds a time"),
        ("needs: [cuda]", "needs: [gpu]", 23, "needs: [gpu]", "'gpu' is not one of"),
        ("min_observations: 3", "profiles: {gb01: {}}", 13, "profiles: {gb01: {}}", "gb10"),
        ("min_observations: 3", "profiles: {gb10: {params: {limit: a}}}", 13, "gb10", "'a' is not of type"),
        ("  description: a", "  status: deprecated\n  description: a", 3, "status: deprecated", "active, demoted"),
        ("metadata:\n", "metadata:\n  version: 2\n", 3, "version: 1.0.0", "again (first on line 2)"),
    ],
)
def test_an_error_names_file_line_and_text(old: str, new: str, line: int, quoted: str, said: str) -> None:
    assert old in CONTRACT
    with pytest.raises(InputError) as caught:
        parse(CONTRACT.replace(old, new, 1))
    message = str(caught.value)
    assert message.startswith(f"dir/demo-v1.yaml:{line}: `"), message
    assert quoted in message and said in message


def test_sabotage_may_be_empty_once_demoted() -> None:
    text = CONTRACT.replace("sabotage: [ballast]", "sabotage: []").replace("version:", "status: demoted\n  version:")
    assert parse(text).status == "demoted"  # type: ignore[attr-defined]


def test_log_absent_counts_beside_a_measuring_check() -> None:
    also = "check: log_absent\n      also: [{check: peak, params: {limit: 5}}]"
    contract = parse_contract("d", CONTRACT.replace("check: peak", also, 1).encode(), "d.yaml")
    assert contract.claims[0].falsifier is not None
    assert [use.check for use in contract.claims[0].falsifier.checks] == ["log_absent", "peak"]


def test_a_profile_overrides_key_by_key_and_null_removes() -> None:
    text = CONTRACT.replace(
        "min_observations: 3",
        "min_observations: 3\n      profiles: {gb10: {params: {limit: 7, floor: null}, timeout_s: 9}}",
    )
    falsifier = parse_contract("d", text.encode(), "d.yaml").claims[0].falsifier
    assert falsifier is not None
    there = falsifier.for_profile("gb10")
    assert (there.params, there.timeout_s) == ({"limit": 7}, 9)
    assert falsifier.for_profile("cpu").params == {"limit": 100.5}
    assert merge({"a": {"b": 1, "c": 2}}, {"a": {"b": None, "d": 3}}) == {"a": {"c": 2, "d": 3}}


UPSTREAM = """\
metadata: {version: 1.0.0, created: 2026-02-18, status: proposed}
kind: kernel
equations: [{name: softmax, formula: "a: b"}]
kani_harnesses: []
falsification_tests:
  - id: FALSIFY-SM-001
    name: Normalization
    expected: sums to one
    falsification_test: proptest
    fails_if: trick missing
qa_gate: {id: F-SM-001}
"""


def test_upstream_files_load_unchanged_with_unknown_keys_kept() -> None:
    contract = parse_contract("softmax", UPSTREAM.encode(), "softmax.yaml")
    claim = contract.claims[0]
    assert (claim.rule, claim.prediction, claim.if_fails) == ("Normalization", "sums to one", "trick missing")
    assert contract.raw["kind"] == "kernel" and claim.falsifier is None
    assert any("status" in warning for warning in contract.warnings)


@pytest.mark.parametrize("key", ["falsification", "falsifcation_tests", "falsification-tests"])
def test_a_misspelt_top_level_key_is_warned_about(key: str) -> None:
    contract = parse_contract("a", UPSTREAM.replace("falsification_tests", key).encode(), "a.yaml")
    assert contract.claims == () and "did you mean 'falsification_tests'" in " ".join(contract.warnings)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "empty file"),
        (b"- a\n", "mapping"),
        (b"a: 1\n---\nb: 2\n", "one YAML document"),
        (b"a: *x\n", "known anchor"),
        (b"a: &x [*x]\n", "inside itself"),
        (b"a: {<<: {b: 1}}\n", "merge key"),
        (b"a: !!python/object:os.system x\n", "tag"),
        (b"? [a]\n: b\n", "scalar key"),
        (b"a: \xff\n", "UTF-8"),
        (b"a: [\n", "well-formed"),
        (b"[" * 5000, "64 levels"),
        (b"a: [" + b"1," * 200_001 + b"]", "200000 values"),
        (b"x" * ((4 << 20) + 1), "bytes of YAML"),
    ],
)
def test_hostile_yaml_is_refused(data: bytes, said: str) -> None:
    with pytest.raises(InputError, match=r"a\.yaml") as caught:
        parse_contract("a", data, "a.yaml")
    assert said in str(caught.value)


def test_an_alias_bomb_is_refused_before_it_is_expanded() -> None:
    levels = ["a0: &a0 [x,x,x,x,x,x,x,x,x,x]"]
    levels += [f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)]
    with pytest.raises(InputError, match="10000 nodes"):
        parse_yaml("\n".join(levels).encode(), "bomb.yaml")


def test_scalars_are_those_of_yaml_1_2() -> None:
    assert parse_yaml(b"[6.0e9, no, 1:30, 010, 2026-02-18, '5', 0x10, .5, ~]", "s").value == [
        6.0e9, "no", "1:30", 10, "2026-02-18", "5", 16, 0.5, None,
    ]  # fmt: skip


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_every_float_reads_back(value: float) -> None:
    assert plain_scalar(repr(value)) == value


@given(st.binary(max_size=300))
def test_any_bytes_load_or_are_refused(data: bytes) -> None:
    with contextlib.suppress(InputError):
        parse_contract("a", data, "a.yaml")


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(InputError):
            load_contracts(folder)


def test_two_files_with_one_name_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(CONTRACT)
    (tmp_path / "a.yml").write_text(CONTRACT)
    with pytest.raises(InputError, match="each contract name once"):
        load_contracts(tmp_path)


def test_the_file_stem_is_the_name(tmp_path: Path) -> None:
    (tmp_path / "my contract.yaml").write_text(CONTRACT)
    with pytest.raises(InputError, match="rename the file"):
        load_contract(tmp_path / "my contract.yaml")
