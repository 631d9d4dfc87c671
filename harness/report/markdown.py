"""The findings in Markdown, short enough for a comment on a pull request.

Text of a bundle stands in code spans only, where it makes no HTML, link, mention or reference. Characters that could
end a span or a table cell are spelt out.
"""

from q4kd.harness.bundle.findings import read_findings
from q4kd.harness.claims.plan import Plan
from q4kd.harness.judging.results import Findings
from q4kd.harness.records.json_types import JsonRecord
from q4kd.harness.records.store import Store, read_object
from q4kd.harness.report.page import shown
from q4kd.harness.report.verdict import MARKS, Verdict, commit_of, counted, meaning, moment_of, verdict_of

FILE = "findings.md"
MAX_BYTES = 60_000  # a comment on GitHub holds 65,536 characters
# (rows of a section, characters of a text); the first that gives a text below MAX_BYTES is used.
_LIMITS = ((25, 400), (10, 150), (3, 60))
_FOOT = (
    "Survived means: this attempt did not refute it. Draw the verdicts again from the raw files, without a GPU:",
    "",
    "```",
    "q4kd evidence verify BUNDLE --contracts DIR",
    "```",
    "",
)


def code(text: object, limit: int = 400) -> str:
    """Return ``text`` on one line as a code span that nothing in it can leave."""
    line = " ".join(shown(str(text)[: 4 * limit]).split())
    line = line.replace("`", "\\x60").replace("|", "\\x7c")
    return f"`{line if len(line) <= limit else line[: limit - 1] + '…'}`" if line else "none"


def render_markdown(store: Store) -> str:
    """Return what a reviewer must know of a bundle, as GitHub-flavoured Markdown of less than 60 kB.

    Raises:
        InputError: when the findings, the plan or the environment are missing or malformed.
    """
    findings = read_findings(store)
    plan = Plan.from_json(read_object(store, "plan.json"))
    environment = read_object(store, "environment.json")
    verdict = verdict_of(findings, plan, environment)
    text = ""
    for rows, limit in _LIMITS:
        lines = [*_head(findings, verdict, environment, limit), *_table(findings, plan, rows, limit)]
        lines += [*_fallen(verdict, rows, limit), *_undecided(verdict, rows, limit), *_waived(verdict, rows, limit)]
        lines += [*_untested(verdict, rows, limit), *_carried(verdict, rows, limit)]
        text = "\n".join([*lines, *_FOOT])
        if len(text.encode()) < MAX_BYTES:
            break
    return text


def _head(findings: Findings, verdict: Verdict, environment: JsonRecord, limit: int) -> list[str]:
    where = f"profile {code(findings.profile, limit)}, commit {code(commit_of(environment), limit)}"
    return [
        f"## {MARKS[verdict.tone]} {verdict.title}",
        "",
        f"{verdict.scale}, tried on {code(verdict.machine, limit)}; {where}, {moment_of(findings)}.",
        "",
        *([f"**Not all of it was run**: {verdict.origin}.", ""] if verdict.origin else []),
    ]


def _table(findings: Findings, plan: Plan, rows: int, limit: int) -> list[str]:
    names = list(dict.fromkeys(entry.contract for entry in plan.entries))
    lines = [
        "| contract | survived | fell | undecided | out of scope | faults caught |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name in names[:rows]:
        mine = [row for row in findings.rows if row.contract == name]
        counts = [sum(row.verdict == verdict for row in mine) for verdict in MARKS]
        outside = sum(entry.contract == name and entry.scope == "out_of_scope" for entry in plan.entries)
        faults = [kill.caught for row in mine for kill in row.sabotage]
        caught = f"{sum(faults)} of {len(faults)}" if faults else "none"
        lines.append(f"| {code(name, limit)} | {' | '.join(map(str, (*counts, outside)))} | {caught} |")
    return [*lines, *_rest(len(names), rows, "contract"), ""]


def _fallen(verdict: Verdict, rows: int, limit: int) -> list[str]:
    lines = ["### Fell", ""] if verdict.fell else []
    for row in verdict.fell[:rows]:
        lines += [
            f"- **{code(row.key, limit)}** {code(row.rule, limit)}",
            f"  - counterexample: {code(row.message, limit)}",
            f"  - most likely means: {code(row.if_fails, limit)}",
        ]
    return [*lines, *_rest(len(verdict.fell), rows, "claim"), ""] if lines else []


def _undecided(verdict: Verdict, rows: int, limit: int) -> list[str]:
    lines = ["### Could not be judged", ""] if verdict.undecided else []
    for reason, found in list(verdict.undecided.items())[:rows]:
        said = f" ({meaning(reason)})" if meaning(reason) else ""
        lines.append(f"- {code(reason, limit)}{said}: {counted(len(found), 'claim')}")
        lines += [f"  - {code(row.key, limit)}" for row in found[:rows]]
        lines += [f"  {line}" for line in _rest(len(found), rows, "claim")]
    return [*lines, ""] if lines else []


def _carried(verdict: Verdict, rows: int, limit: int) -> list[str]:
    lines = ["### Judged again on runs made earlier", ""] if verdict.carried else []
    for origin, experiments in verdict.carried.items():
        lines.append(f"- from {code(origin, limit)}: {', '.join(code(name, limit) for name in experiments[:rows])}")
        lines += [f"  - and {len(experiments) - rows} more experiments"] if len(experiments) > rows else []
    return [*lines, ""] if lines else []


def _waived(verdict: Verdict, rows: int, limit: int) -> list[str]:
    lines = ["### Could not be judged, and waived", ""] if verdict.waived or verdict.expired else []
    for row in verdict.waived[:rows]:
        assert row.waiver is not None
        owner, reason = code(row.waiver.owner, limit), code(row.waiver.reason, limit)
        lines.append(f"- {code(row.key, limit)}: {code(row.reason, limit)}")
        lines.append(f"  - by {owner} until {row.waiver.expires}: {reason}")
    lines += _rest(len(verdict.waived), rows, "claim")
    lines += [f"- {code(line, limit)}" for line in verdict.expired[:rows]]
    return [*lines, ""] if lines else []


def _untested(verdict: Verdict, rows: int, limit: int) -> list[str]:
    lines = ["### Out of scope here", ""] if verdict.untested else []
    for reason, entries in list(verdict.untested.items())[:rows]:
        lines.append(f"- {counted(len(entries), 'claim')}: {code(reason, limit)}")
    return [*lines, ""] if lines else []


def _rest(count: int, rows: int, noun: str) -> list[str]:
    return ["", f"… and {counted(count - rows, noun)} more, see `findings.json`"] if count > rows else []
