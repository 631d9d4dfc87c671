"""Ways of tampering with a bundle held in memory, drawn at random: bytes, files, edits sealed again, looser bounds."""

import copy
import json
import random
from collections.abc import Callable
from typing import Any

from q4kd.harness.bundle.exporters import ctrf, junit, statement_of
from q4kd.harness.bundle.findings import assemble, exit_code
from q4kd.harness.bundle.recheck import KillReplay
from q4kd.harness.bundle.writer import MANIFEST, manifest_of, manifest_text
from q4kd.harness.claims.contract import parse_contract
from q4kd.harness.claims.plan import make_plan
from q4kd.harness.claims.profile import read_profile
from q4kd.harness.judging.judge import JUDGE_VERSION, judge_claim
from q4kd.harness.judging.kills import apply_kill_rule
from q4kd.harness.judging.mutations import apply_mutation_rule
from q4kd.harness.judging.results import Finding, Findings
from q4kd.harness.records.raw_run import read_runs, runs_of
from q4kd.harness.records.store import MemoryStore

Files = dict[str, bytes]


def change_a_byte(draw: random.Random, data: bytes) -> bytes:
    at = draw.randrange(len(data))
    return data[:at] + bytes([data[at] ^ draw.randrange(1, 256)]) + data[at + 1 :]


def drop_a_byte(draw: random.Random, data: bytes) -> bytes:
    at = draw.randrange(len(data))
    return data[:at] + data[at + 1 :]


def add_a_byte(draw: random.Random, data: bytes) -> bytes:
    at = draw.randrange(len(data) + 1)
    return data[:at] + draw.randbytes(1) + data[at:]


def damage(draw: random.Random, files: Files) -> tuple[str, Files]:
    """Change, drop or add one byte or one file."""
    changed = dict(files)
    name = draw.choice([name for name in files if files[name]])
    kind = draw.choice(["byte changed", "byte dropped", "byte added", "file dropped", "file added", "file moved"])
    edits = {"byte changed": change_a_byte, "byte dropped": drop_a_byte, "byte added": add_a_byte}
    if kind in edits:
        changed[name] = edits[kind](draw, files[name])
    elif kind == "file added":
        folder = draw.choice(["", "runs/demo/", "runs/other/", "sabotage/", "contracts/"])
        changed[f"{folder}{draw.randrange(10**9)}{draw.choice(['.json', '.yaml', '.npz', ''])}"] = draw.randbytes(9)
    else:
        data = changed.pop(name)
        if kind == "file moved":
            changed[draw.choice([f"{name}.old", f"runs/demo/{draw.randrange(10**9)}.json"])] = data
    return kind, changed


def loads(files: Files, name: str) -> Any:
    return json.loads(files[name])


def dumps(value: Any) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True) + "\n").encode()


def derive(files: Files) -> None:
    """Write the other formats anew, as whoever edits the findings would."""
    store = MemoryStore(files, "bundle")
    findings = Findings.from_json(loads(files, "findings.json"))
    files["junit.xml"] = junit(findings)
    files["ctrf.json"] = dumps(ctrf(findings, loads(files, "environment.json")))
    files["statement.intoto.json"] = dumps(statement_of(store, findings))


def seal(files: Files) -> Files:
    files[MANIFEST] = manifest_text(manifest_of(MemoryStore(files, "bundle")))
    return files


Edit = Callable[[random.Random, Files], None]
EDITS: list[Edit] = []


def edit(function: Edit) -> Edit:
    EDITS.append(function)
    return function


def edit_findings(files: Files, change: Callable[[dict[str, Any]], None]) -> None:
    document = loads(files, "findings.json")
    change(document)
    files["findings.json"] = dumps(document)


def other(draw: random.Random, value: Any, choices: list[Any]) -> Any:
    return draw.choice([choice for choice in choices if choice != value])


@edit
def verdict_edited(draw: random.Random, files: Files) -> None:
    def change(document: dict[str, Any]) -> None:
        row = draw.choice([row for row in document["findings"] if row["checks"]])
        row["verdict"] = other(draw, row["verdict"], ["corroborated", "falsified", "inconclusive"])
        row["reason"] = (
            draw.choice(["not run", "harness error", "because"]) if row["verdict"] == "inconclusive" else None
        )
        if draw.random() < 0.5:
            row["checks"][0].update(verdict=row["verdict"], reason=row["reason"])
        document["exit_code"] = exit_code(map(Finding.from_json, document["findings"]), document["scope"])
        for name in ("corroborated", "falsified", "inconclusive"):
            document["summary"][name] = sum(row["verdict"] == name for row in document["findings"])

    edit_findings(files, change)


@edit
def measurement_edited(draw: random.Random, files: Files) -> None:
    def change(document: dict[str, Any]) -> None:
        check = draw.choice([check for row in document["findings"] for check in row["checks"]])
        field = draw.choice(["measured", "bound", "counterexample", "margin", "peak", "samples", "params"])
        if field in ("peak", "samples"):
            check["observation"][field] *= 1 + draw.choice([-1, 1]) * 10 ** draw.uniform(-6, 3)
        elif field == "params":
            check["params"]["limit"] *= 1 + draw.random()
        elif field == "margin":
            check["margin"] = draw.random()
        else:
            check[field] = f"{draw.random():.3f}"

    edit_findings(files, change)


@edit
def finding_field_edited(draw: random.Random, files: Files) -> None:
    def change(document: dict[str, Any]) -> None:
        row = draw.choice(document["findings"])
        field = draw.choice(["rule", "prediction", "if_fails", "id", "contract", "key", "experiment", "scope", "runs"])
        if field == "scope":
            row["scope"] = "not_gating"
        elif field == "runs":
            row["runs"] = other(draw, row["runs"], [[], ["demo"], ["pair.a"], ["demo", "pair.a"]])
        else:
            row[field] = f"{row[field]}{draw.choice(['.', ' ', 'x', '1'])}"

    edit_findings(files, change)


@edit
def fault_record_edited(draw: random.Random, files: Files) -> None:
    def change(document: dict[str, Any]) -> None:
        row = draw.choice([row for row in document["findings"] if row["sabotage"]])
        kind = draw.choice(["drop", "invent", "caught", "detail", "record", "verdict"])
        entry = row["sabotage"][0]
        if kind == "drop":
            row["sabotage"] = []
        elif kind == "invent":
            row["sabotage"].append({**entry, "fault": f"fault-{draw.randrange(99)}"})
        elif kind == "caught":
            entry["caught"] = not entry["caught"]
        elif kind == "verdict":
            entry["verdict"] = other(draw, entry["verdict"], ["corroborated", "inconclusive", None])
        else:
            entry[kind] = draw.choice(["r7", "caught: 1", None])

    edit_findings(files, change)


@edit
def finding_dropped_or_repeated(draw: random.Random, files: Files) -> None:
    def change(document: dict[str, Any]) -> None:
        rows = document["findings"]
        row = draw.choice(rows)
        rows.append(copy.deepcopy(row)) if draw.random() < 0.3 else rows.remove(row)
        document["exit_code"] = exit_code(map(Finding.from_json, rows), document["scope"])

    edit_findings(files, change)


@edit
def total_edited(draw: random.Random, files: Files) -> None:
    def change(document: dict[str, Any]) -> None:
        kind = draw.choice([*document["summary"], "exit_code", "scope", "profile"])
        if kind in document["summary"]:
            document["summary"][kind] += draw.randrange(1, 9)
        else:
            choices = {"exit_code": [0, 1, 2], "scope": ["full", "partial"], "profile": ["cpu", "gb10", "h200"]}
            document[kind] = other(draw, document[kind], choices[kind])

    edit_findings(files, change)


@edit
def run_dropped(draw: random.Random, files: Files) -> None:
    name = draw.choice(["demo", "pair.a", "pair.b"])
    for file in [file for file in files if file.startswith(f"runs/{name}/")]:
        del files[file]
    if draw.random() < 0.5:

        def change(document: dict[str, Any]) -> None:
            for row in document["findings"]:
                row["runs"] = [run for run in row["runs"] if run != name]

        edit_findings(files, change)


@edit
def run_file_dropped(draw: random.Random, files: Files) -> None:
    del files[f"runs/{draw.choice(['demo', 'pair.a', 'pair.b'])}/{draw.choice(['memory.jsonl', 'argv.json'])}"]


@edit
def plan_edited(draw: random.Random, files: Files) -> None:
    plan = loads(files, "plan.json")
    kind = draw.choice(["drop", "rescope", "field", "repeat", "select", "partial", "extra"])
    entry = draw.choice(plan["entries"])
    if kind == "drop":
        plan["entries"].remove(entry)
        if draw.random() < 0.5:
            edit_findings(
                files, lambda d: d.update(findings=[row for row in d["findings"] if row["key"] != entry["key"]])
            )
    elif kind == "rescope":
        entry["scope"] = other(draw, entry["scope"], ["required", "out_of_scope", "not_gating"])
    elif kind == "field":
        field = draw.choice(["reason", "experiment", "contract", "id"])
        entry[field] = f"{entry[field]}x"
    elif kind == "repeat":
        plan["entries"].append(entry)
    elif kind == "select":
        plan["select"] = draw.choice(["DEMO-001", "demo", "not DEMO-005"])
    elif kind == "partial":
        plan["scope"] = "partial"
    else:
        plan[f"x{draw.randrange(9)}"] = 1
    files["plan.json"] = dumps(plan)


@edit
def measurement_moved(draw: random.Random, files: Files) -> None:
    """In the raw files: the peak of a run, or a sample left out."""
    name = f"runs/{draw.choice(['demo', 'pair.a', 'pair.b'])}/memory.jsonl"
    lines = files[name].decode().splitlines()
    if draw.random() < 0.5:
        del lines[draw.randrange(len(lines))]
    else:
        row = json.loads(lines[-1])  # the last sample is the highest
        row["rss"] *= 1 + 10 ** draw.uniform(-6, 2)
        lines[-1] = json.dumps(row)
    files[name] = "".join(f"{line}\n" for line in lines).encode()


@edit
def run_marked(draw: random.Random, files: Files) -> None:
    name = f"runs/{draw.choice(['demo', 'pair.a', 'pair.b'])}"
    if draw.random() < 0.5:
        files[f"{name}/argv.json"] = dumps({**loads(files, f"{name}/argv.json"), "fault": "ballast"})
    else:
        files[f"{name}/harness_error.json"] = dumps({"stage": "collect", "error": "e"})


@edit
def run_added(draw: random.Random, files: Files) -> None:
    source, target = draw.choice([("demo", "demo.again"), ("pair.a", "pair.c"), ("demo", "other"), ("pair.a", "pair")])
    for name in [name for name in files if name.startswith(f"runs/{source}/")]:
        files[name.replace(f"runs/{source}/", f"runs/{target}/")] = files[name]


@edit
def kill_record_edited(draw: random.Random, files: Files) -> None:
    kills = loads(files, "sabotage/kills.json")
    record = kills["records"][draw.choice(sorted(kills["records"]))]
    field = draw.choice([*record, "drop"])
    if field == "drop":
        kills["records"] = {key: value for key, value in kills["records"].items() if value is not record}
    else:
        record[field] = f"{record[field]}x"
    files["sabotage/kills.json"] = dumps(kills)


@edit
def other_format_edited(draw: random.Random, files: Files) -> None:
    name = draw.choice(["junit.xml", "ctrf.json", "statement.intoto.json"])
    text = files[name].decode()
    words = [word for word in ("DEMO-001", "FAILED", "other", "failed", "passed", "falsified", "0") if word in text]
    files[name] = text.replace(draw.choice(words), draw.choice(["1", "PASSED", "corroborated"]), 1).encode()


def loosen(draw: random.Random, files: Files) -> str:
    text = files["contracts/demo-v1.yaml"].decode()
    kinds = ["limit", "limit", "limit", "min_observations", "needs", "status", "override", "claim", "profile"]
    kind = draw.choice(kinds)
    if kind == "limit":
        old = draw.choice(["{limit: 100.5}", "{limit: 50}", "{limit: 100}"])
        text = text.replace(old, f"{{limit: {float(old[8:-1]) * (1 + 10 ** draw.uniform(-3, 6)):.6f}}}", 1)
    elif kind == "min_observations":
        text = text.replace("min_observations: 3", f"min_observations: {draw.choice([1, 2])}", 1)
    elif kind == "needs":
        text = text.replace("min_observations: 3", "needs: [cuda]", 1)
    elif kind == "status":
        text = text.replace("version: 1.0.0", f"status: {draw.choice(['demoted', 'retired'])}")
    elif kind == "override":
        override = f"profiles: {{cpu: {{params: {{limit: {draw.randrange(200, 10**6)}}}}}}}"
        text = text.replace("sabotage: [ballast]", f"sabotage: [ballast]\n      {override}", 1)
    elif kind == "claim":
        text = text[: text.index("  - id: DEMO-005")]
    else:
        profile = files["contracts/profiles/cpu.yaml"].decode()
        files["contracts/profiles/cpu.yaml"] = (profile + f"\n# {draw.random()}\n").encode()
    files["contracts/demo-v1.yaml"] = text.encode()
    return kind


def judge_again(files: Files) -> None:
    """Draw every verdict from the raw files by the contracts as they are now, as an honest run would."""
    store = MemoryStore(files, "bundle")
    contract = parse_contract("demo-v1", files["contracts/demo-v1.yaml"], "demo-v1.yaml")
    plan = make_plan([contract], read_profile("cpu", store))
    recorded = {row.key: row for row in Findings.from_json(loads(files, "findings.json")).rows}
    runs, replay = read_runs(store), KillReplay(store)
    results = {}
    for claim in contract.claims:
        if claim.falsifier is None or claim.key not in recorded:
            continue
        mine = runs_of(claim.falsifier.experiment, runs)
        kills = replay.judge_again(claim, "cpu", recorded[claim.key].sabotage)
        judged = apply_mutation_rule(claim, mine, "cpu", judge_claim(claim, mine, "cpu"))
        results[claim.key] = apply_kill_rule(judged, kills)
    files["plan.json"] = dumps(plan.to_json())
    created = "2026-11-23T12:00:00+00:00"
    findings = assemble(plan, [contract], results, judge_version=JUDGE_VERSION, created=created)
    files["findings.json"] = dumps(findings.to_json())
    derive(files)
