import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from example_bundle import CONTRACT, PAIR, PROSE, build, register

from q4kd.harness.__main__ import main
from q4kd.harness.bundle.diff import BundleDiff, ClaimChange, compare_bundles
from q4kd.harness.bundle.writer import pack
from q4kd.harness.records.store import open_store

KEY = "demo-v1::DEMO-001"


@pytest.fixture(autouse=True)
def checks(monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch)


def edit(path: Path, change: Callable[[Any], object]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def compare(old: Path, new: Path) -> BundleDiff:
    return compare_bundles(open_store(old), open_store(new))


def test_a_bundle_does_not_differ_from_itself_or_its_archive(tmp_path: Path) -> None:
    folder = build(tmp_path)
    for old, new in ((folder, folder), (folder, pack(folder)), (pack(folder), folder)):
        diff = compare(old, new)
        assert (diff.flips, diff.moved, diff.bounds, diff.environment, diff.worse) == ((), (), (), (), False)


@pytest.mark.parametrize("packed", [False, True], ids=["folders", "archives"])
def test_a_flip_and_what_moved(tmp_path: Path, packed: bool) -> None:
    good, bad = build(tmp_path / "a"), build(tmp_path / "b", peak=900)
    if packed:
        good, bad = pack(good), pack(bad)
    diff = compare(good, bad)
    assert diff.flips == (ClaimChange(key=KEY, old="corroborated", new="falsified", worse=True),)
    (moved,) = diff.moved
    assert (moved.key, moved.check, moved.old, moved.new, moved.relative) == (KEY, "peak", "100.0", "300.0", "+200.00%")
    assert diff.worse
    back = compare(bad, good)
    assert back.flips[0].worse is False and back.moved[0].relative == "-66.67%" and not back.worse


@pytest.mark.parametrize(
    ("before", "after", "worse"),
    [
        ("corroborated", "inconclusive", True),
        ("corroborated", "falsified", True),
        ("inconclusive", "falsified", True),
        ("inconclusive", "corroborated", False),
        ("falsified", "inconclusive", False),
        ("falsified", "corroborated", False),
    ],
)
def test_which_flips_are_for_the_worse(tmp_path: Path, before: str, after: str, worse: bool) -> None:
    folders = []
    for name, verdict in (("a", before), ("b", after)):
        folder = build(tmp_path / name)
        reason = "not run" if verdict == "inconclusive" else None
        edit(folder / "findings.json", lambda d, v=verdict, r=reason: d["findings"][0].update(verdict=v, reason=r))
        folders.append(folder)
    assert compare(*folders).worse is worse


def test_claims_added_and_lost(tmp_path: Path) -> None:
    small, large = build(tmp_path / "a"), build(tmp_path / "b", text=CONTRACT + PROSE + PAIR)
    added, lost = compare(small, large), compare(large, small)
    assert [flip.old for flip in added.flips] == ["absent"] * 3 and not added.worse
    assert {change.text for change in added.bounds} == {"claim added"}
    assert [flip.new for flip in lost.flips] == ["absent"] * 3 and lost.worse
    assert {change.text for change in lost.bounds} == {"claim removed"}


def test_a_claim_that_left_the_scope(tmp_path: Path) -> None:
    wide, narrow = (
        build(tmp_path / "a"),
        build(tmp_path / "b", text=CONTRACT.replace("min_observations: 3", "needs: [cuda]")),
    )
    diff = compare(wide, narrow)
    assert (diff.flips[0].new, diff.flips[0].worse) == ("out of scope", True)
    for name in ("plan.json", "findings.json"):  # on another machine class it is not a loss
        edit(narrow / name, lambda d: d.update(profile="gb10"))
    assert compare(wide, narrow).flips[0].worse is False


def test_a_claim_that_no_longer_gates_is_worse_off(tmp_path: Path) -> None:
    old, new = build(tmp_path / "a"), build(tmp_path / "b")
    edit(new / "findings.json", lambda d: d["findings"][0].update(scope="not_gating"))
    assert compare(old, new).flips == (
        ClaimChange(key=KEY, old="corroborated", new="corroborated [not gating]", worse=True),
    )


@pytest.mark.parametrize(("limit", "kind", "worse"), [("100.6", "loosened", True), ("100.4", "tightened", False)])
def test_a_bound_that_moved_gates_only_when_looser(tmp_path: Path, limit: str, kind: str, worse: bool) -> None:
    old, new = build(tmp_path / "a"), build(tmp_path / "b", text=CONTRACT.replace("100.5", limit))
    diff = compare(old, new)
    assert [(change.kind, change.key) for change in diff.bounds] == [(kind, KEY)] and diff.worse is worse
    assert diff.flips == ()


def test_a_profile_that_differs_is_named(tmp_path: Path) -> None:
    old, new = build(tmp_path / "a"), build(tmp_path / "b")
    profile = new / "contracts" / "profiles" / "cpu.yaml"
    profile.write_text(profile.read_text() + "# edited\n")
    diff = compare(old, new)
    assert [(change.kind, change.key) for change in diff.bounds] == [("changed", "profiles/cpu.yaml")]
    assert not diff.worse


def set_measured(folder: Path, measured: str, margin: float | None) -> None:
    edit(folder / "findings.json", lambda d: d["findings"][0]["checks"][0].update(measured=measured, margin=margin))


@pytest.mark.parametrize(
    ("old", "new", "relative"),
    [
        (("worst 5.52e-07 over 96 rows", 0.1), ("worst 1.104e-06 over 96 rows", 0.2), "+100.00%"),
        (("peak 141.0 MB over 46 samples", None), ("peak 282.0 MB over 23 samples", None), "+100.00%, -50.00%"),
        (("0 of 3 lines", None), ("2 of 3 lines", None), "0 → 2"),
        (("-4 dB", None), ("-2 dB", None), "+50.00%"),
        (("exited", None), ("killed", None), ""),
        (("exited", 0.5), ("killed", 0.75), "+50.00% of the bound"),
        (("1.00 x", 0.5), ("1.00 x", 0.501), "+0.20% of the bound"),
        (("1.00 x", 0.5), ("1.00 x", 0.5), None),
    ],
)
def test_how_far_a_measurement_moved(
    tmp_path: Path, old: tuple[str, float | None], new: tuple[str, float | None], relative: str | None
) -> None:
    folder = build(tmp_path / "a")
    other = build(tmp_path / "b")
    set_measured(folder, *old)
    set_measured(other, *new)
    moved = compare(folder, other).moved
    assert [row.relative for row in moved] == ([] if relative is None else [relative])


def test_what_changed_in_the_environment(tmp_path: Path) -> None:
    old, new = build(tmp_path / "a"), build(tmp_path / "b")
    edit(old / "environment.json", lambda d: d.update(packages={"torch": "2.13.0"}, boot_id="x", commit="a" * 40))
    edit(new / "environment.json", lambda d: d.update(packages={"torch": "2.14.0", "cupy": "14"}, commit="a" * 40))
    diff = compare(old, new)
    assert diff.environment == ("packages.cupy: absent → 14", "packages.torch: 2.13.0 → 2.14.0") and not diff.worse


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, bad = build(tmp_path / "a"), build(tmp_path / "b", peak=900, text=CONTRACT.replace("100.5", "120"))
    edit(bad / "environment.json", lambda d: d.update(python="4.0"))
    assert main(["evidence", "diff", str(good), str(pack(bad))]) == 1
    said = capsys.readouterr().out
    for words in ("A: 1 claim corroborated", "B: 0 claims", "worse", "+200.00%", "loosened", "→ 4.0", "B is worse"):
        assert words in said
    assert main(["evidence", "diff", str(bad), str(good)]) == 0
    assert "B is not worse than A" in capsys.readouterr().out
    assert main(["evidence", "diff", str(good), str(tmp_path)]) == 2
