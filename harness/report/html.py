"""The report: one HTML file, made from a bundle's own files, that says what fell before what stood."""

import hashlib
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from markupsafe import Markup

from q4kd.harness.bundle.findings import headline, read_findings
from q4kd.harness.bundle.recheck import bundle_contracts
from q4kd.harness.claims.model import Contract
from q4kd.harness.claims.plan import Plan
from q4kd.harness.judging.results import Findings
from q4kd.harness.records.raw_run import RawRun, read_runs
from q4kd.harness.records.store import Store, read_object
from q4kd.harness.report.claims import Limits, bar_of, contract_groups, link_to
from q4kd.harness.report.page import cut, render_page
from q4kd.harness.report.plots import Plot, memory_plots, utilisation_plots
from q4kd.harness.report.training import loss_plots, step_plots
from q4kd.harness.report.verdict import MARKS, PLAIN, commit_of, meaning, moment_of, verdict_of
from q4kd.trainer.errors import InputError
from q4kd.trainer.yaml_lines import MAX_BYTES

MAX_PAGE = 2_000_000
# The first that gives a page below MAX_PAGE is used: a bundle may hold more than anybody could read.
_LIMITS = (
    Limits(rows=1000, parts=64, text=600, detail=20_000, plots=24),
    Limits(rows=400, parts=24, text=400, detail=0, plots=12),
    Limits(rows=40, parts=6, text=160, detail=0, plots=0),
)
_COMMAND = 200  # characters of a command; argv.json has it whole
_GATE = {
    0: "The gate is passed (exit code 0).",
    1: "The gate is not passed (exit code 1): a claim was falsified.",
    2: "The gate is not passed (exit code 2): not everything could be judged.",
}


def render(store: Store, raw: str | None = "") -> str:
    """Return the report of a bundle as one self-contained HTML page of less than 2 MB.

    Everything shown comes from the bundle and is escaped; the page loads nothing and runs no script. A bundle too large
    for that is shown in part, and the page says so.

    Args:
        store: the bundle.
        raw: where its files lie as seen from the page, such as ``bundle/``; None when they cannot be linked to.

    Raises:
        InputError: when the findings, the plan or the environment are missing or malformed.
    """
    findings = read_findings(store)
    plan = Plan.from_json(read_object(store, "plan.json"))
    environment, inputs = read_object(store, "environment.json"), read_object(store, "inputs.json")
    # The tile of what is undecided says how many of them are excused.
    counts = {**findings.summary, "inconclusive": findings.summary["inconclusive"] + findings.summary.get("waived", 0)}
    page = ""
    for limits in _LIMITS:
        page = render_page(
            "report.html.j2",
            findings=findings,
            plan=plan,
            headline=headline(findings),
            gate=_GATE[findings.exit_code],
            verdict=verdict_of(findings, plan, environment),
            counts=counts,
            shares=_shares(counts),
            commit=commit_of(environment),
            made=moment_of(findings),
            anchors={row.key: f"claim-{number}" for number, row in enumerate(findings.rows, 1)},
            untested=[entry for entry in plan.entries if entry.scope == "out_of_scope"][: limits.rows],
            **_evidence(store, findings, raw, limits),
            marks=MARKS,
            plain=PLAIN,
            meaning=meaning,
            bar_of=bar_of,
            said=_said,
            environment=[(key, value) for key, value in list(environment.items())[: limits.rows] if key != "schema"],
            inputs=[
                (name, entry if isinstance(entry, Mapping) else {})
                for name, entry in sorted(inputs.items())[: limits.rows]
            ],
            whole=limits is _LIMITS[0],
            limits=limits,
        )
        if len(page.encode()) < MAX_PAGE:
            break
    return page


def _shares(counts: Mapping[str, int]) -> list[tuple[str, str, float, float]]:
    """Return ``(class, words, start, width)`` of each part of a bar of 100 units; none of no claims."""
    parts = [(verdict, f"{counts[verdict]} {PLAIN[verdict]}", counts[verdict]) for verdict in MARKS]
    parts.append(("untested", f"{counts['out_of_scope']} out of scope", counts["out_of_scope"]))
    total = sum(count for _, _, count in parts)
    found, start = [], 0.0
    for name, words, count in parts:
        if count:
            found.append((name, words, round(start, 3), round(100 * count / total, 3)))
            start += 100 * count / total
    return found


def _evidence(store: Store, findings: Findings, raw: str | None, limits: Limits) -> dict[str, object]:
    runs = read_runs(store)
    plots = {
        "memory": memory_plots(findings, runs, limits.plots),
        "losses": loss_plots(runs, limits.plots),
        "steps": step_plots(runs) if limits.plots else [],
        "utilisation": utilisation_plots(findings, runs, limits.plots),
    }
    return {
        "plots": {kind: [_inline(plot) for plot in made] for kind, made in plots.items()},
        "groups": contract_groups(findings, runs, raw, limits),
        "runs": [_run(run, raw, limits) for run in list(runs.values())[: limits.rows]],
        "contracts": list(_contracts(store, raw, limits)),
        "linked": raw is not None,
    }


def _inline(plot: Plot) -> Plot:
    return replace(plot, svg=Markup(plot.svg))  # noqa: S704 - made by svg.py, which serialises a tree


def _run(run: RawRun, raw: str | None, limits: Limits) -> dict[str, object]:
    """Return a run as a row: its command, its end and its files. What cannot be read says so."""
    try:
        argv = run.argv.get("argv")
        command = shlex.join(map(str, argv)) if isinstance(argv, list) else "unknown"
        ended = f"{run.exit.get('cause')}, exit code {run.exit.get('returncode')}"
        wall = run.exit.get("wall_s")
        seconds = f"{wall:.1f}" if isinstance(wall, (int, float)) else "unknown"
    except InputError as error:
        command, ended, seconds = "unreadable", cut(error, limits.text), "unknown"
    files = [(name, link_to(raw, f"runs/{run.name}/{name}")) for name in run.store.names()[: limits.parts]]
    return {
        "name": limits.cut(run.name),
        "command": cut(command.replace("python -m q4kd.harness.child --", "q4kd"), min(_COMMAND, limits.text)),
        "ended": limits.cut(ended),
        "seconds": seconds,
        "files": files,
    }


@dataclass(frozen=True)
class _Text:
    """A contract or a profile as it was run. ``contract`` is None when it cannot be read, and for a profile."""

    name: str
    link: str | None
    contract: Contract | None
    sha256: str
    text: str | None


def _contracts(store: Store, raw: str | None, limits: Limits) -> Iterator[_Text]:
    try:
        described = {contract.path: contract for contract in bundle_contracts(store)}
    except InputError:  # they are shown as they are; `evidence verify` says what is wrong
        described = {}
    for name in [name for name in store.names() if name.startswith("contracts/")][: limits.rows]:
        data = store.read(name, MAX_BYTES)
        text = cut(data.decode("utf-8", "replace"), limits.detail) if limits.detail else None
        digest = hashlib.sha256(data).hexdigest()
        yield _Text(name.removeprefix("contracts/"), link_to(raw, name), described.get(name), digest, text)


def _said(value: object) -> str:
    """Return a value of the environment in words; an unread one says so."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_said(item)}" for key, item in value.items() if item is not None)
    if isinstance(value, list):
        return ", ".join(map(_said, value)) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "unknown" if value is None else str(value)
