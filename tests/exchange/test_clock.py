"""Exchanges under the simulated clock: the same again bit for bit, whatever the machine does."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

import pytest
import rig
import torch
from clock_kit import BYTES, SGD, slowed, sums, train
from launch import BATCH, curve, records, runs, same_bits, words_of
from torch import nn

from hvdllm.exchange import parts as exchanges
from hvdllm.world.hub import Links


def equal(one: list[rig.Rig], other: list[rig.Rig]) -> bool:
    same = all(a.final.equal(b.final) and len(a.commits) == len(b.commits) for a, b in zip(one, other, strict=True))
    return same and all(
        (x.tokens, x.before and (x.before.loss_sum, x.before.compute_s, x.before.blocked_s, x.before.micro_batches))
        == (y.tokens, y.before and (y.before.loss_sum, y.before.compute_s, y.before.blocked_s, y.before.micro_batches))
        for a, b in zip(one, other, strict=True)
        for x, y in zip(a.commits, b.commits, strict=True)
    )


def restless(seed: int) -> Any:
    """The loss, on a machine that now and then does something else."""
    draw = random.Random(seed)

    def cost(model: nn.Module, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        time.sleep(draw.random() ** 8 / 100)
        return rig.loss(model, x, t)

    return cost


EXCHANGES = {
    "timed": exchanges.Acco(timed=True),
    "acco": exchanges.Acco(),
    "delayed": exchanges.Delayed(warmup_tokens=0),
    "by speed": exchanges.LocalSGD(local_steps=4, warmup_tokens=0, by_speed=True),
    "streaming": exchanges.StreamingDiLoCo(local_steps=6, fragments=2, delay=1, outer_lr=0.5),
}


@pytest.mark.parametrize("name", EXCHANGES)
def test_many_ranks_repeat_bit_for_bit(name: str) -> None:
    """Speeds all different, a slow link, an uneasy machine. Caught: marks that read the host's clock."""
    n = 10 if name == "timed" else 6
    draws = [0.5 + random.Random(rank).random() for rank in range(n)]
    links = Links(BYTES, 0.02)
    one, other = (train(n, 6, EXCHANGES[name], draws.__getitem__, links=links, cost=restless(seed)) for seed in (1, 2))
    assert equal(one, other)
    if name == "by speed":
        taken = [run.taken for run in one]
        assert min(taken) < max(taken) and taken.index(max(taken)) == draws.index(max(draws))
    if name == "timed":
        assert len(set(sums(one[0], "micro_batches"))) > 4, "all at their own pace"
        slower = train(n, 2, EXCHANGES["timed"], lambda rank: draws[rank] / 2, links=links)
        assert not slower[0].weights[1].equal(one[0].weights[1]), "another speed is another run"


@pytest.mark.parametrize("name", ["acco", "delayed", "streaming"])
def test_the_clock_changes_no_weight_of_what_closes_by_count(name: str) -> None:
    timed = train(4, 8, EXCHANGES[name], slowed(1), links=Links(BYTES / 2, 0.1))
    plain = rig.train(EXCHANGES[name], 4, 8, optim=SGD)
    assert all(a.final.equal(b.final) for a, b in zip(timed, plain, strict=True))


@pytest.mark.parametrize("name", ["timed", "acco", "delayed"])
def test_resumed_it_goes_on_the_same_way_twice(name: str) -> None:
    """Closed by count, also as if it had not been stopped; timed, what flew has landed at a stop."""
    links = Links(BYTES / 2, 0.1)
    stopped = train(4, 9, EXCHANGES[name], slowed(1), links=links, stop_at=4, settle=False)
    states = [run.state for run in stopped]
    one, other = (train(4, 9, EXCHANGES[name], slowed(1), links=links, states=states) for _ in range(2))
    assert equal(one, other) and one[0].commits[0].step == 5
    if name != "timed":
        whole = train(4, 9, EXCHANGES[name], slowed(1), links=links)
        assert all(a.final.equal(b.final) for a, b in zip(whole, one, strict=True))


def test_on_a_simulated_clock_a_whole_run_repeats_with_its_records(tmp_path: Path) -> None:
    """All but what the host's clock says: CPU seconds. Stopped and resumed it goes on with the same clock."""
    words = ["world=virtual", "world.size=5", "world.tokens_per_s=1000", "world.speed_spread=0.4", "world.jitter=0.2",
             "world.bandwidth=1mbit", "world.latency_ms=3", "exchange=acco_timed", "micro_batch=1", "world.slow=2:8",
             f"eval_every={4 * BATCH}", f"audit_every={4 * BATCH}", "trace_steps=2:4"]  # fmt: skip
    specs = [{"words": words_of(tmp_path, name, 14, *words)} for name in "ab"]
    runs([*specs, {"words": words_of(tmp_path, "c", 14, *words, "seed=1")}], 1, tmp_path)
    a, b, c = (tmp_path / "runs" / name for name in "abc")
    assert same_bits(a, b) and curve(a) != curve(c)
    host = ("cpu_s_per_token",)
    one, other = ([{k: v for k, v in r.items() if k not in host} for r in records(run, "commit")] for run in (a, b))
    assert one == other and records(a, "eval") == records(b, "eval")
    assert all(audit["replicas_agree"] for audit in records(a, "audit"))
    assert records(a, "run")[0]["clock"] == "simulated" and "time      simulated: " in (a / "log.txt").read_text()
    done, took = ([sum(r[key][k] for r in one) for k in range(5)] for key in (
        "micro_batches_by_rank", "compute_s_by_rank",
    ))  # fmt: skip
    speeds = [count / seconds for count, seconds in zip(done, took, strict=True)]
    assert speeds.index(min(speeds)) == 2 and not records(a, "event"), "nobody waits, so nobody is named"
    seconds = records(a, "end")[-1]["seconds"]
    assert seconds < 14 * BATCH / 1000, "simulated: five ranks of about 1,000 tokens/s"
    assert (a / "trace.json").read_text() == (b / "trace.json").read_text()
    runs([{"words": words_of(tmp_path, name, 24, *words)} for name in "ab"], 1, tmp_path)
    assert same_bits(a, b) and records(a, "end")[-1]["seconds"] > seconds
    lock = [*words, "exchange=allreduce"]
    runs([{"words": words_of(tmp_path, "d", 14, *lock)}], 1, tmp_path)
    (event,) = records(tmp_path / "runs" / "d", "event")
    assert event["straggler"] == 2 and event["what"] in (tmp_path / "runs" / "d" / "log.txt").read_text()


@pytest.mark.parametrize("exchange", [exchanges.Delayed(warmup_tokens=0), exchanges.Acco()], ids=["delayed", "acco"])
def test_flights_that_overlap_are_booked_once(exchange: Any) -> None:
    """On a link far slower than compute something is always travelling: a second of flight a second, and no more,
    although each round is launched before the one before has landed."""
    out = train(2, 12, exchange, lambda rank: 100.0, links=Links(400.0))[0]
    reports = [commit.before for commit in out.commits if commit.before][3:]
    for report in reports:
        for rank in range(2):
            passed = report.compute_s[rank] + report.blocked_s[rank]
            assert 0.8 * passed < report.flight_s[rank] <= 1.0001 * passed
