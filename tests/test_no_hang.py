"""Three runs each of what jobs/bench/no_hang.sh runs fifty times, and that it would see a hang."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from no_hang import StoodStill, no_hang

pytestmark = pytest.mark.ranks
NAMES = [
    pytest.param("acco+exchange.timed=true", marks=pytest.mark.thorough),
    pytest.param("diloco", marks=pytest.mark.thorough),
    "streaming_diloco",
    pytest.param("parameter_server+exchange.staleness=0", marks=pytest.mark.thorough),
    "parameter_server+exchange.staleness=2",
    "parameter_server",
    "parameter_server+exchange.staleness=1+exchange.servers=1",
]


@pytest.mark.parametrize("name", NAMES)
def test_no_run_stands_still(name: str, tmp_path: Path) -> None:
    met, stopped = no_hang(name, 3, 60.0, tmp_path, first=int.from_bytes(os.urandom(2)))
    assert met + stopped == 3


def test_a_run_that_stands_still_is_shown_by_its_stacks(tmp_path: Path) -> None:
    """Rank 1 sleeps in its third act, rank 0 waits for it."""
    with pytest.raises(StoodStill) as error:
        no_hang("allreduce", 1, 10.0, tmp_path, hang=[1, 3])
    said = str(error.value)
    assert "allreduce, seed 0: nothing for 10 s" in said
    assert "meddle.py" in said and "in acting" in said and "hvd.py" in said and "in land" in said
