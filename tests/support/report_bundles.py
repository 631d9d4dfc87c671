"""Bundles to look at: one with every outcome, one whose every text is hostile, and a history of runs."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from example_bundle import CONTRACT, PAIR, PROSE, build
from typed_findings import finding, findings

from q4kd.harness.judging.results import CheckResult, Findings

NASTY = "<script>alert(1)</script><img src=x onerror=alert(2)>"
HIDDEN = "\x1b[31m\x07\u202egnp.exe\u2066\ud800"
LONG = "W" * 300
TEXTS = f"{NASTY}{HIDDEN}</style></title>--> | ` *b* [l](http://x.test) @user {LONG}"


def build_mixed(root: Path) -> Path:
    """Write a bundle with two surviving claims, one fallen, one undecided and one out of scope; return it."""
    return build(root, text=CONTRACT + PAIR + PROSE)


def build_hostile(root: Path) -> Path:
    """Write a bundle whose findings, plan, environment and inputs are hostile wherever text may stand; return it."""
    folder = build_mixed(root)
    for name in ("findings.json", "environment.json", "inputs.json"):
        document = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(_spoilt(document)))
    plan = json.loads((folder / "plan.json").read_text())
    for entry in plan["entries"]:
        entry["id"] = entry["reason"] = TEXTS
    (folder / "plan.json").write_text(json.dumps(plan))
    return folder


_KEPT = {"schema", "verdict", "scope", "created", "key", "runs", "record", "profile", "contract"}


def _spoilt(value: Any, key: str = "") -> Any:
    if isinstance(value, dict):
        return {name: _spoilt(item, name) for name, item in value.items()}
    if isinstance(value, list):
        return value if key in _KEPT else [_spoilt(item, key) for item in value]
    return TEXTS if isinstance(value, str) and key not in _KEPT else value


def build_history(root: Path, margins: list[float], profile: str = "cpu") -> Iterator[Path]:
    """Write a bundle for each margin, a day apart, below ``root``; yield each. A margin above 1 is a fallen claim."""
    base = build(root / "base")
    for day, margin in enumerate(margins, 1):
        folder = root / "bundles" / f"day-{day:02d}"
        (folder / "contracts").mkdir(parents=True)
        for name in ("plan.json", "environment.json", "inputs.json", "contracts/demo-v1.yaml"):
            (folder / name).write_bytes((base / name).read_bytes())
        document = json.loads((base / "findings.json").read_text())
        document["profile"], document["created"] = profile, f"2026-10-{day:02d}T02:00:00+00:00"
        row = document["findings"][0]
        check = row["checks"][0]
        check["margin"] = margin
        if margin > 1:
            row["verdict"] = check["verdict"] = "falsified"
            check["counterexample"] = f"{margin} is over"
            document["exit_code"] = 1
            document["summary"] |= {"corroborated": 0, "falsified": 1}
        (folder / "findings.json").write_text(json.dumps(document))
        yield folder


def findings_of(*checks: CheckResult) -> Findings:
    """Return the findings of one claim, ``c::A``, judged by these checks on the run ``demo``."""
    return findings(finding(*checks, key="c::A", runs=("demo",)))
