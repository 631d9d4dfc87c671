"""Plots of training: losses of an experiment's arms, and where the time of a step went. From the trainer's events."""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import Any

from q4kd.harness.records.raw_run import RawRun
from q4kd.harness.report.plots import LARGEST, Plot, label, thin
from q4kd.trainer.errors import InputError

MIN_STEPS = 8
_WARM_UP = 2  # the first steps pay for allocations and are not what a step costs
_MOST_BARS = 10
_PARTS = (("data_s", "data"), ("teacher_s", "teacher"), ("student_s", "student"), ("optimizer_s", "optimiser"))
_ARM = re.compile(r"(?P<experiment>[^.]+)\.(?P<arm>.+)-seed(?P<seed>\d+)")
_STYLES = ("-", (0, (5, 2)), (0, (5, 2, 1, 2)), (0, (1, 1.5)))
Curve = list[tuple[float, float]]


def loss_plots(runs: Mapping[str, RawRun], most: int = 100) -> list[Plot]:
    """Plot the losses of every experiment whose arms are named ``<arm>-seed<n>``: each seed, and each arm's mean."""
    found: dict[str, dict[str, list[RawRun]]] = defaultdict(lambda: defaultdict(list))
    for name, run in sorted(runs.items()):
        match = _ARM.fullmatch(name)
        if match is not None and _readable(run):
            found[match["experiment"]][match["arm"]].append(run)
    plots: list[Plot] = []
    for experiment, arms in sorted(found.items()):
        for event, fields, what in (("eval", ("loss",), "held-out loss"), ("step", ("ce", "loss"), "training loss")):
            curves = {arm: [_curve(run, event, fields) for run in group] for arm, group in arms.items()}
            curves = {arm: seeds for arm, seeds in curves.items() if len(_mean(seeds)) > 1}
            if len(curves) > 1 and len(plots) < most:
                plots.append(_loss_plot(experiment, what, curves))
    return plots


def _readable(run: RawRun) -> bool:
    try:
        return bool(run.events)
    except InputError:
        return False


def _curve(run: RawRun, event: str, fields: Sequence[str]) -> Curve:
    """Return (step, loss) as a run reports it. Training loss is ``ce`` where it is stated."""
    points: dict[float, float] = {}
    for row in run.events_named(event):
        value = next((row[field] for field in fields if isinstance(row.get(field), (int, float))), None)
        step = row.get("step")
        if isinstance(step, (int, float)) and value is not None and abs(value) < LARGEST and abs(step) < LARGEST:
            points[float(step)] = float(value)
    return sorted(points.items())


def _mean(seeds: Iterable[Curve]) -> Curve:
    """Return (step, mean over seeds) at the steps that every seed reports."""
    found = [dict(points) for points in seeds]
    shared = set.intersection(*(set(points) for points in found)) if found else set()
    return [(step, sum(points[step] for points in found) / len(found)) for step in sorted(shared)]


def _loss_plot(experiment: str, what: str, curves: Mapping[str, list[Curve]]) -> Plot:
    from q4kd.harness.report.svg import INK, SERIES, new_figure, to_svg

    figure, axes = new_figure("step", f"{what}, nats per token")
    for index, (arm, seeds) in enumerate(sorted(curves.items(), reverse=True)):
        colour, style = SERIES[index % len(SERIES)], _STYLES[index % len(_STYLES)]
        for points in seeds if len(seeds) > 1 else ():
            axes.plot(*zip(*thin(points, 200), strict=True), color=colour, linewidth=0.5, alpha=0.35)
        mean = thin(_mean(seeds), 400)
        dot = "o" if len(mean) <= 30 else None
        line: dict[str, Any] = {"color": colour, "linestyle": style, "linewidth": 1.8, "marker": dot, "markersize": 4}
        axes.plot(*zip(*mean, strict=True), label=label(arm), **line)
    axes.legend(frameon=False, fontsize=8.5, labelcolor=INK, handlelength=2.6)
    ends = {arm: (_mean(seeds)[-1], len(seeds)) for arm, seeds in sorted(curves.items())}
    said = ", ".join(f"{arm} {last:.4f} ({count} seeds)" for arm, ((_, last), count) in ends.items())
    caption = f"{experiment}: {what}, mean over seeds (thin: each seed); last value {said}"
    name = f"loss-{experiment}-{what}"
    return Plot(name=name, title=f"{experiment}: {what}", caption=caption, svg=to_svg(figure, name, caption))


def step_plots(runs: Mapping[str, RawRun]) -> list[Plot]:
    """Plot where the time of a step went: one bar for each run of at least 8 steps, arms over their seeds as one."""
    groups: dict[str, list[dict[str, float]]] = defaultdict(list)
    for name, run in sorted(runs.items()):
        split = _step_split(run) if _readable(run) else None
        if split is not None:
            match = _ARM.fullmatch(name)
            groups[f"{match['experiment']}.{match['arm']}" if match else name].append(split)
    bars = {
        name: {part: sum(split[part] for split in splits) / len(splits) for part in splits[0]}
        for name, splits in list(groups.items())[:_MOST_BARS]
    }
    return [_step_plot(bars, {name: len(groups[name]) for name in bars})] if bars else []


def _step_split(run: RawRun) -> dict[str, float] | None:
    """Return a run's medians over its steps after the first two: milliseconds of each part, of the rest, in all."""
    rows = run.events_named("step")[_WARM_UP:]
    fields = [field for field, _ in _PARTS]
    if len(rows) + _WARM_UP < MIN_STEPS:
        return None
    values: dict[str, list[float]] = {field: [] for field in (*fields, "seconds")}
    for row in rows:
        for field, found in values.items():
            value = row.get(field)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < LARGEST:
                return None
            found.append(1e3 * float(value))
    split = {part: median(values[field]) for field, part in _PARTS}
    in_all = median(values["seconds"])
    return {**split, "other": max(0.0, in_all - sum(split.values())), "in all": in_all}


def _step_plot(bars: Mapping[str, Mapping[str, float]], seeds: Mapping[str, int]) -> Plot:
    from q4kd.harness.report.svg import INK, PAPER, SERIES, new_figure, to_svg

    parts = [*(part for _, part in _PARTS), "other"]
    figure, axes = new_figure("milliseconds of a step", "", height=1.1 + 0.27 * len(bars))
    left = [0.0] * len(bars)
    for part, colour in zip(parts, SERIES, strict=True):
        widths = [bar[part] for bar in bars.values()]
        axes.barh(range(len(bars)), widths, left=left, color=colour, edgecolor=PAPER, height=0.62, label=part)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.set_yticks(range(len(bars)), [label(name) for name in bars])
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    figure.legend(
        frameon=False, fontsize=8, labelcolor=INK, ncols=5, loc="outside upper left", columnspacing=1.0,
        handlelength=0.9, handletextpad=0.4,
    )  # fmt: skip
    caption = f"Where the time of a step went, in milliseconds: medians over steps of {len(bars)} runs"
    rows = tuple(
        (f"{name} ({seeds[name]} seeds)" if seeds[name] > 1 else name, *(f"{bar[p]:.2f}" for p in (*parts, "in all")))
        for name, bar in bars.items()
    )
    svg, columns = to_svg(figure, "steps", caption), ("run", *parts, "in all")
    return Plot(name="steps", title="Step time", caption=caption, svg=svg, columns=columns, rows=rows)
