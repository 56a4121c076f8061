"""Three runs each of what jobs/bench/no_hang.sh runs fifty times, and that it would see a hang."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from no_hang import StoodStill, no_hang

pytestmark = pytest.mark.ranks
NAMES = [
    "acco+exchange.timed=true",
    "diloco",
    "streaming_diloco",
    "parameter_server+exchange.staleness=0",
    "parameter_server+exchange.staleness=2",
    "parameter_server",
    "parameter_server+exchange.staleness=1+exchange.servers=1",
]


@pytest.mark.parametrize("name", NAMES)
def test_no_run_stands_still(name: str, tmp_path: Path) -> None:
    met, stopped = no_hang(name, 3, 60.0, tmp_path, first=int.from_bytes(os.urandom(2)))
    assert met + stopped == 3


def test_a_run_that_stands_still_is_shown_by_its_stacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At a limit that the start of Python alone passes."""
    with pytest.raises(StoodStill, match=r"seed 0: nothing for 2 s[\s\S]*body_runs\.py"):
        no_hang("allreduce", 1, 2.0, tmp_path / "a" if (tmp_path / "a").mkdir() else tmp_path / "a")
