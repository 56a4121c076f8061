"""Three runs each of what jobs/bench/no_hang.sh runs fifty times, and that it would see a hang."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from no_hang import StoodStill, no_hang

pytestmark = pytest.mark.ranks
SERVER = "parameter_server"
NAMES = {
    "gloo": ["acco+exchange.timed=true", "local_sgd", "diloco", "streaming_diloco", "fedavg"],
    "mpi": [
        *(f"{SERVER}+exchange.staleness={s}" for s in (0, 2)),
        SERVER,
        *(f"{SERVER}+exchange.staleness={s}+exchange.servers=1" for s in (0, 1)),
        f"{SERVER}+exchange.servers=1",
    ],
}


@pytest.mark.parametrize("launcher", NAMES)
def test_no_run_stands_still(launcher: str, tmp_path: Path) -> None:
    ends = no_hang(NAMES[launcher], 3, 60.0, tmp_path, first=int.from_bytes(os.urandom(2)))
    assert all(ends[name]["budget"] + ends[name]["stop"] == 3 for name in NAMES[launcher]), ends


def test_a_run_that_stands_still_is_shown_by_its_stacks(tmp_path: Path) -> None:
    """Rank 1 sleeps in its third act, rank 0 waits for it."""
    with pytest.raises(StoodStill) as error:
        no_hang(["allreduce"], 1, 10.0, tmp_path, hang=[1, 3])
    said = str(error.value)
    assert "allreduce, seed 0: nothing for 10 s" in said
    assert "meddle.py" in said and "in acting" in said and "hvd.py" in said and "in land" in said
