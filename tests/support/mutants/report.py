"""What a session found, for people (Markdown) and programs (JSON)."""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mutants.clean import TIMED
from mutants.exclusions import MODULES, PERFORMANCE
from mutants.session import Outcome
from mutants.trial import Trial

LEAST_TURNED, LEAST_SEEN = 0.90, 0.98


def passes(trials: Sequence[Trial], turned: float = LEAST_TURNED, seen: float = LEAST_SEEN) -> bool:
    """Return whether enough mutants turn a claim, and enough a claim or a test. Nothing planted is not enough."""
    if not trials:
        return False
    count = len(trials)
    return sum(t.turned for t in trials) >= turned * count and sum(t.seen for t in trials) >= seen * count


def write_report(outcome: Outcome, out: Path) -> str:
    """Write ``report.json`` and ``report.md`` to a folder and return the Markdown."""
    text = markdown(outcome)
    record: dict[str, Any] = {
        "schema": "q4kd-mutants/1",
        "planned": outcome.planned,
        "places": outcome.places,
        "counts": _counts(outcome.trials),
        "controls": [asdict(trial) for trial in outcome.controls],
        "trials": [asdict(trial) for trial in outcome.trials],
        "unreached": [_place(mutant) for mutant in outcome.unreached],
        "equivalent": [{**_place(mutant), "reason": reason} for mutant, reason in outcome.equivalent],
        "clean": [
            {"experiment": e.name, "seconds": e.seconds, "lost": e.not_corroborated} for e in outcome.experiments
        ],
        "excluded": {"modules": MODULES, "constants": PERFORMANCE, "experiments": TIMED},
    }
    (out / "report.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    (out / "report.md").write_text(text, encoding="utf-8")
    return text


def _place(mutant: Any) -> dict[str, object]:
    names = ("module", "line", "function", "operator", "original", "mutant")
    return {name: getattr(mutant, name) for name in names}


def _counts(trials: Sequence[Trial]) -> dict[str, int]:
    return {
        "trials": len(trials),
        "falsified": sum(t.by_claims == "falsified" for t in trials),
        "inconclusive": sum(t.by_claims == "inconclusive" for t in trials),
        "unreached": sum(t.by_claims == "unreached" for t in trials),
        "only tests": sum(t.seen and not t.turned for t in trials),
        "nobody": sum(not t.seen for t in trials),
    }


def markdown(outcome: Outcome) -> str:
    """Return the report as Markdown: the counts, tables by operator and module, and every survivor."""
    trials, counts = outcome.trials, _counts(outcome.trials)
    turned, seen = (counts["falsified"] + counts["inconclusive"]), counts["trials"] - counts["nobody"]
    lines = [
        "# Mutants",
        "",
        f"{counts['trials']} of {outcome.planned} planned mutants were planted; "
        f"{outcome.places} places can be changed.",
        f"{turned} ({_share(turned, counts['trials'])}) turn a claim: {counts['falsified']} falsified, "
        f"{counts['inconclusive']} inconclusive. {seen} ({_share(seen, counts['trials'])}) turn a claim or a test.",
        f"{sum(t.turned for t in outcome.controls)} of {len(outcome.controls)} controls, which change nothing, do.",
        f"{counts['unreached']} lie on lines that no claim's runs execute.",
        "",
        *_table("operator", trials, lambda trial: trial.operator),
        *_table("module", trials, lambda trial: trial.module),
        *_listed("Controls that turned", (t for t in outcome.controls if t.turned)),
        *_listed("Seen by nobody", (t for t in trials if not t.seen)),
        *_listed("Seen by tests alone", (t for t in trials if t.seen and not t.turned)),
        *_listed("Inconclusive, not falsified", (t for t in trials if t.by_claims == "inconclusive")),
        "## Places that no claim reaches",
        "",
        f"{len(outcome.unreached)} of {outcome.places}, by function:",
        "",
    ]
    by_function = Counter((m.module, m.function) for m in outcome.unreached)
    lines += [f"- {module} {function or '(module)'}: {n}" for (module, function), n in sorted(by_function.items())]
    lost = [(run.name, key, why) for run in outcome.experiments for key, why in run.not_corroborated.items()]
    if lost:
        lines += ["", "## Not corroborated on unchanged sources, and so not asked", ""]
        lines += [f"- {name} {key}: {why}" for name, key, why in lost]
    return "\n".join(lines) + "\n"


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "none planted"


def _table(title: str, trials: Sequence[Trial], group: Callable[[Trial], str]) -> list[str]:
    lines = [f"| {title} | planted | falsified | inconclusive | only tests | nobody |", "|---|---|---|---|---|---|"]
    for name in sorted({group(trial) for trial in trials}):
        of = _counts([trial for trial in trials if group(trial) == name])
        cells = (of["trials"], of["falsified"], of["inconclusive"], of["only tests"], of["nobody"])
        lines.append(f"| {name} | {' | '.join(map(str, cells))} |")
    return [*lines, ""]


def _listed(title: str, trials: Iterable[Trial]) -> list[str]:
    lines = [f"## {title}", ""]
    for trial in sorted(trials, key=lambda trial: (trial.module, trial.line)):
        reached = "no claim reaches it" if trial.by_claims == "unreached" else f"asked: {', '.join(trial.judged)}"
        said = f"{trial.claim}: {trial.detail}" if trial.claim else reached
        test = f"; test {trial.test}" if trial.test else ""
        change = f"`{trial.original}` → `{trial.mutant}`"
        lines.append(f"- {trial.module}:{trial.line} {trial.function} ({trial.operator}): {change}; {said}{test}")
    return [*lines, ""] if len(lines) > 2 else []
