"""Plots of a bundle's runs over time: memory below its ceiling, and how busy the GPU was. Both from outside samples."""

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from q4kd.harness.judging.results import CheckResult, Finding, Findings
from q4kd.harness.records.raw_run import RawRun
from q4kd.harness.report.page import shown
from q4kd.trainer.errors import InputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MIN_SAMPLES = 20
_MAX_POINTS = 800
_MB = 1e6
LARGEST = 1e12  # seconds, or MB: beyond it no plot means anything
# Event that begins a phase → what the phase is, on the plot.
_PHASE_NAMES = {
    "imports_done": "imports done",
    "teacher_loading": "load",
    "teacher_ready": "ready",
    "hold_started": "hold",
    "held": "held",
    "forward_done": "1st forward done",
    "step": "1st step done",
    "done": "done",
}
# Series of the memory checks → field of a sample, what its axis says.
_SERIES = {
    "rss_above_baseline": ("rss", "MB above the baseline"),
    "rss": ("rss", "MB resident"),
    "gpu_bytes": ("gpu_bytes", "MB on the GPU"),
    "mem_available_drop": ("mem_available", "MB taken from the machine"),
}
Points = Sequence[tuple[float, float]]
Phase = tuple[str, str | None]
_EDGE_S = 0.5  # a memory check takes samples this far outside its phase


@dataclass(frozen=True, kw_only=True)
class Plot:
    """One plot: a name unique on the page, what it shows in words, and the SVG element. ``rows`` are its numbers."""

    name: str
    title: str
    caption: str
    svg: str
    columns: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()


def memory_plots(findings: Findings, runs: Mapping[str, RawRun], most: int = 100) -> list[Plot]:
    """Plot the memory of every run that a memory claim was judged on, in that claim's series, under its ceiling.

    Runs that are missing, malformed or short of 20 samples draw nothing; at most ``most`` plots are made.
    """
    ceilings: dict[tuple[str, str], dict[Phase, float | None]] = {}
    for row, check in _checks(findings, "memory_ceiling", "residency"):
        series, phase = _series_and_phase(check)
        for name in _runs_judged(row, check):
            if series in _SERIES:
                found = ceilings.setdefault((name, series), {})
                stated = [v for v in (ceiling_bytes(check), found.get(phase)) if v is not None]
                found[phase] = min(stated, default=None)
    plots: list[Plot] = []
    for (name, series), bounds in sorted(ceilings.items()):
        if name in runs and len(plots) < most:
            plots += _drawn(partial(_memory_plot, name, runs[name], series, bounds))
    return plots


def _checks(findings: Findings, *names: str) -> Iterator[tuple[Finding, CheckResult]]:
    """Yield every use of the checks ``names``, with the finding that it belongs to."""
    return ((row, check) for row in findings.rows for check in row.checks if check.check in names)


def _series_and_phase(check: CheckResult) -> tuple[str, Phase]:
    """Return the series that a memory check judges and the events its ceiling holds between (None: to the end)."""
    if check.check == "residency":
        return "rss_above_baseline", ("teacher_ready", check.params.get("outside", {}).get("until"))
    first, last = check.params.get("phase") or (None, None)
    return str(check.params.get("series")), (str(first), str(last))


def _runs_judged(row: Finding, check: CheckResult) -> list[str]:
    arm = check.params.get("arm")
    return [name for name in row.runs if arm is None or name.partition(".")[2] == arm]


def _drawn(draw: Callable[[], Plot | None]) -> list[Plot]:
    """Return the plot, or none when its raw files are not what a run leaves; the claim's verdict says what is wrong."""
    try:
        plot = draw()
    except (InputError, KeyError, TypeError, ValueError, OverflowError):
        return []
    return [plot] if plot else []


def ceiling_bytes(check: CheckResult) -> float | None:
    """Return the ceiling that a memory check set, in bytes: a constant, or times a fact that was observed; or None."""
    params, observation = check.params, check.observation or {}
    residency = check.check == "residency"
    bound = params.get("outside", {}) if residency else params.get("ceiling", {})
    fact = observation.get("tensor_bytes" if residency else "of_bytes")
    if isinstance(bound.get("bytes"), (int, float)):
        return float(bound["bytes"]) + float(bound.get("plus_bytes", 0))
    if isinstance(bound.get("times"), (int, float)) and isinstance(fact, (int, float)):
        return float(bound["times"]) * float(fact) + float(bound.get("plus_bytes", 0))
    return None


def _memory_plot(name: str, run: RawRun, series: str, ceilings: Mapping[Phase, float | None]) -> Plot | None:
    from q4kd.harness.report.svg import LIMIT, SERIES, new_figure, to_svg

    points, marks = memory_series(run, series, {event for phase in ceilings for event in phase if event})
    if len(points) < MIN_SAMPLES:
        return None
    figure, axes = new_figure("seconds after the imports", _SERIES[series][1])
    seconds, megabytes = zip(*thin(points), strict=True)
    axes.plot(seconds, megabytes, color=SERIES[0], linewidth=1.6)
    axes.fill_between(seconds, megabytes, color=SERIES[0], alpha=0.12, linewidth=0)
    top = max([1.0, *(y for _, y in points), *(limit / _MB for limit in ceilings.values() if limit is not None)])
    lowest = min(0.0, *(y for _, y in points))
    axes.set_ylim(lowest - (top - lowest) / 40, lowest + (top - lowest) * 1.34)
    axes.margins(x=0.02)
    _mark_phases(axes, marks, points)
    said: list[str] = []
    labelled: set[float] = set()
    for (first, last), limit in ceilings.items():
        begin = marks.get(first, points[0][0])
        end = marks.get(last, points[-1][0]) if last is not None else points[-1][0]
        inside = [y for t, y in points if begin - _EDGE_S <= t <= end + _EDGE_S]
        until = f"from {_phase_name(first)} to {_phase_name(last) if last else 'the end'}"
        said += [f"peak {max(inside):.1f} MB {until}"] if inside else []
        if limit is None:
            continue
        said[-1:] = [f"{said[-1]}, ceiling {limit / _MB:.1f} MB"] if inside else []
        axes.plot([begin, end], [limit / _MB] * 2, color=LIMIT, linewidth=1.5, linestyle=(0, (5, 3)))
        if limit in labelled:
            continue
        labelled.add(limit)
        right = begin > (points[0][0] + points[-1][0]) / 2
        axes.annotate(
            f"ceiling {limit / _MB:.1f} MB", (end if right else begin, limit / _MB), xytext=(-2 if right else 2, 3),
            textcoords="offset points", ha="right" if right else "left", va="bottom", fontsize=8.5, color=LIMIT,
        )  # fmt: skip
    caption = f"{name}, {_SERIES[series][1]}: {'; '.join(dict.fromkeys(said)) or 'no sample in the phase'}"
    return Plot(name=f"memory-{name}-{series}", title=name, caption=caption, svg=to_svg(figure, f"m-{name}", caption))


def _phase_name(event: str) -> str:
    return _PHASE_NAMES.get(event, event.replace("_", " "))


def _mark_phases(axes: "Axes", marks: Mapping[str, float], points: Points) -> None:
    """Draw a line where each phase begins, labelled above the data on as many levels as keep the labels apart."""
    from q4kd.harness.report.svg import INK, SOFT

    start, end = points[0][0], points[-1][0]
    levels: list[list[tuple[float, float]]] = [[], [], []]  # taken stretches of each, as fractions of the width
    for kind, x in sorted(marks.items(), key=lambda mark: mark[1]):
        axes.axvline(x, color=INK, linewidth=0.6, alpha=0.3)
        at, name = (x - start) / max(end - start, 1e-9), label(_phase_name(kind))
        width = 0.021 * len(name) + 0.02
        right = at + width > 1.0
        begin, stop = (at - width, at) if right else (at, at + width)
        level = next((i for i, taken in enumerate(levels) if all(stop <= a or b <= begin for a, b in taken)), None)
        if level is None:
            continue
        levels[level].append((begin, stop))
        axes.annotate(
            name, (x, 1.0), xycoords=("data", "axes fraction"), xytext=(-2 if right else 2, -3 - 10 * level),
            textcoords="offset points", ha="right" if right else "left", va="top", fontsize=7.5, color=SOFT,
        )  # fmt: skip


def memory_series(
    run: RawRun, series: str, named: Collection[str] = ()
) -> tuple[list[tuple[float, float]], dict[str, float]]:
    """Return (seconds after the imports, MB of a memory check's series) from just before them, and each phase's start.

    The phases are those known here and the events ``named``.

    Raises:
        InputError, KeyError, TypeError, ValueError: when the run's files are not what a run leaves.
    """
    from q4kd.harness.checks.run_facts import baseline_memory

    ready = run.event("imports_done")
    if ready is None:
        return [], {}
    start, field = float(ready["t"]), _SERIES[series][0]
    told = [(float(row["t"]) - start, float(row[field])) for row in run.memory if row.get(field) is not None]
    sign, baseline = 1.0, 0.0
    if series == "rss_above_baseline":
        found = baseline_memory(run)
        if found is None:
            return [], {}
        baseline = found
    elif series == "mem_available_drop":
        before = [value for t, value in told if t <= 0]
        if not before:
            return [], {}
        sign, baseline = -1.0, before[-1]
    points = [(t, sign * (value - baseline) / _MB) for t, value in told]
    if any(abs(value) > LARGEST for point in points for value in point):
        raise ValueError("a sample out of all proportion")
    begins = {kind: run.event(kind) for kind in dict.fromkeys([*_PHASE_NAMES, *sorted(named)])}
    marks = {kind: float(event["t"]) - start for kind, event in begins.items() if event is not None}
    return [(t, y) for t, y in points if t >= -0.5], marks


def utilisation_plots(findings: Findings, runs: Mapping[str, RawRun], most: int = 100) -> list[Plot]:
    """Plot NVML's utilisation by this process for every run that a utilisation claim was judged on."""
    plots: list[Plot] = []
    for row, check in _checks(findings, "gpu_utilization"):
        for name in _runs_judged(row, check):
            if name in runs and len(plots) < most and not any(plot.title == name for plot in plots):
                plots += _drawn(partial(_utilisation_plot, name, runs[name], check.params.get("min_percent")))
    return plots


def _utilisation_plot(name: str, run: RawRun, least: object) -> Plot | None:
    from q4kd.harness.report.svg import LIMIT, SERIES, new_figure, to_svg

    ready = run.event("imports_done")
    start = float(ready["t"]) if ready else 0.0
    told = [(float(row["t"]) - start, float(row["gpu_sm"])) for row in run.memory if row.get("gpu_sm") is not None]
    if len(told) < MIN_SAMPLES or any(abs(t) > LARGEST or not 0 <= busy <= 100 for t, busy in told):
        return None
    figure, axes = new_figure("seconds after the imports", "% of the GPU's time")
    axes.plot(*zip(*thin(told), strict=True), color=SERIES[0], linewidth=1.2, marker="o", markersize=2.4)
    axes.set_ylim(-3, 112)
    caption = f"{name}: the GPU busy with this process, {len(told)} samples, highest {max(b for _, b in told):g} %"
    if isinstance(least, (int, float)):
        axes.axhline(least, color=LIMIT, linewidth=1.3, linestyle=(0, (5, 3)))
        axes.annotate(
            f"median at least {least:g} %", (0.0, least), xycoords=("axes fraction", "data"), xytext=(3, -3),
            textcoords="offset points", va="top", fontsize=8.5, color=LIMIT,
        )  # fmt: skip
        caption += f"; claimed: a median of at least {least:g} % while work is done"
    return Plot(name=f"utilisation-{name}", title=name, caption=caption, svg=to_svg(figure, f"u-{name}", caption))


def thin(points: Points, limit: int = _MAX_POINTS) -> list[tuple[float, float]]:
    """Return at most about ``limit`` points, keeping the highest of each group so that a peak is never lost."""
    if len(points) <= limit:
        return list(points)
    size = math.ceil(len(points) / limit)
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [max(group, key=lambda point: point[1]) for group in groups]


def label(text: str) -> str:
    """Return a name as it may stand in a figure: visible characters only, at most 60 of them."""
    return shown(text)[:60]
