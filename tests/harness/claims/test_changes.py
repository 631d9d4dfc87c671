"""``q4kd contracts diff``: whatever makes a claim easier to survive is named."""

import copy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from q4kd.harness.__main__ import main
from q4kd.harness.checks import CHECKS
from q4kd.harness.claims.changes import Change, contract_changes, profile_changes
from q4kd.harness.claims.contract import load_contracts, parse_contract
from q4kd.harness.claims.folder import default_contracts_folder
from q4kd.harness.claims.profile import Profile, Roofline, load_profiles

# A check with a bound of each kind; the real ones are used below it.
SIZE = SimpleNamespace(
    NAME="size",
    PARAMS={
        "type": "object",
        "properties": {"box": {"type": "object", "properties": {"plus": {"type": "number", "default": 0}}}},
    },
    DIRECTIONS={"box.max": "upper", "box.plus": "upper", "floor": "lower", "cases": "lower", "allowed": "upper"}
    | {"strict": "lower"},
    TIME_BOUNDS={"max_s": "seconds"},
)


@pytest.fixture(autouse=True, scope="module")
def size() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("q4kd.harness.checks.CHECKS", {**CHECKS, "size": SIZE})
        yield


FALSIFIER: dict[str, Any] = {
    "check": "size",
    "experiment": "demo",
    "params": {
        "box": {"max": 10, "plus": 2.5},
        "floor": 3,
        "cases": ["a", "b"],
        "allowed": ["x"],
        "strict": True,
        "metric": "cosine",
    },
    "also": [
        {"check": "parity", "params": {"array": "one", "metric": "max_abs", "max": 1.0e-3}},
        {"check": "parity", "params": {"array": "two", "metric": "cosine", "min": 0.99}},
    ],
    "profiles": {
        "gb10": {"params": {"box": {"max": 5}, "floor": 4}, "min_observations": 9, "timeout_s": 30},
        "h200": {"params": {"metric": "max_abs"}},
    },
    "needs": ["cuda"],
    "min_observations": 6,
    "timeout_s": 60,
    "work": {"flops": 1.0e12},
    "sabotage": ["one-fault", "another-fault"],
}


def contract(falsifier: dict[str, Any] | None = FALSIFIER, status: str = "active", **entry: Any) -> Any:
    claim = {"id": "A-001", "rule": "r", "prediction": "p", "if_fails": "f", **entry}
    if falsifier is not None:
        claim["falsifier"] = falsifier
    text = yaml.safe_dump({"metadata": {"status": status}, "falsification_tests": [claim]})
    return parse_contract("a", text.encode(), "a.yaml")


def changes(edit: Callable[[dict[str, Any]], object]) -> list[Change]:
    changed = copy.deepcopy(FALSIFIER)
    edit(changed)
    return contract_changes([contract()], [contract(changed)])


def texts(found: list[Change], kind: str) -> list[str]:
    return [change.text for change in found if change.kind == kind]


def put(*path: Any) -> Callable[[dict[str, Any]], object]:
    """Return the edit that sets the value at a path, the last of the arguments."""
    *keys, last, value = path

    def edit(node: Any) -> None:
        for key in keys:
            node = node.setdefault(key, {}) if isinstance(node, dict) else node[key]
        node[last] = value

    return edit


def drop(*path: Any) -> Callable[[dict[str, Any]], object]:
    *keys, last = path

    def edit(node: Any) -> None:
        for key in keys:
            node = node[key]
        del node[last]

    return edit


LOOSER = {
    "an upper bound raised": (put("params", "box", "max", 11), "size: box.max: 10 → 11"),
    "a lower bound lowered": (put("params", "floor", 2.5), "size: floor: 3 → 2.5"),
    "a bound removed": (drop("params", "floor"), "size: floor: 3 → absent (cannot be compared)"),
    "an allowance raised": (put("params", "box", "plus", 3), "size: box.plus: 2.5 → 3"),
    "a case dropped": (put("params", "cases", ["a"]), "size: cases: ['a', 'b'] → ['a']"),
    "a case replaced": (put("params", "cases", ["a", "c"]), "size: cases: ['a', 'b'] → ['a', 'c']"),
    "something let through": (put("params", "allowed", ["x", "y"]), "size: allowed: ['x'] → ['x', 'y']"),
    "strictness switched off": (put("params", "strict", False), "size: strict: True → False"),
    "another metric": (put("params", "metric", "max_abs"), "size: metric: cosine → max_abs (cannot be compared)"),
    "a number made a word": (put("params", "floor", "3"), "size: floor: 3 → 3 (cannot be compared)"),
    "a selector added": (put("params", "arm", "easy"), "size: arm: absent → easy (cannot be compared)"),
    "the check replaced": (
        lambda falsifier: falsifier.update(also=[], profiles={}, **falsifier["also"][0]) or falsifier.pop("work"),
        "check removed: size",
    ),
    "a further check dropped": (put("also", FALSIFIER["also"][:1]), "check removed: parity"),
    "a further check loosened": (put("also", 1, "params", "min", 0.9), "parity: min: 0.99 → 0.9"),
    "a further metric changed": (
        put("also", 1, "params", {"array": "two", "metric": "max_abs", "max": 1}),
        "parity: metric: cosine → max_abs (cannot be compared)",
    ),
    "another experiment": (
        put("experiment", "easier"),
        "experiment: demo → easier (another run: cannot be compared)",
    ),
    "fewer observations": (put("min_observations", 5), "min_observations: 6 → 5"),
    "any number of observations": (drop("min_observations"), "min_observations: 6 → 1"),
    "a longer timeout": (put("timeout_s", 61), "timeout_s: 60.0 → 61.0"),
    "no timeout": (drop("timeout_s"), "timeout_s: 60.0 → default"),
    "a need added": (put("needs", ["cuda", "unified"]), "needs gained unified"),
    "a fault dropped": (put("sabotage", ["one-fault"]), "sabotage lost another-fault"),
    "a fault replaced": (put("sabotage", ["one-fault", "mild"]), "sabotage lost another-fault"),
    "less work stated": (put("work", "flops", 1.0e11), "work: flops: 1000000000000.0 → 100000000000.0"),
    "on one profile, a bound raised": (
        put("profiles", "gb10", "params", "box", "max", 6),
        "on gb10: size: box.max: 5 → 6",
    ),
    "on one profile, the override gone": (drop("profiles", "gb10", "params", "box"), "on gb10: size: box.max: 5 → 10"),
    "on one profile, the bound gone": (
        put("profiles", "gb10", "params", "floor", None),
        "on gb10: size: floor: 4 → absent (cannot be compared)",
    ),
    "on one profile, fewer observations": (
        drop("profiles", "gb10", "min_observations"),
        "on gb10: min_observations: 9 → 6",
    ),
    "on one profile, a longer timeout": (put("profiles", "gb10", "timeout_s", 40), "on gb10: timeout_s: 30 → 40"),
    "on one profile, the metric back": (
        drop("profiles", "h200"),
        "on h200: size: metric: max_abs → cosine (cannot be compared)",
    ),
    "a new override": (put("profiles", "cpu", {"params": {"floor": 1}}), "on cpu: size: floor: 3 → 1"),
}


@pytest.mark.parametrize(("edit", "text"), LOOSER.values(), ids=LOOSER)
def test_what_is_looser_is_named(edit: Callable[[dict[str, Any]], object], text: str) -> None:
    assert text in texts(changes(edit), "loosened")


STRICTER = {
    "an upper bound lowered": put("params", "box", "max", 9),
    "a lower bound raised": put("params", "floor", 3.5),
    "an allowance left at its default": drop("params", "box", "plus"),
    "a case added": put("params", "cases", ["a", "b", "c"]),
    "nothing let through": put("params", "allowed", []),
    "a check added": put(
        "also", [*FALSIFIER["also"], {"check": "table", "params": {"table": "t", "expected": {"a": 1}}}]
    ),
    "more observations": put("min_observations", 7),
    "a shorter timeout": put("timeout_s", 59),
    "a need dropped": put("needs", []),
    "a fault added": put("sabotage", ["one-fault", "another-fault", "third-fault"]),
    "more work stated": put("work", "flops", 2.0e12),
    "on one profile, a bound lowered": put("profiles", "gb10", "params", "box", "max", 4),
}


@pytest.mark.parametrize("edit", STRICTER.values(), ids=STRICTER)
def test_what_is_stricter_is_not_called_looser(edit: Callable[[dict[str, Any]], object]) -> None:
    found = changes(edit)
    assert {change.kind for change in found} == {"tightened"}


def test_what_is_the_same_is_silent() -> None:
    assert changes(lambda falsifier: None) == []
    assert changes(put("params", "floor", 3.0)) == []
    assert changes(lambda falsifier: falsifier["also"].reverse()) == []
    everything = load_contracts(default_contracts_folder())
    assert contract_changes(everything, everything) == []


def test_a_default_stands_for_what_is_not_stated() -> None:
    without = copy.deepcopy(FALSIFIER)
    del without["params"]["box"]["plus"]
    stated = copy.deepcopy(without)
    stated["params"]["box"]["plus"] = 0
    assert contract_changes([contract(without)], [contract(stated)]) == []
    (change,) = contract_changes([contract(without)], [contract()])
    assert (change.kind, change.text) == ("loosened", "size: box.plus: 0 → 2.5")


def test_claims_and_contracts_that_go_or_stop_gating_are_named() -> None:
    empty = parse_contract("a", b"falsification_tests: []", "a.yaml")
    assert texts(contract_changes([contract()], [empty]), "loosened") == ["claim removed"]
    assert texts(contract_changes([empty], [contract()]), "added") == ["claim added"]
    assert texts(contract_changes([contract()], [contract(None)]), "loosened") == [
        "falsifier removed: the claim is prose now"
    ]
    assert texts(contract_changes([contract(None)], [contract()]), "tightened") == ["falsifier added"]
    for was, now, kind in (("active", "demoted", "loosened"), ("demoted", "retired", "loosened")):
        assert texts(contract_changes([contract(status=was)], [contract(status=now)]), kind) == [
            f"contract {was} → {now}"
        ]
        assert texts(contract_changes([contract(status=now)], [contract(status=was)]), "loosened") == []


def test_words_are_shown_and_do_not_count() -> None:
    for key in ("rule", "prediction", "if_fails"):
        (change,) = contract_changes([contract()], [contract(**{key: "other"})])
        assert change.kind == "changed" and change.text.endswith("→ 'other'")


def test_a_check_that_is_not_installed_cannot_be_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = contract(), contract({**FALSIFIER, "params": {**FALSIFIER["params"], "floor": 30}})
    monkeypatch.setattr("q4kd.harness.checks.CHECKS", CHECKS)
    assert "size: floor: 3 → 30 (cannot be compared)" in texts(contract_changes([old], [new]), "loosened")


# --- profiles ---


def profile(provides: str = "cuda unified", value: float = 5.0, measured: bool = True) -> Profile:
    roof = Roofline(value=value, unit="B/s", measured=measured, source="s")
    return Profile(name="m", description="d", provides=frozenset(provides.split()), rooflines={"bytes_per_s": roof})


@pytest.mark.parametrize(
    ("old", "new", "kind", "text"),
    [
        (profile(), profile("cuda"), "loosened", "provides lost unified"),
        (profile("cuda"), profile(), "tightened", "provides gained unified"),
        (profile(), profile(value=6.0), "loosened", "measured roofline bytes_per_s: 5.0 → 6.0"),
        (profile(), profile(value=4.0), "tightened", "measured roofline bytes_per_s: 5.0 → 4.0"),
        (profile(), profile(measured=False), "loosened", "measured roofline bytes_per_s: 5.0 → absent"),
        (profile(measured=False), profile(value=9.0), "tightened", "measured roofline bytes_per_s: absent → 9.0"),
    ],
)
def test_a_machine_class_that_asks_less_is_named(old: Profile, new: Profile, kind: str, text: str) -> None:
    assert profile_changes([old], [new]) == [Change(key="profile m", kind=kind, text=text)]  # type: ignore[arg-type]


def test_a_profile_that_goes_is_named() -> None:
    assert texts(profile_changes([profile()], []), "loosened") == ["profile removed"]
    assert texts(profile_changes([], [profile()]), "added") == ["profile added"]
    assert profile_changes(load_profiles(), load_profiles()) == []
    assert profile_changes([profile(measured=False)], [profile(value=9.0, measured=False)]) == []


# --- the command ---


def test_diff_exits_with_1_when_anything_was_loosened(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = (default_contracts_folder() / "cuda-q4k-frozen-teacher-v1.yaml").read_text()
    old, new = tmp_path / "old", tmp_path / "new"
    for folder in (old, new):
        folder.mkdir()
        (folder / "t-v1.yaml").write_text(source)
    assert main(["contracts", "diff", str(old), str(new)]) == 0
    assert capsys.readouterr().out == "no differences\n"
    assert "bytes: 6.0e+9" in source
    (new / "t-v1.yaml").write_text(source.replace("bytes: 6.0e+9", "bytes: 60.0e+9"))
    assert main(["contracts", "diff", str(old), str(new)]) == 1
    out = capsys.readouterr().out
    name = "t-v1::FT-Q4K-TEACHER-002-DEVICE"
    assert f"loosened   {name}  memory_ceiling: ceiling.bytes: 6000000000.0 → 60000000000.0\n1 loosened\n" == out
    assert main(["contracts", "diff", str(new / "t-v1.yaml"), str(old / "t-v1.yaml")]) == 0
    assert "tightened" in capsys.readouterr().out
    (new / "t-v1.yaml").write_text(source)
    (new / "profiles").mkdir()
    text = (default_contracts_folder() / "profiles" / "gb10.yaml").read_text()
    (new / "profiles" / "gb10.yaml").write_text(text.replace("[cuda, unified]", "[cuda]"))
    assert main(["contracts", "diff", str(old), str(new)]) == 1
    assert "loosened   profile gb10  provides lost unified" in capsys.readouterr().out


# --- any claim, any loosening ---

# Which way each bound of the shipped checks loosens, written down here a second time on purpose.
BOUNDS: dict[str, tuple[dict[str, Any], dict[tuple[str, ...], int]]] = {
    "memory_ceiling": (
        {"series": "rss", "phase": ["a", "b"], "ceiling": {"times": 2.0, "of": "gguf_file_bytes", "plus_bytes": 100.0}},
        {("ceiling", "times"): +1, ("ceiling", "plus_bytes"): +1},
    ),
    "parity": ({"array": "x", "metric": "cosine", "min": 0.5}, {("min",): -1}),
    "error_ratio": (
        {"subject": "a", "peer": "b", "array": "x", "max": 1.5, "peer_max": 0.5, "min_sequences": 9},
        {("max",): +1, ("peer_max",): +1, ("min_sequences",): -1},
    ),
    "residency": (
        {"max_dense_bytes": 8, "max_ratio": 1.5, "outside": {"times": 1.5, "plus_bytes": 10.0}},
        {("max_dense_bytes",): +1, ("max_ratio",): +1, ("outside", "times"): +1, ("outside", "plus_bytes"): +1},
    ),
    "survives": ({"steps": 40, "checkpoint": True}, {("steps",): -1}),
    "improves": (
        {"metric": "eval.kl", "better": "lower", "treatment": "a", "control": "b", "min_seeds": 9, "min_steps": 40}
        | {"margin_se": 20.0},
        {("min_seeds",): -1, ("min_steps",): -1, ("margin_se",): -1},
    ),
}
WORDS = {"memory_ceiling": ("series", "gpu_bytes"), "parity": ("array", "y"), "improves": ("metric", "eval.loss")}


@st.composite
def loosenings(draw: st.DrawFn) -> tuple[dict[str, Any], dict[str, Any], str]:
    """Draw a falsifier, the same after one random loosening, and what was done."""
    names = draw(st.lists(st.sampled_from(sorted(BOUNDS)), min_size=1, max_size=4))
    uses = [{"check": name, "params": copy.deepcopy(BOUNDS[name][0])} for name in names]
    old: dict[str, Any] = {**uses[0], "experiment": "demo", "also": uses[1:], "sabotage": ["a", "b"], "needs": ["cuda"]}
    old |= {"min_observations": draw(st.integers(2, 50)), "timeout_s": draw(st.integers(1, 500))}
    old["profiles"] = {}
    for profile_name in draw(st.lists(st.sampled_from(["cpu", "gb10"]), unique=True)):
        path, sign = draw(st.sampled_from(sorted(BOUNDS[names[0]][1].items())))
        tighter: dict[str, Any] = {}
        node, value = tighter, BOUNDS[names[0]][0]
        for key in path[:-1]:
            node, value = node.setdefault(key, {}), value[key]
        node[path[-1]] = value[path[-1]] - sign * (1 if isinstance(value[path[-1]], int) else 0.25)
        old["profiles"][profile_name] = {"params": tighter}
    new = copy.deepcopy(old)
    targets: list[tuple[str, dict[str, Any], str]] = [("base", new["params"], names[0])]
    targets += [(f"also {i}", use["params"], use["check"]) for i, use in enumerate(new["also"])]
    kinds = [
        "bound",
        "word",
        "sabotage",
        "needs",
        "observations",
        "timeout",
        "experiment",
        "status",
        "prose",
        "removed",
    ]
    kind = draw(st.sampled_from([*kinds, "bound", "bound", *(["override"] if old["profiles"] else [])]))
    if kind == "override":
        name = draw(st.sampled_from(sorted(new["profiles"])))
        targets, kind = [(name, new["profiles"][name]["params"], names[0])], "bound"
    if kind == "bound":
        _, params, check = draw(st.sampled_from(targets))
        present = [(path, sign) for path, sign in sorted(BOUNDS[check][1].items()) if _has(params, path)]
        path, sign = draw(st.sampled_from(present))
        node = params
        for key in path[:-1]:
            node = node[key]
        whole = isinstance(node[path[-1]], int)
        step = draw(st.integers(1, 3) if whole else st.floats(1e-9, 0.4, allow_subnormal=False))
        node[path[-1]] += sign * step
    elif kind == "word":
        _, params, check = draw(st.sampled_from(targets))
        if check not in WORDS:
            new["experiment"] = "other"
        else:
            params[WORDS[check][0]] = WORDS[check][1]
    elif kind == "sabotage":
        new["sabotage"] = draw(st.sampled_from([["a"], ["b"], ["a", "c"]]))
    elif kind == "needs":
        new["needs"] = ["cuda", "unified"]
    elif kind == "observations":
        new["min_observations"] = draw(st.integers(1, old["min_observations"] - 1))
    elif kind == "timeout":
        new["timeout_s"] += draw(st.integers(1, 100))
    elif kind == "experiment":
        new["experiment"] = "other"
    return old, new, kind


def _has(params: Any, path: tuple[str, ...]) -> bool:
    for key in path:
        if key not in params:
            return False
        params = params[key]
    return True


@settings(max_examples=300, deadline=None)
@given(loosenings())
def test_any_loosening_of_any_claim_is_reported(drawn: tuple[dict[str, Any], dict[str, Any], str]) -> None:
    old, new, kind = drawn
    before = contract(old)
    if kind == "removed":
        after = parse_contract("a", b"falsification_tests: [something else]", "a.yaml")
    else:
        after = contract(None if kind == "prose" else new, status="demoted" if kind == "status" else "active")
    assert texts(contract_changes([before], [after]), "loosened") != []
    assert contract_changes([before], [before]) == []
