"""Durations as they are shown."""

from __future__ import annotations

import math

from hvdllm.durations import FORETOLD_S, duration, left


def test_durations() -> None:
    assert [duration(x) for x in (0.4, 59.4, 60.0, 3600.0, 7500.0)] == [
        "0 s", "59 s", "1 min 00 s", "1 h 00 min", "2 h 05 min",
    ]  # fmt: skip


def test_what_is_left_is_foretold_where_it_is_known() -> None:
    assert left(100.0, 2.0) == "50 s left"
    for missing, rate in ((0.0, 2.0), (-5.0, 2.0), (100.0, 0.0), (100.0, math.nan), (FORETOLD_S + 1, 1.0)):
        assert left(missing, rate) == ""
