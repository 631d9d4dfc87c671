"""The report: one HTML file, made from a bundle's own files, that shows what was measured before what was concluded."""

import importlib.resources
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, StrictUndefined, Template
from markupsafe import Markup

from q4kd.harness.findings import headline, parse_findings
from q4kd.harness.interchange import message_of
from q4kd.harness.plan import Plan
from q4kd.harness.plots import loss_plots, memory_plots
from q4kd.harness.raw import Store, open_store, read_runs
from q4kd.harness.store import read_object
from q4kd.trainer.errors import InputError

_GATE = {
    0: "gate passed",
    1: "gate failed: a claim was falsified",
    2: "gate not passed: not everything could be judged",
}
_MARK = {"corroborated": "✓", "falsified": "✗", "inconclusive": "?"}


@lru_cache(maxsize=4)
def _template(name: str) -> Template:
    source = importlib.resources.files("q4kd.harness") / "templates" / name
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(source.read_text(encoding="utf-8"))


def render(store: Store) -> str:
    """Return the report of a bundle as one self-contained HTML page.

    Everything shown comes from the bundle and is escaped; the page loads nothing and runs no script.

    Raises:
        InputError: when the findings, the plan or the environment are missing or malformed.
    """
    findings = parse_findings(store.read("findings.json"), "findings.json")
    plan = Plan.from_json(read_object(store, "plan.json"))
    environment = read_object(store, "environment.json")
    inputs = read_object(store, "inputs.json")
    runs = read_runs(store)
    plots = [
        {"caption": plot.caption, "svg": Markup(plot.svg)}  # noqa: S704 - made by plots.py, which escapes what it is given
        for plot in (*memory_plots(findings, runs), *loss_plots(runs))
    ]
    order = {"falsified": 0, "inconclusive": 1, "corroborated": 2}
    rows = sorted(findings["findings"], key=lambda row: (row["scope"] != "required", order[row["verdict"]], row["key"]))
    return _template("report.html.j2").render(
        headline=headline(findings),
        gate=_GATE[findings["exit_code"]],
        findings=findings,
        rows=[_row(row) for row in rows],
        out_of_scope=[entry for entry in plan.entries if entry.scope == "out_of_scope"],
        environment=_facts(environment),
        inputs=inputs,
        plots=plots,
    )


def _row(row: Mapping[str, Any]) -> dict[str, Any]:
    checks = row["checks"]
    deciding = next((check for check in checks if check["verdict"] == row["verdict"]), checks[0] if checks else None)
    caught = sum(record["caught"] for record in row["sabotage"])
    return {
        **row,
        "mark": _MARK[row["verdict"]],
        "anchor": "".join(c if c.isascii() and c.isalnum() else "-" for c in row["key"]),
        "measured": (deciding or {}).get("measured") or "—",
        "bound": (deciding or {}).get("bound") or "—",
        "caught": f"{caught} of {len(row['sabotage'])}" if row["sabotage"] else "—",
        "message": message_of(row),
    }


def _facts(environment: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the environment as pairs for a table; an unread value says so."""

    def said(value: object) -> str:
        if isinstance(value, Mapping):
            return ", ".join(f"{key} {said(item)}" for key, item in value.items() if item is not None)
        if isinstance(value, list):
            return ", ".join(map(said, value)) or "none"
        return "unknown" if value is None else str(value)

    return [(str(key), said(value)) for key, value in environment.items()]


def render_index(folder: Path) -> tuple[str, int]:
    """Return an HTML table of the bundles directly inside ``folder``, newest first, and how many there are.

    What lies there and is not a readable bundle is listed with the reason, when it looks like one.
    """
    rows: list[dict[str, Any]] = []
    broken: list[tuple[str, str]] = []
    for path in sorted(folder.iterdir()):
        archive = path.is_file() and path.name.endswith((".tar.gz", ".tgz"))
        if not archive and not (path / "findings.json").is_file():
            continue
        try:
            store = open_store(path)
            findings = parse_findings(store.read("findings.json"), "findings.json")
            environment = read_object(store, "environment.json")
        except InputError as error:
            broken.append((path.name, str(error)))
            continue
        links = {"report": f"{path.name}/report.html"} if not archive and (path / "report.html").is_file() else {}
        rows.append(
            {
                "name": path.name,
                "link": quote(links["report"]) if links else None,
                "created": findings["created"],
                "headline": headline(findings),
                "exit_code": findings["exit_code"],
                "commit": str(environment.get("commit") or "unknown")[:12] + ("+" if environment.get("dirty") else ""),
            }
        )
    rows.sort(key=lambda row: (row["created"], row["name"]), reverse=True)
    return _template("index.html.j2").render(rows=rows, broken=broken), len(rows)
