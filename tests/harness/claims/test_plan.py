import importlib.util
import json
from dataclasses import replace

import pytest
from example_bundle import CONTRACT, PROSE, register

from q4kd.harness.claims.contract import parse_contract
from q4kd.harness.claims.model import Contract
from q4kd.harness.claims.plan import Plan, make_plan, parse_selection, plan_differences
from q4kd.harness.claims.profile import GpuProbe, find_extras, load_profile
from q4kd.trainer.errors import InputError


@pytest.fixture
def contract(monkeypatch: pytest.MonkeyPatch) -> Contract:
    register(monkeypatch)
    return parse_contract("demo-v1", (CONTRACT + PROSE).encode(), "demo-v1.yaml")


def test_scope_follows_what_the_profile_provides(contract: Contract) -> None:
    plan = make_plan([contract], load_profile("cpu"))
    assert [entry.scope for entry in plan.entries] == ["required", "out_of_scope", "required"]
    assert plan.entries[1].reason == "needs cuda; profile cpu provides cpu"
    assert plan.entries[2].experiment is None and plan.scope == "full"
    assert [entry.scope for entry in make_plan([contract], load_profile("gb10")).entries] == ["required"] * 3


def needing(contract: Contract, *needs: str) -> Contract:
    first = contract.claims[0]
    assert first.falsifier is not None
    return replace(contract, claims=(replace(first, falsifier=replace(first.falsifier, needs=needs)),))


def test_what_machines_of_one_class_differ_in_is_decided_by_the_machine(contract: Contract) -> None:
    two = needing(contract, "cuda", "two_gpus")
    (without,) = make_plan([two], load_profile("h200")).entries
    assert (without.scope, without.reason) == (
        "out_of_scope",
        "needs two_gpus: this machine has fewer than two GPUs that CUDA may use",
    )
    plan = make_plan([two], load_profile("h200"), extras={"two_gpus", "bitsandbytes"})
    assert plan.entries[0].scope == "required" and plan.extras == ("bitsandbytes", "two_gpus")
    (elsewhere,) = make_plan([two], load_profile("cpu"), extras=["two_gpus"]).entries
    assert elsewhere.reason == "needs cuda; profile cpu provides cpu"
    (package,) = make_plan([needing(contract, "bitsandbytes")], load_profile("cpu")).entries
    assert package.reason == "needs bitsandbytes: bitsandbytes is not installed (pip install 'q4kd[bnb]')"


def test_real_files_are_there_when_all_three_were_given(contract: Contract) -> None:
    nothing = GpuProbe(driver_present=False)
    assert find_extras(lambda: nothing, {}, given=["teacher", "data"]) == {"no_gpu"} | packages()
    found = find_extras(lambda: nothing, {}, given=["teacher", "student", "data"])
    assert found == {"no_gpu", "real_files"} | packages()
    gpu = GpuProbe(driver_present=True, names=("H200",))
    assert find_extras(lambda: gpu, {}, given=()) == packages()
    (entry,) = make_plan([needing(contract, "real_files")], load_profile("cpu")).entries
    assert entry.reason == ("needs real_files: no files were given (--teacher, --student and --data; see nox -s real)")


def test_the_large_mixture_is_made_only_where_it_is_asked_for(contract: Contract) -> None:
    gpu = GpuProbe(driver_present=True, names=("H200",))
    for value in ("", "0", "yes"):
        assert find_extras(lambda: gpu, {"Q4KD_TEACHER_30B": value}, given=()) == packages()
    asked = find_extras(lambda: gpu, {"Q4KD_TEACHER_30B": "1"}, given=())
    assert asked == {"teacher_30b"} | packages()
    claim = needing(contract, "teacher_30b")
    assert make_plan([claim], load_profile("cpu"), extras=asked).entries[0].scope == "required"
    (entry,) = make_plan([claim], load_profile("cpu")).entries
    assert entry.reason == "needs teacher_30b: its file of 18.6 GB is made only where Q4KD_TEACHER_30B=1 asks for it"


def packages() -> set[str]:
    return {name for name in ("bitsandbytes", "llama_cpp") if importlib.util.find_spec(name)}


def test_what_the_machine_had_is_kept_in_the_plan(contract: Contract) -> None:
    plan = make_plan([contract], load_profile("cpu"), extras=["bitsandbytes"])
    written = json.loads(json.dumps(plan.to_json()))
    assert written["extras"] == ["bitsandbytes"] and Plan.from_json(written) == plan
    assert "extras" not in make_plan([contract], load_profile("cpu")).to_json()
    for wrong in (["a third arm"], ["two_gpus", "bitsandbytes"], ["two_gpus", "two_gpus"]):
        with pytest.raises(InputError, match="extras"):
            Plan.from_json({**written, "extras": wrong})


@pytest.mark.parametrize("status", ["demoted", "retired"])
def test_demoted_and_retired_claims_never_gate(contract: Contract, status: str) -> None:
    plan = make_plan([replace(contract, status=status)], load_profile("gb10"))  # type: ignore[arg-type]
    assert {entry.scope for entry in plan.entries} == {"not_gating"}


def test_a_selection_makes_the_plan_partial_even_when_it_selects_everything(contract: Contract) -> None:
    assert make_plan([contract], load_profile("cpu"), "demo").scope == "partial"
    plan = make_plan([contract], load_profile("cpu"), "002 or (003 and not 001)")
    assert [entry.id for entry in plan.entries] == ["DEMO-002", "DEMO-003"]


@pytest.mark.parametrize("text", ["and", "a b", "(a", "a or", "not", ")"])
def test_a_malformed_selection_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="-k"):
        parse_selection(text)


@pytest.mark.parametrize(
    ("text", "chosen"),
    [
        ("a or b and not c", "a ab ac abc b"),
        ("(a or b) and not c", "a ab b"),
        ("not a and not b or c", "ac abc c bc"),
        ("not not B", "ab abc b bc"),
        ("a and b and c", "abc"),
        ("# or ::c", ""),
    ],
)
def test_not_binds_before_and_and_that_before_or(text: str, chosen: str) -> None:
    keys = ["a", "ab", "ac", "abc", "b", "bc", "c"]
    assert {key for key in keys if parse_selection(text)(key)} == set(chosen.split())
    assert parse_selection("x#2 and not y")("claims::x#2")


def test_a_deep_selection_is_refused_not_overflowed() -> None:
    with pytest.raises(InputError):
        parse_selection("(" * 900)
    deep = parse_selection("not " * 100 + "(" * 60 + "a and b" + ")" * 60)
    assert deep("ab") and not deep("a")


def test_json_round_trip(contract: Contract) -> None:
    plan = make_plan([contract], load_profile("cpu"), "demo")
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan
    earlier = plan.to_json()
    for entry in earlier["entries"]:
        del entry["infeasible"]  # plans made before feasibility was recorded
    assert Plan.from_json(earlier) == plan
    for bad in ([], {}, {**plan.to_json(), "scope": "half"}, {**plan.to_json(), "entries": [{"key": "x"}]}):
        with pytest.raises(InputError):
            Plan.from_json(bad)


def test_differences_name_what_was_dropped_added_or_rescoped(contract: Contract) -> None:
    plan = make_plan([contract], load_profile("cpu"))
    first, second, third = plan.entries
    assert plan_differences(plan, plan) == []
    (dropped,) = plan_differences(replace(plan, entries=(first, second)), plan)
    (added,) = plan_differences(plan, replace(plan, entries=(first, second)))
    rescoped = replace(plan, entries=(replace(first, scope="out_of_scope"), second, third))
    assert "missing" in dropped and "not in the contracts" in added
    assert plan_differences(rescoped, plan) == [f"plan: {first.key} is recorded as out_of_scope, expected required"]
    assert plan_differences(replace(plan, entries=(first, *plan.entries)), plan) == ["plan: a claim is listed twice"]
    assert "recorded as partial" in plan_differences(replace(plan, scope="partial"), plan)[0]
    excused = replace(plan, entries=(replace(first, infeasible="1 TFLOP / 1 FLOP/s"), second, third))
    assert plan_differences(excused, plan) == [
        f"plan: {first.key} has its infeasible recorded as 1 TFLOP / 1 FLOP/s, expected None"
    ]
