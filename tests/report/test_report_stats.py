"""Interpolation, intervals and the paired test against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest

from hvdllm.report import stats
from hvdllm.report.read import CurvePoint, along

pytest.importorskip("scipy", reason="the extra `report` is not installed")

T2 = 4.302652729696142  # of Student's t, two-sided 95 %, 2 degrees of freedom: any table


def test_a_crossing_lies_on_the_line_between_two_evaluations() -> None:
    found = stats.crossing([8.0, 6.0, 5.0], 5.25)
    assert found == stats.Crossing(2, 0.75)
    assert stats.read_off([100.0, 200.0, 300.0], found) == pytest.approx(275)
    assert stats.read_off([10.0, None, 30.0], found) is None, "not recorded before it"
    assert stats.crossing([8.0, 6.0, 5.0], 4.9) is None
    assert stats.crossing([8.0, 6.0, 7.0, 5.0], 6.0) == stats.Crossing(1, 1.0), "the first one, and exactly at a point"
    assert stats.read_off([None, 200.0, 1.0, 1.0], stats.Crossing(1, 1.0)) == 200


def test_a_crossing_before_the_first_evaluation_is_a_bound() -> None:
    found = stats.crossing([4.0, 3.0], 5.0)
    assert found is not None and found.bound and stats.read_off([7.0, 9.0], found) == 7


def test_no_line_begins_at_a_loss_that_is_not_finite() -> None:
    found = stats.crossing([math.inf, 4.0], 5.0)
    assert found == stats.Crossing(1, 1.0) and stats.read_off([7.0, 9.0], found) == 9
    assert stats.loss_at([CurvePoint(1, math.inf), CurvePoint(3, 4.0)], [1, 3], 2) == math.inf


def test_loss_at_a_place() -> None:
    points = [CurvePoint(10, 8.0), CurvePoint(20, 6.0), CurvePoint(30, 5.0)]
    xs = [1.0, 2.0, 4.0]
    assert stats.loss_at(points, xs, 1.5) == pytest.approx(7.0) and stats.loss_at(points, xs, 3.0) == pytest.approx(5.5)
    assert stats.loss_at(points, xs, 4.0) == 5.0
    assert stats.loss_at(points, xs, 0.5) is None and stats.loss_at(points, xs, 4.5) is None, "nothing is extrapolated"


def test_what_is_counted_between_records() -> None:
    curve = [(0.0, 0.0), (100.0, 50.0), (200.0, 70.0)]
    assert along(curve, 50) == 25 and along(curve, 150) == 60
    assert along(curve, 300) == pytest.approx(90), "one more interval"
    assert along(curve, 301) is None and along([(0.0, 0.0)], 5) is None


def test_interval_of_a_mean() -> None:
    found = stats.spread([1.0, 2.0, 3.0])  # standard deviation 1
    assert found is not None and found.mean == 2 and found.half == pytest.approx(T2 / math.sqrt(3)) and found.n == 3
    for few in ([5.0], [5.0, 9.0]):
        assert stats.spread(few) == stats.Spread(sum(few) / len(few), None, None, len(few)), "no interval of so few"
    assert stats.spread([]) is None
    assert stats.spread([5.0, math.inf]) == stats.Spread(math.inf, None, None, 2)


def test_paired_ratio() -> None:
    reference = {"0": 10.0, "1": 11.0, "2": 9.0, "7": 1.0}
    other = {"2": 4.5, "1": 5.0, "0": 4.0, "8": 99.0}
    logs = [math.log(2.5), math.log(2.2), math.log(2.0)]  # by seed, whatever the order; 7 and 8 have no partner
    mean = sum(logs) / 3
    deviation = math.sqrt(sum((v - mean) ** 2 for v in logs) / 2)
    half = T2 * deviation / math.sqrt(3)
    found = stats.paired(reference, other, ratio=True)
    assert found is not None and found.pairs == 3 and found.value == pytest.approx(math.exp(mean))
    assert (found.low, found.high) == pytest.approx((math.exp(mean - half), math.exp(mean + half)))
    t = mean / (deviation / math.sqrt(3))
    assert found.p == pytest.approx(1 - t / math.sqrt(t * t + 2)), "Student's t of two degrees, in closed form"
    assert stats.holm([found])[0].significant


def test_paired_difference() -> None:
    found = stats.paired({"0": 5.0, "1": 5.2, "2": 7.0}, {"0": 4.0, "1": 4.4, "2": 6.1}, ratio=False)
    assert found is not None and found.value == pytest.approx(-0.9)
    half = T2 * 0.1 / math.sqrt(3)  # differences -1, -.8, -.9
    assert (found.low, found.high) == pytest.approx((-0.9 - half, -0.9 + half))


def test_a_tie_is_no_difference() -> None:
    same = {"0": 10.0, "1": 11.0, "2": 12.0}
    found = stats.paired(same, dict(same), ratio=True)
    assert found is not None and (found.low, found.value, found.high, found.p) == (1, 1, 1, 1)
    rounded = stats.paired(same, {seed: value * (1 + 1e-15) for seed, value in same.items()}, ratio=True)
    assert rounded is not None and rounded.p == 1
    swung = stats.paired(same, {"0": 11.0, "1": 10.0, "2": 12.5}, ratio=True)
    assert swung is not None and swung.low is not None and swung.high is not None
    assert swung.low < 1 < swung.high and swung.p > 0.05


def test_the_noise_is_that_of_the_differences() -> None:
    """Each seed gains 5 % within .5 %, while the seeds themselves lie 20 % apart."""
    reference = {"0": 10.0, "1": 12.0, "2": 14.0}
    gains = {"0": 1.05, "1": 1.055, "2": 1.045}
    found = stats.paired(reference, {seed: value / gains[seed] for seed, value in reference.items()}, ratio=True)
    assert found is not None and stats.holm([found])[0].significant


def of(p: float, pairs: int = 3) -> stats.Paired:
    """A difference whose test has this p-value, of two degrees of freedom: p = 1 - t / √(t² + 2)."""
    t = (1 - p) * math.sqrt(2 / (1 - (1 - p) ** 2))
    return stats.Paired(t, 1.0, pairs, ratio=False, p=p)


def test_holm_steps_down_until_the_first_that_fails() -> None:
    found = stats.holm([of(0.03), of(0.001), of(0.012), of(0.6, pairs=2), of(0.02)])
    assert [test.significant for test in found] == [True, True, True, False, True], ".001 < .05/4, .012 < .05/3, …"
    assert [round(test.alpha, 6) for test in found] == [0.05, 0.0125, 0.016667, 0.05, 0.025]
    assert stats.holm([of(0.03)])[0].significant, "alone"
    stopped = stats.holm([of(0.026), of(0.01), of(0.03), of(0.04)])
    assert [test.significant for test in stopped] == [False, True, False, False]
    assert stopped[3].alpha == stopped[0].alpha == pytest.approx(0.05 / 3), "and behind it nothing more, at its level"


def test_an_interval_leaves_out_no_difference_exactly_where_one_is_claimed() -> None:
    for test in stats.holm([of(p) for p in (0.0001, 0.004, 0.009, 0.02, 0.04, 0.3)]):
        assert test.low is not None and test.significant == (test.low > 0)


def test_one_seed_tests_nothing() -> None:
    found = stats.paired({"0": 10.0}, {"0": 5.0}, ratio=True)
    assert found is not None and found.value == pytest.approx(2) and not found.testable and found.low is None
    two = stats.paired({"0": 10.0, "1": 10.0}, {"0": 5.0, "1": 4.9}, ratio=True)
    assert two is not None and not two.testable and two.low is None and not stats.holm([two])[0].significant
    assert stats.paired({"0": 10.0}, {"1": 5.0}, ratio=True) is None, "no seed in common"
    assert stats.paired({"0": 10.0}, {"0": 0.0}, ratio=True) is None
    assert stats.paired({"0": 1.0, "1": 2.0}, {"0": math.inf, "1": 1.0}, ratio=False) is None
