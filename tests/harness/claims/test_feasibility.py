"""Time bounds against rooflines. A check ``latency`` stands in for any check that bounds a time."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from q4kd.harness.__main__ import main
from q4kd.harness.checks import CHECKS
from q4kd.harness.claims.contract import load_contract, parse_contract
from q4kd.harness.claims.feasibility import FORMULAS, assess, read_work
from q4kd.harness.claims.model import Claim
from q4kd.harness.claims.plan import make_plan
from q4kd.harness.claims.profile import Profile, Roofline, load_profile
from q4kd.harness.claims.rules import read_schema
from q4kd.trainer.errors import InputError

FOLDER = Path(__file__).parents[2] / "feasibility"
SEED, RESTATED = FOLDER / "seed-latency-v1.yaml", FOLDER / "restated-latency-v1.yaml"
NUMBER = {"type": "number"}
LATENCY = SimpleNamespace(
    NAME="latency",
    PARAMS={
        "type": "object",
        "additionalProperties": False,
        "properties": {
            "array": {"type": "string"},
            "max_s": NUMBER,
            "rate": {"type": "object", "properties": {"min_per_s": NUMBER}},
        },
    },
    DIRECTIONS={"max_s": "upper", "rate.min_per_s": "lower"},
    TIME_BOUNDS={"max_s": "seconds", "rate.min_per_s": "per_second"},
)


@pytest.fixture(autouse=True)
def latency(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("q4kd.harness.checks.CHECKS", {**CHECKS, "latency": LATENCY})


def machine(flops: float | None = 92e12, rate: float | None = 231e9, measured: bool = True) -> Profile:
    rooflines = {
        name: Roofline(value=value, unit=unit, measured=measured, source="s")
        for name, value, unit in (("bf16_flops", flops, "FLOP/s"), ("bytes_per_s", rate, "B/s"))
        if value is not None
    }
    return Profile(name="m", description="d", provides=frozenset({"cuda"}), rooflines=rooflines)


def claim(text: str | None = None) -> Claim:
    return parse_contract("c", (text or SEED.read_text()).encode(), "c.yaml").claims[0]


def edited(old: str, new: str) -> Claim:
    text = SEED.read_text()
    assert old in text
    return claim(text.replace(old, new))


def test_the_seeds_half_second_is_below_what_the_machine_can_do() -> None:
    # Qwen2.5-7B multiplies each token with 28 layers of q, k, v, o and three MLP matrices, and with the head.
    layer = 2 * 3584 * 3584 + 2 * 3584 * 512 + 3 * 3584 * 18944
    assert 28 * layer + 152064 * 3584 == pytest.approx(7.07e9, rel=1e-3)
    (found,) = assess(claim(), load_profile("gb10"))
    assert found.outcome == "infeasible"
    assert found.arithmetic == (
        "2 x 7.07e+09 weights x 8192 tokens = 115.8 TFLOP; 115.8 TFLOP / 92 TFLOP/s = 1.26 s > 0.5 s, which would take "
        "231.7 TFLOP/s; 4.37 GB / 231 GB/s = 0.0189 s ≤ 0.5 s"
    )


def test_validate_fails_on_it_and_shows_the_arithmetic(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["contracts", "validate", str(SEED)]) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith(
        f"q4kd: {SEED}:6: SEED-LATENCY-001 on gb10: expected a time that this machine's measured"
    )
    assert "115.8 TFLOP / 92 TFLOP/s = 1.26 s > 0.5 s" in shown.err and shown.err.count("\n") == 1
    assert "0 failed to load; 1 infeasible" in shown.out
    assert main(["contracts", "validate", str(RESTATED)]) == 0
    shown = capsys.readouterr()
    assert shown.err == "" and "infeasible" not in shown.out


def test_an_unmeasured_roofline_decides_nothing_and_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    (found,) = assess(edited("max_s: 0.5", "max_s: 1.0e-3"), machine(measured=False))
    assert found.outcome == "unknown" and "1.26 s > 0.001 s" in found.arithmetic
    assert "bf16_flops of m is not measured; the roofline bytes_per_s of m is not measured" in found.arithmetic
    (found,) = assess(claim(), machine(flops=None))
    assert found.outcome == "unknown" and "profile m has no roofline bf16_flops" in found.arithmetic
    main(["contracts", "validate", str(RESTATED)])
    unmeasured = [roof for roof in load_profile("h200").rooflines.values() if not roof.measured]
    assert ("LATENCY-001 on h200: feasibility unknown" in capsys.readouterr().out) == bool(unmeasured)


def test_one_measured_roofline_is_enough_to_refute() -> None:
    (found,) = assess(edited("bytes: 4.37e+9", "bytes: 4.37e+12"), machine(flops=None))
    assert found.outcome == "infeasible"


def test_the_bound_of_the_profile_counts() -> None:
    kinder = edited("needs: [cuda]", "needs: [cuda]\n      profiles: {gb10: {params: {max_s: 2}}}")
    assert [found.outcome for found in assess(kinder, load_profile("gb10"))] == ["feasible"]
    assert [found.outcome for found in assess(kinder, machine())] == ["infeasible"]


def test_a_rate_is_the_time_of_one_item() -> None:
    work = "work: {flops: 1.0e+12}"
    text = SEED.read_text().replace("work: {formula: forward, weights: 7.07e+9, tokens: 8192, bytes: 4.37e+9}", work)
    for rate, outcome in (("91", "feasible"), ("93", "infeasible"), ("0", None)):
        rated = claim(text.replace("{array: forward, max_s: 0.5}", f"{{rate: {{min_per_s: {rate}}}}}"))
        assert [found.outcome for found in assess(rated, machine())] == ([outcome] if outcome else [])


def test_out_of_scope_and_prose_are_not_assessed() -> None:
    assert assess(claim(), load_profile("cpu")) == []
    assert assess(replace(claim(), falsifier=None), machine()) == []


@pytest.mark.parametrize("status", ["active", "demoted", "retired"])
def test_only_an_active_contract_must_be_feasible(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], status: str
) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(SEED.read_text().replace("status: active", f"status: {status}"))
    assert main(["contracts", "validate", str(path)]) == (2 if status == "active" else 0)
    shown = capsys.readouterr()
    assert "1.26 s > 0.5 s" in (shown.err if status == "active" else shown.out)


def test_the_plan_records_it() -> None:
    contract = load_contract(SEED)
    (entry,) = make_plan([contract], load_profile("gb10")).entries
    assert entry.scope == "required"
    assert entry.infeasible is not None and "115.8 TFLOP / 92 TFLOP/s = 1.26 s > 0.5 s" in entry.infeasible
    (elsewhere,) = make_plan([contract], load_profile("cpu")).entries
    assert (elsewhere.scope, elsewhere.infeasible) == ("out_of_scope", None)
    (holds,) = make_plan([load_contract(RESTATED)], load_profile("gb10")).entries
    assert holds.infeasible is None


def test_show_tells_each_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["contracts", "show", "restated-latency-v1", "--contracts", str(FOLDER)]) == 0
    assert "feasible on gb10: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("work", "said"),
    [
        ("", "`work:` beside a check that bounds a time"),
        ("work: {}", "not valid"),
        ("work: {weights: 1, tokens: 2}", "'weights' is not one of"),
        ("work: {formula: forward, weights: 1}", "'tokens' is a required property"),
        ("work: {formula: forward, weights: 1, tokens: 1, flops: 1}", "'flops' is not one of"),
        ("work: {formula: forward, weights: 1, tokens: 1, student_weights: 1}", "'student_weights' is not one of"),
        ("work: {formula: distillation_step, weights: 1, tokens: 1}", "required property"),
        ("work: {formula: guess, tokens: 1}", "'guess' is not one of"),
        ("work: {flops: 0}", "exclusiveMinimum"),
        ("work: {flops: -1}", "exclusiveMinimum"),
        ("work: {flops: .inf}", "maximum"),
        ("work: {flops: .nan}", "finite"),
        ("work: {flops: 1.0e+40}", "maximum"),
        ("work: {flops: '1'}", "not of type 'number'"),
        ("work: {flop: 1}", "'flop' is not one of"),
        ("work: 5", "not of type 'object'"),
    ],
)
def test_work_is_required_and_must_be_stated_well(work: str, said: str) -> None:
    old = "work: {formula: forward, weights: 7.07e+9, tokens: 8192, bytes: 4.37e+9}"
    with pytest.raises(InputError, match=r"c\.yaml:1[0-9]: ") as caught:
        edited(old, work)
    assert said in str(caught.value)


def test_the_formulas_are_those_of_the_schema() -> None:
    work = read_schema(registered=True)["$defs"]["work"]
    assert work["properties"]["formula"]["enum"] == list(FORMULAS)
    required = {
        rule["if"]["properties"]["formula"]["const"]: rule["then"]["required"]
        for rule in work["allOf"]
        if "required" in rule["then"]
    }
    assert required == {name: list(formula.keys) for name, formula in FORMULAS.items()}
    step = read_work({"formula": "distillation_step", "teacher_weights": 10, "student_weights": 1, "tokens": 3})
    assert step.flops == (2 * 10 + 6 * 1) * 3
    assert step.counted == "(2 x 10 + 6 x 1 weights) x 3 tokens = 78 FLOP; "
    assert read_work({"bytes": 5}).bytes == 5


NUMBERS = st.floats(1.0, 1e18)


@given(NUMBERS, NUMBERS, NUMBERS, NUMBERS, st.floats(1e-6, 1e6))
def test_infeasible_is_exactly_a_bound_below_the_floor(
    flops: float, moved: float, flop_rate: float, byte_rate: float, seconds: float
) -> None:
    params = {"max_s": seconds}
    base = claim()
    assert base.falsifier is not None
    made: Any = replace(base, work={"flops": flops, "bytes": moved}, falsifier=replace(base.falsifier, params=params))
    (found,) = assess(made, machine(flop_rate, byte_rate))
    below = seconds < max(flops / flop_rate, moved / byte_rate)
    assert found.outcome == ("infeasible" if below else "feasible")
