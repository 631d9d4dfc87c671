import random

import pytest
from report_bundles import findings_of
from typed_findings import check_result

from q4kd.harness.report.trends import Measure, marks_of, measures_of, spread_of, trends_of


def test_a_run_is_marked_when_it_is_worse_by_more_than_the_runs_before_it_vary() -> None:
    steady = [0.80, 0.81, 0.79, 0.80]
    assert marks_of([*steady, 0.95], lower=True) == ("few", "few", "few", "", "worse")
    assert marks_of([*steady, 0.95], lower=False)[-1] == "better"
    assert marks_of([*steady, 0.82], lower=True)[-1] == ""
    assert marks_of([*steady, 0.60], lower=True)[-1] == "better"


def test_an_old_outlier_hides_no_regression() -> None:
    earlier = [0.80, 0.81, 0.79, 0.80, 5.0, 0.81, 0.79, 0.80, 0.80, 0.81]
    assert marks_of([*earlier, 0.95], lower=True)[-1] == "worse"


def test_equal_values_may_still_round_differently() -> None:
    assert marks_of([1.0, 1.0, 1.0, 1.0, 1.009], lower=True)[-1] == ""
    assert marks_of([1.0, 1.0, 1.0, 1.0, 1.011], lower=True)[-1] == "worse"
    assert marks_of([0.0, 0.0, 0.0, 1e-9], lower=True)[-1] == "worse"


def test_only_the_last_twenty_runs_count() -> None:
    assert marks_of([1.0] * 30 + [2.0] * 21 + [2.0], lower=True)[-1] == ""


@pytest.mark.parametrize(("count", "most"), [(3, 0.015), (4, 0.01), (5, 0.007), (10, 0.007), (20, 0.007)])
def test_noise_alone_is_seldom_marked(count: int, most: float) -> None:
    draw, trials = random.Random(7).gauss, 20_000
    marked = 0
    for _ in range(trials):
        earlier = [draw(100, 5) for _ in range(count)]
        centre = sorted(earlier)[count // 2] if count % 2 else sum(sorted(earlier)[count // 2 - 1 : count // 2 + 1]) / 2
        marked += draw(100, 5) - centre > spread_of(earlier)
    assert 0 < marked / trials < most


def measure(value: float, params: str = "p", key: str = "c::A") -> Measure:
    return Measure(key=key, check="peak", value=value, lower=True, unit="of the way to the bound", params=params)


def test_values_by_other_bounds_or_on_another_machine_are_not_compared() -> None:
    values = [0.5, 0.5, 0.5, 0.5, 0.9]
    bundles = [("m", [measure(value)]) for value in values]
    (trend,) = trends_of(bundles)
    assert trend.marks[-1] == "worse" and trend.sources == (0, 1, 2, 3, 4) and trend.before == 0
    loosened = [*bundles[:4], ("m", [measure(0.9, params="q")])]
    (trend,) = trends_of(loosened)
    assert (trend.values, trend.marks, trend.before) == ((0.9,), ("few",), 4)
    moved = trends_of([*bundles[:4], ("n", [measure(0.9)])])
    assert [(trend.machine, trend.marks[-1]) for trend in moved] == [("m", ""), ("n", "few")]


def test_what_is_measured_is_a_margin_or_a_number_of_known_direction() -> None:
    checks = [
        check_result("parity", margin=0.25),
        check_result("parity", margin=0.5),
        check_result("parity", measured="worst cosine 0.9998 over 96 rows", params={"metric": "cosine"}),
        check_result("improves", measured="margin 0.3946 ± 0.0263 SE over 3 seeds"),
        check_result("table", measured="2 entries, 0 wrong"),
        check_result("parity", margin=0.7, verdict="inconclusive"),
        check_result("parity", margin=1e300),
        check_result("improves", measured="margin 1e999"),
    ]
    found = list(measures_of(findings_of(*checks)))
    assert [(m.check, m.value, m.lower, m.unit) for m in found] == [
        ("parity", 0.25, True, "of the way to the bound"),
        ("parity #2", 0.5, True, "of the way to the bound"),
        ("parity #3", 0.9998, False, "cosine"),
        ("improves", 0.3946, False, "margin"),
    ]
    assert found[0].params == found[1].params != found[2].params
