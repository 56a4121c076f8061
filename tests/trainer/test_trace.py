"""The trace of some steps: what is kept, how clocks are compared, what stands in the file."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from hvdllm.config.check import parse_steps
from hvdllm.device import Mark
from hvdllm.errors import RunError, UserError
from hvdllm.trainer.trace import LANES, Trace, ahead
from hvdllm.world import virtual
from hvdllm.world.single import SingleWorld

CPU = torch.device("cpu")


def test_parse_steps() -> None:
    assert parse_steps("20:24") == (20, 24) and parse_steps(" 0 : 1 ") == (0, 1)


@pytest.mark.parametrize("text", ["", "20", "20:", ":24", "a:b", "24:20", "20:20", "-1:3", "1:2:3", "1.5:2", "²:3"])
def test_nonsense_is_refused_by_its_words(text: str) -> None:
    with pytest.raises(UserError, match="no range of steps") as said:
        parse_steps(text)
    assert f"`{text}`" in str(said.value)


def test_the_file_of_three_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rank's clock is an hour off; a step takes 10 s, of which the last 3 s travel and the last 1 s blocks."""
    hours, base, real = [0.0, 3600.0, -3600.0], 5000.0, Trace._meet

    def meet(own: Trace) -> tuple[float, float]:
        real(own)
        return base + hours[own.world.rank] - 1e-5, base + hours[own.world.rank] + 1e-5

    monkeypatch.setattr(Trace, "_meet", meet)

    def body(world: Any) -> int:
        offset = hours[world.rank]
        own = Trace((2, 4), world, CPU)
        for step in range(6):
            begin = base + offset + 10 * step + world.rank
            own.note(step, "compute", begin, begin + 9)
            own.note(step, "flight", begin + 7, begin + 10)
            own.note(step, "blocked", begin + 9, begin + 10)
        return own.write(tmp_path / "trace.json")

    assert virtual.run(3, body) == [18] * 3
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    names = {(e["name"], e["pid"], e.get("tid")): e["args"] for e in events if e["ph"] == "M"}
    done = [e for e in events if e["ph"] == "X"]
    assert len(done) == 18 and len(names) == 3 * (2 + 2 * 3)
    assert {e["args"]["step"] for e in done} == {2, 3}
    for rank in range(3):
        assert names["process_name", rank, None] == {"name": f"rank {rank}"}
        for lane, name in enumerate(LANES):
            assert names["thread_name", rank, lane] == {"name": name}
            mine = [e for e in done if (e["pid"], e["tid"]) == (rank, lane)]
            start = {"compute": 0, "flight": 7, "blocked": 9}[name] + rank
            assert [e["ts"] for e in mine] == pytest.approx([start * 1e6, (start + 10) * 1e6], abs=1)
            assert [e["dur"] for e in mine] == pytest.approx(
                [{"compute": 9e6, "flight": 3e6, "blocked": 1e6}[name]] * 2
            )
            assert {e["name"] for e in mine} == {name}
    assert [e["ts"] for e in done] == sorted(e["ts"] for e in done) and done[0]["ts"] == 0


def test_marks_are_told_on_the_hosts_clock(tmp_path: Path) -> None:
    own = Trace((1, 2), SingleWorld(), CPU)
    begin, end = Mark(CPU), Mark(CPU)
    end.time = begin.time + 2.0
    own.note(1, "compute", begin, end)
    own.note(1, "blocked", begin.time + 1.0, end)
    assert own.write(tmp_path / "a.json") == 2
    first, second = (e for e in json.loads((tmp_path / "a.json").read_text())["traceEvents"] if e["ph"] == "X")
    assert (first["name"], second["name"]) == ("compute", "blocked")
    assert first["dur"] == pytest.approx(2e6) and second["ts"] == pytest.approx(1e6)


def test_nothing_is_kept_of_other_steps_and_nothing_written_without_a_trace(tmp_path: Path) -> None:
    own = Trace((3, 5), SingleWorld(), CPU)
    assert [own.wants(step) for step in range(2, 6)] == [False, True, True, False]
    for step in (0, 2, 5):
        own.note(step, "compute", 0.0, 1.0)
    assert own._noted == [] and own._base is None
    none = Trace(None, SingleWorld(), CPU)
    none.note(0, "compute", 0.0, 1.0)
    assert none._noted == [] and none.write(tmp_path / "none.json") == 0
    assert not list(tmp_path.iterdir())


def test_a_rank_without_intervals_does_not_stand_in_the_way(tmp_path: Path) -> None:
    def body(world: Any) -> int:
        own = Trace((0, 1), world, CPU)
        if world.rank == 1:
            own.note(0, "flight", 1.0, 2.0)
        return own.write(tmp_path / "a.json")

    assert virtual.run(2, body) == [1, 1]
    events = json.loads((tmp_path / "a.json").read_text())["traceEvents"]
    assert [(e["pid"], e["ts"], e["dur"]) for e in events if e["ph"] == "X"] == [(1, 0.0, 1e6)]


def test_clocks_are_compared_within_the_fastest_sum() -> None:
    """True offset 5 s; a rank enters late or leaves late by up to 1 s, but in one sum both are within 1 ms."""
    draw = torch.Generator().manual_seed(0)
    own, reference = [], []
    for round in range(8):
        slow = 1e-3 if round == 5 else 1.0
        entered = 10.0 * round + slow * torch.rand(2, generator=draw, dtype=torch.float64)
        left = entered.max() + slow * torch.rand(2, generator=draw, dtype=torch.float64)
        own.append((float(entered[0]) + 5, float(left[0]) + 5))
        reference.append((float(entered[1]), float(left[1])))
    assert ahead(own, reference) == pytest.approx(5, abs=1e-3)
    assert ahead(reference, own) == pytest.approx(-5, abs=1e-3)
    assert ahead(own, own) == 0


def test_a_disk_that_refuses_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"cannot write the trace to .*nowhere"):
        trace = Trace((0, 1), SingleWorld(), CPU)
        assert trace.write(tmp_path / "nowhere" / "trace.json") == 0, "nothing was noted, so nothing is written"
        trace.note(0, "compute", 0.0, 1.0)
        trace.write(tmp_path / "nowhere" / "trace.json")


def test_an_unknown_lane_is_an_error_of_ours() -> None:
    with pytest.raises(ValueError, match="not in tuple"):
        Trace((0, 1), SingleWorld(), CPU).note(0, "sleep", 0.0, 1.0)
