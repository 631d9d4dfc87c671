"""Plots of a bundle's runs as inline SVG: memory over time, and losses of an experiment's arms.

Text stays text and takes the page's colour, so the plots follow light and dark. matplotlib is imported on first use.
"""

import io
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from q4kd.harness.raw import RawRun
from q4kd.trainer.errors import InputError

MIN_SAMPLES = 20
_MAX_POINTS = 1500
_MB = 1e6
_LARGEST = 1e12  # seconds, or MB: beyond it no plot means anything
_LIMIT = "#dc4a43"
_INK = "#010203"  # stands for the page's text colour until the SVG is written
_COLOURS = ("#3b7dd8", "#d9822b", "#2f9e6e", "#a855c7")
_PHASES = ("imports_done", "teacher_loading", "teacher_ready", "forward_done", "step", "done")
_ARM = re.compile(r"(?P<experiment>[^.]+)\.(?P<arm>.+)-seed(?P<seed>\d+)")


@dataclass(frozen=True, kw_only=True)
class Plot:
    """One plot: its caption, and the SVG element."""

    caption: str
    svg: str


def memory_plots(findings: Mapping[str, Any], runs: Mapping[str, RawRun]) -> list[Plot]:
    """Plot resident memory above the post-import baseline of every run that a memory claim was judged on."""
    ceilings: dict[str, float | None] = {}
    for row in findings["findings"]:
        for check in row["checks"]:
            if check["check"] in ("memory_ceiling", "residency"):
                ceiling, arm = ceiling_bytes(check), check["params"].get("arm")
                for name in row["runs"]:
                    if arm is None or name.partition(".")[2] == arm:
                        stated = [v for v in (ceiling, ceilings.get(name)) if v is not None]
                        ceilings[name] = min(stated, default=None)
    plots = [_memory_plot(name, runs[name], ceiling) for name, ceiling in sorted(ceilings.items()) if name in runs]
    return [plot for plot in plots if plot is not None]


def ceiling_bytes(check: Mapping[str, Any]) -> float | None:
    """Return the ceiling that a check put on memory above the baseline, in bytes: a constant, or times a fact; or None.

    A ceiling on the whole resident set is another series than the one drawn, so it has none here.
    """
    params, observation = check["params"], check["observation"] or {}
    if check["check"] == "residency":
        bound, fact = params.get("outside", {}), observation.get("tensor_bytes")
    else:
        bound, fact = params.get("ceiling", {}), observation.get("of_bytes")
        if params.get("series") != "rss_above_baseline":
            return None
    if isinstance(bound.get("bytes"), (int, float)):
        return float(bound["bytes"]) + float(bound.get("plus_bytes", 0))
    if isinstance(bound.get("times"), (int, float)) and isinstance(fact, (int, float)):
        return float(bound["times"]) * float(fact) + float(bound.get("plus_bytes", 0))
    return None


def _memory_plot(name: str, run: RawRun, ceiling: float | None) -> Plot | None:
    try:
        points, marks = _memory_series(run)
    except (InputError, KeyError, TypeError, ValueError, OverflowError):  # the claim says what is wrong with the file
        return None
    if len(points) < MIN_SAMPLES:
        return None
    figure, axes = _figure("seconds after the imports", "MB above the baseline")
    axes.plot(*zip(*thin(points), strict=True), color=_COLOURS[0], linewidth=1.4)
    peak = max(y for _, y in points)
    top = max(peak, ceiling / _MB if ceiling is not None else 0.0, 1.0) * 1.18
    axes.set_ylim(min(0.0, *(y for _, y in points)) - top / 25, top)
    for x in marks.values():
        axes.axvline(x, color=_INK, linewidth=0.6, alpha=0.35)
    for label, x in _labels(marks, points[-1][0] - points[0][0]):
        axes.annotate(
            label, (x, 0.0), xycoords=("data", "axes fraction"), xytext=(2, 4),
            textcoords="offset points", rotation=90, va="bottom", fontsize=7.5, color=_INK,
        )  # fmt: skip
    if ceiling is not None:
        axes.axhline(ceiling / _MB, color=_LIMIT, linewidth=1.2, linestyle="--")
        axes.annotate(
            f"ceiling {ceiling / _MB:.1f} MB", (0.0, ceiling / _MB), xycoords=("axes fraction", "data"),
            xytext=(4, 4), textcoords="offset points", ha="left", va="bottom", fontsize=8.5, color=_LIMIT,
        )  # fmt: skip
    bound = f", ceiling {ceiling / _MB:.1f} MB" if ceiling is not None else ""
    caption = f"{name}: memory of the process, peak {peak:.1f} MB above its post-import baseline{bound}"
    return Plot(caption=caption, svg=_svg(figure, f"m-{name}", caption))


def _labels(marks: Mapping[str, float], span: float) -> list[tuple[str, float]]:
    """Return one label for phases that begin too close together to be told apart, at the first of them."""
    labels: list[tuple[str, float]] = []
    for kind, x in sorted(marks.items(), key=lambda mark: mark[1]):
        name = kind.replace("_", " ")
        if labels and x - labels[-1][1] < 0.04 * span:
            labels[-1] = (f"{labels[-1][0]}, {name}", labels[-1][1])
        else:
            labels.append((name, x))
    return labels


def _memory_series(run: RawRun) -> tuple[list[tuple[float, float]], dict[str, float]]:
    """Return (seconds after the imports, MB above the baseline) from just before them, and when each phase began."""
    from q4kd.harness.checks.judgement import baseline_rss

    baseline, ready = baseline_rss(run), run.event("imports_done")
    if baseline is None or ready is None:
        return [], {}
    start = float(ready["t"])
    points = [(float(row["t"]) - start, (float(row["rss"]) - baseline) / _MB) for row in run.memory]
    if any(abs(value) > _LARGEST for point in points for value in point):
        raise ValueError("a sample out of all proportion")
    found = {kind: run.event(kind) for kind in _PHASES}
    return [(t, y) for t, y in points if t >= -0.5], {
        kind: float(event["t"]) - start for kind, event in found.items() if event is not None
    }


def loss_plots(runs: Mapping[str, RawRun]) -> list[Plot]:
    """Plot the losses of every experiment whose arms are named ``<arm>-seed<n>``: each arm's mean over its seeds."""
    found: dict[str, dict[str, list[RawRun]]] = defaultdict(lambda: defaultdict(list))
    for name, run in sorted(runs.items()):
        match = _ARM.fullmatch(name)
        if match is not None and _readable(run):
            found[match["experiment"]][match["arm"]].append(run)
    plots = []
    for experiment, arms in sorted(found.items()):
        for event, fields, what in (("eval", ("loss",), "held-out loss"), ("step", ("ce", "loss"), "training loss")):
            curves = {arm: _mean_curve(group, event, fields) for arm, group in arms.items()}
            curves = {arm: points for arm, points in curves.items() if len(points) > 1}
            if len(curves) > 1:
                plots.append(_loss_plot(experiment, what, curves, {arm: len(group) for arm, group in arms.items()}))
    return plots


def _readable(run: RawRun) -> bool:
    try:
        return bool(run.events)
    except InputError:
        return False


def _mean_curve(runs: Iterable[RawRun], event: str, fields: Sequence[str]) -> list[tuple[float, float]]:
    """Return (step, mean over runs) at the steps that every run reports. Training loss is ``ce`` where it is stated."""
    series = []
    for run in runs:
        points: dict[float, float] = {}
        for row in run.events_named(event):
            value = next((row[field] for field in fields if isinstance(row.get(field), (int, float))), None)
            if isinstance(row.get("step"), (int, float)) and value is not None and abs(value) < _LARGEST:
                points[float(row["step"])] = float(value)
        series.append(points)
    shared = set.intersection(*(set(points) for points in series)) if series else set()
    return [(step, sum(points[step] for points in series) / len(series)) for step in sorted(shared)]


def _loss_plot(
    experiment: str, what: str, curves: Mapping[str, list[tuple[float, float]]], seeds: Mapping[str, int]
) -> Plot:
    figure, axes = _figure("step", f"{what} (nats per token)")
    for index, (arm, points) in enumerate(sorted(curves.items(), reverse=True)):
        colour = _COLOURS[index % len(_COLOURS)]
        style = ("-", "--", "-.", ":")[index % 4]
        axes.plot(*zip(*thin(points), strict=True), color=colour, linewidth=1.5, linestyle=style, label=arm)
    axes.legend(frameon=False, fontsize=9, labelcolor=_INK)
    ends = ", ".join(f"{arm} {points[-1][1]:.4f} ({seeds[arm]} seeds)" for arm, points in sorted(curves.items()))
    caption = f"{experiment}: {what}, mean over seeds; last value {ends}"
    return Plot(caption=caption, svg=_svg(figure, f"l-{experiment}-{what}", caption))


def thin(points: Sequence[tuple[float, float]], limit: int = _MAX_POINTS) -> list[tuple[float, float]]:
    """Return at most about ``limit`` points, keeping the highest of each group so that a peak is never lost."""
    if len(points) <= limit:
        return list(points)
    size = math.ceil(len(points) / limit)
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [max(group, key=lambda point: point[1]) for group in groups]


def _figure(x_label: str, y_label: str) -> tuple[Any, Any]:
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_style()):
        figure = Figure(figsize=(5.2, 3.1), layout="constrained")
        axes = figure.subplots()
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.grid(visible=True, linewidth=0.4, alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _style() -> Any:
    return {
        "axes.edgecolor": _INK,
        "axes.labelcolor": _INK,
        "font.family": "sans-serif",
        "font.size": 9,
        "grid.color": _INK,
        "svg.fonttype": "none",
        "svg.hashsalt": "q4kd",
        "text.color": _INK,
        "text.parse_math": False,
        "xtick.color": _INK,
        "ytick.color": _INK,
    }


def _svg(figure: Any, name: str, title: str) -> str:
    """Write the figure as one ``<svg>`` element with its own ids, a title, and the page's colour for its ink."""
    import matplotlib
    from markupsafe import escape

    buffer = io.BytesIO()
    with matplotlib.rc_context(_style()):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue().decode()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, count=1, flags=re.DOTALL)
    prefix = re.sub(r"[^A-Za-z0-9]", "-", name)
    text = re.sub(r'\bid="', f'id="{prefix}-', text)
    text = re.sub(r'(url\(|href=")#', rf"\g<1>#{prefix}-", text)
    text = text.replace(_INK, "currentColor")
    head, rest = text.split(">", 1)
    head = re.sub(r'\s(width|height)="[^"]*"', "", head)
    return f'{head} role="img" aria-label="{escape(title)}"><title>{escape(title)}</title>{rest}'
