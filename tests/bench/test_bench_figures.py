"""The figures of `hvdllm bench exchange` from marks and records whose answer is known."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from hvdllm.bench import exchange, plot
from hvdllm.bench.figures import FRAME, Measured, Raw, Repetition, figures, idle_rate, rank_speeds, repetition
from hvdllm.cli.bench import exchange_tables
from hvdllm.errors import UserError

BATCH = 4096


def raw(
    *, steps: list[float], compute: float = 0.4, blocked: float = 0.1, flight: float = 0.2, sent: float = 1e6,
    ranks: int = 2, counters: bool = True, idle: float = 0.0, runs: int = 1, tokens: int = BATCH,
) -> Raw:  # fmt: skip
    """steps: seconds before each commit. idle: bytes a second, less frames, that the interface sends beside."""
    marks: list[list[list[Any]]] = []
    for rank in range(ranks):
        now, rows = 100.0 * rank, list[list[Any]]()
        for k, step in enumerate(steps, 1):
            now += step
            packets = 1000 * k
            octets = sent * k + FRAME * packets + idle * (now - 100.0 * rank) if counters else None
            rows.append([now, tokens * k, sent * k, octets, packets if counters else None, 0.5 * k])
        marks.append(rows)
    record = {"compute_s": compute, "blocked_s": blocked, "flight_s": flight}
    return Raw(
        marks,
        [
            [{**record, "loss": 5.0 - 0.1 * k, "tokens": tokens * k} for k in range(1, len(steps) + 1)]
            for _ in range(runs)
        ],
    )


def test_warmup_and_the_last_commit_are_left_out() -> None:
    found = repetition(raw(steps=[9.0, 7.0, 0.5, 0.6, 0.7, 3.0]), 2, 5 * BATCH)
    assert found.step_s == pytest.approx([0.5, 0.6, 0.7]) and found.seconds == pytest.approx(1.8)
    assert found.tokens == 3 * BATCH and found.sent == 3e6 and found.updates == 5 and found.cpu_s == 1.5
    assert found.interface == pytest.approx(3e6) and found.packet == pytest.approx(1000 + FRAME)
    assert found.loss == pytest.approx(5.0 - 0.5), "of the commit that reaches the tokens all are compared at"
    more = repetition(raw(steps=[0.5] * 6, tokens=2 * BATCH), 2, 5 * BATCH)
    assert more.updates == 3 and more.loss == pytest.approx(5.0 - 0.3), "which is earlier where a commit has more"
    assert repetition(raw(steps=[0.5] * 6), 2, 99 * BATCH).updates == 6


@pytest.mark.parametrize("commits", [1, 3])
def test_too_few_commits(commits: int) -> None:
    with pytest.raises(ValueError, match=f"made {commits} commits, too few for 2 of warm-up"):
        repetition(raw(steps=[0.5] * commits), 2, 9)


def test_the_measured_records_are_those_of_the_measured_steps() -> None:
    one = raw(steps=[0.5] * 6)
    for k, record in enumerate(one.records[0]):
        record["compute_s"] = float(k)
    assert repetition(one, 2, 9).compute_s == [2.0, 3.0, 4.0]


def test_ranks_that_train_alone_are_averaged() -> None:
    one = raw(steps=[0.5] * 4, runs=2)
    for record in one.records[1]:
        record["compute_s"] = 0.6
    assert repetition(one, 1, 9).compute_s == pytest.approx([0.5, 0.5])


def test_medians_shares_and_rates() -> None:
    reps = [repetition(raw(steps=[9.0, *steps, 9.0], blocked=0.05), 1, 9) for steps in ([0.5, 0.6], [0.7, 0.8])]
    f = figures(reps, batch_tokens=BATCH)
    assert f.step_ms == pytest.approx(650) and f.compute_ms == pytest.approx(400) and f.flight_ms == pytest.approx(200)
    assert f.hidden == pytest.approx(0.75) and f.sent_mb == pytest.approx(1.0) and f.tokens_per_update == BATCH
    assert f.tokens_per_s == pytest.approx(4 * BATCH / 2.6) and f.cpu_share == pytest.approx(2.0 / 2.6)
    assert f.step_ms_of_repetitions == pytest.approx([550, 750]) and f.bound is None


def test_what_is_kept_of_the_ranks_speeds() -> None:
    """Two ranks alone, one of them four times slower; together they wait for it."""
    alone = raw(steps=[0.5] * 5, runs=2, tokens=1000)
    for mark in alone.marks[1]:
        mark[0] = 100 + 4 * (mark[0] - 100)
    speeds = rank_speeds([repetition(alone, 1, 9)] * 2)
    assert speeds == pytest.approx([2000.0, 500.0])
    f = figures([repetition(raw(steps=[2.0] * 5, tokens=2000), 1, 9)], speeds=speeds)
    assert f.tokens_per_s == pytest.approx(1000) and f.kept == pytest.approx(0.4)
    assert repetition(raw(steps=[0.5] * 5), 1, 9).rank_tokens_per_s == [], "of ranks that train together"
    assert figures([repetition(raw(steps=[0.5] * 5), 1, 9)]).kept is None and rank_speeds([]) == []


def test_nothing_travels_nothing_is_hidden() -> None:
    f = figures([repetition(raw(steps=[0.5] * 5, flight=0.0, blocked=0.0, sent=0.0), 1, 9)], batch_tokens=BATCH)
    assert f.hidden is None and f.communication_ms is None and f.wire_ratio is None


def one_rep(**more: Any) -> list[Repetition]:
    return [repetition(raw(steps=[more.pop("step", 0.5)] * 5, **more), 1, 9)]


def test_the_bound_is_the_larger_of_compute_alone_and_communication() -> None:
    alone, own = one_rep(step=0.45, flight=0.0, tokens=BATCH // 2), one_rep(step=0.5, flight=0.3)
    f = figures(own, alone=alone, batch_tokens=BATCH)
    assert f.communication_ms == pytest.approx(300) and f.bound == pytest.approx(0.5 / 0.45)
    blocking = one_rep(step=1.0, flight=0.6)
    f = figures(own, alone=alone, blocking=blocking, batch_tokens=BATCH)
    assert f.communication_ms == pytest.approx(600) and f.bound == pytest.approx(0.5 / 0.6)
    # Twice the bytes of the blocking exchange take twice its flight; half as many tokens again take that much longer.
    f = figures(one_rep(step=1.5, flight=0.3, sent=2e6), alone=alone, blocking=blocking, batch_tokens=BATCH)
    assert f.communication_ms == pytest.approx(1200) and f.bound == pytest.approx(1.5 / 1.2)
    f = figures(one_rep(step=0.9, tokens=BATCH * 3 // 2), alone=alone, batch_tokens=BATCH)
    assert f.bound == pytest.approx(0.9 / (1.5 * 0.45))


def test_bytes_on_the_wire_less_frames_and_idle_talk() -> None:
    quiet = one_rep(step=0.5, sent=0.0, idle=4e4, flight=0.0)
    assert idle_rate(quiet) == pytest.approx(4e4)
    own = one_rep(step=0.5, flight=0.2)
    assert figures(own, idle=4e4).wire_mb == pytest.approx(1.0 - 0.3 * 4e4 / 1e6), "while nothing travels: 0.3 s a step"
    assert figures(own).wire_ratio == pytest.approx(1.0)
    assert figures(own, own_interface=False).wire_mb is None
    bare = figures(one_rep(counters=False))
    assert bare.wire_mb is None and bare.packet_bytes is None and idle_rate(one_rep(counters=False)) == 0.0


# ------------------------------------------------------------------ what is shown
FIGURES = Measured(
    step_ms=983.4, compute_ms=490.0, blocked_ms=478.0, flight_ms=480.0, hidden=0.00417, communication_ms=480.0,
    bound=2.0271, sent_mb=11.44, wire_mb=11.4514, wire_ratio=1.001, loss=3.21987, updates=12.0,
    sum_ms=402.4, sum_mb=11.44,
    tokens_per_update=4864.0, tokens_per_s=4164.6, cpu_share=0.5, packet_bytes=1400.0, batch_ms=983.6,
)  # fmt: skip


def result() -> dict[str, Any]:
    ok = {"refused": None, "failed": None, "figures": asdict(FIGURES)}
    alone = asdict(FIGURES) | {"bound": None, "hidden": None, "communication_ms": None, "step_ms": 485.0}
    return {
        "asked": {"ranks": 2, "hosts": 2, "link": "200mbit"}, "batch_tokens": BATCH, "threads": 1,
        "cases": {
            "compute alone": {"kind": "alone", **ok, "figures": alone},
            "allreduce": {"kind": "together", **ok},
            "aco": {"kind": "together", "refused": "there is no exchange=aco", "failed": None},
        },
    }  # fmt: skip


def test_the_tables() -> None:
    times, traffic, learning = exchange_tables(result())
    assert times[1:] == [
        ("compute alone", "485", "490", "-", "-", "-", "-", "-"),
        ("allreduce", "983", "490", "478", "480", "0%", "2.027", "984"),
    ]
    assert traffic[1:] == [("allreduce", "11.440", "11.451", "1.001", "402", "11.440")]
    assert learning[1:] == [("allreduce", "3.2199", "12", "4,864", "4,165")]


def test_the_tables_of_slowed_ranks() -> None:
    found = result() | {
        "rank_tokens_per_s": {"compute alone": [2000.0, 2000.0], "compute alone, slowed": [2000.0, 500.0]}
    }
    found["cases"]["allreduce"]["figures"] |= {"tokens_per_s": 990.0, "kept": 0.396}
    *_, alone, kept = exchange_tables(found)
    assert alone[1:] == [
        ("compute alone", "2,000", "2,000", "4,000"), ("compute alone, slowed", "2,000", "500", "2,500"),
    ]  # fmt: skip
    assert kept[1:] == [("what the slowest allows, in equal shares", "1,000", "40%"), ("allreduce", "990", "40%")]


def test_a_busy_machine_is_said() -> None:
    said = result()
    assert "had 50% of its cores" in str(exchange.busy(said))
    said["cases"]["compute alone"]["figures"]["cpu_share"] = 0.97
    assert exchange.busy(said) is None
    assert exchange.busy({"cases": {}, "threads": None}) is None


def test_a_bar_ends_at_the_number_behind_it() -> None:
    found = result()
    assert plot.bars(found) == [
        ("compute alone", 485.0, 0.0, 0.0, 0.0),
        ("allreduce", 488.0, 2.0, 478.0, pytest.approx(15.4)),
    ]
    found["cases"]["allreduce"]["figures"]["step_ms"] = 484.0  # medians of parts need not add up to that of the whole
    assert plot.bars(found)[1][1:] == pytest.approx((244.0, 1.0, 239.0, 0.0))
    assert plot.note(result(), "allreduce") == "983 ms, 0% hidden, 4,864 tokens"
    assert plot.title(result()) == "One step of 4,096 tokens: 2 ranks, 1 thread each, 2 hosts joined at 200 Mbit/s"


def test_the_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plot.check(tmp_path / "a.png")
    plot.draw(result(), tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"
    plot.draw({**result(), "cases": {}}, tmp_path / "nothing.png")
    with pytest.raises(UserError, match="a file that ends in"):
        plot.check(tmp_path / "a.txt")
    plot.check(tmp_path / "b" / "a.png")
    assert (tmp_path / "b").is_dir()
    with pytest.raises(UserError, match="cannot be made"):
        plot.check(tmp_path / "a.png" / "b.png")


def test_without_matplotlib_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(UserError, match="--plot needs matplotlib"):
        plot.check(tmp_path / "a.png")
