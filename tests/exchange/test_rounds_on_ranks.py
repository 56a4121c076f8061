"""Exchanges on real ranks: the exact ones equal one process, the others equal their virtual twins, which
test_<exchange>.py holds against plain recursions. In fp64, different data on each rank, ragged counts, clipping.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from launch import BATCH, losses, records, runs, same_bits, weights, words_of

from hvdllm.device import usable_cores

pytestmark = pytest.mark.ranks
STEPS = 8
FP64 = ["precision=fp64", "schedule=cosine", "optim.clip=1.9", "model.positions=learned", f"audit_every={2 * BATCH}"]
LATE = ["exchange=delayed", f"exchange.warmup_tokens={2 * BATCH}"]
EXACT = {
    "allreduce": ["exchange=allreduce"],
    "sharded": ["exchange=sharded"],
    "horovod": ["exchange=horovod", "exchange.bucket_mb=null"],
}
EACH = ["exchange=ddp", "exchange.sync=micro_batch", "micro_batch=7"]  # 2, 1 and 1 micro-batches on three ranks
CAST = {  # by the references' own libraries
    "horovod-fp16": [*EXACT["horovod"], "wire=fp16"],
    "ddp-fp16": ["exchange=ddp", "wire=fp16"],
    "ddp-bf16": ["exchange=ddp", "wire=bf16"],
    "ddp-powersgd": [
        "exchange=ddp",
        "exchange.bucket_mb=null",
        "wire=powersgd",
        f"wire.warmup_tokens={2 * BATCH}",
        "wire.rank=2",
    ],
}
OTHERS = {
    "delayed": LATE,
    "compensated": [*LATE, "exchange.compensation=0.5"],
    "acco": ["exchange=acco", "trace_steps=4:6"],
    "acco-int8": ["exchange=acco", "wire=int8"],
    "delayed-powersgd": [*LATE, "wire=powersgd", f"wire.warmup_tokens={2 * BATCH}", "wire.rank=2"],
    "sharded-fp16": ["exchange=sharded", "wire=fp16"],
    "allreduce-bf16": ["wire=bf16"],
    "allreduce-topk": ["wire=topk", "wire.warmup_tokens=0", "wire.density=0.1"],
    "allreduce-sign": ["wire=sign", f"wire.warmup_tokens={2 * BATCH}", f"optim.freeze_tokens={2 * BATCH}"],
}  # fmt: skip
AT_TWO = {"compensated", "allreduce-topk", "allreduce-sign", "ddp-fp16", "ddp-bf16"}  # alone


def at(n: int, names: Iterable[str]) -> list[str]:
    return [name for name in names if n == 2 or name not in AT_TWO]


def at_two_and_three(names: Iterable[str]) -> list[tuple[str, int]]:
    return [(name, n) for n in (2, 3) for name in at(n, names)]


def close(run: Path, other: Path, atol: float) -> None:
    a, b = weights(run), weights(other)
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=atol, msg=lambda m, k=name: f"{run.name}, {k}: {m}")
    assert losses(run) == pytest.approx(losses(other), rel=1e-8), run.name
    assert len(losses(run)) == STEPS


@pytest.fixture(scope="module")
def tmp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All over Horovod at 2 and 3 ranks, some over torch, the two-host ones at 4; and their virtual twins."""
    tmp = tmp_path_factory.mktemp("ranks")

    def spec(name: str, words: list[str], *more: str) -> dict[str, list[str]]:
        return {"words": words_of(tmp, name, STEPS, *FP64, *words, *more)}

    virtual = [spec("alone", [])]
    for n in (2, 3):
        every = {**EXACT, **OTHERS, "horovod-fp16": CAST["horovod-fp16"]}
        here = {name: every[name] for name in at(n, every)}
        here |= {"adasum": ["exchange.reduction=adasum"]} if n == 2 else {}
        runs([spec(f"{name}-{n}", words) for name, words in here.items()], n, tmp)
        over_torch = {
            "ddp": ["exchange=ddp"],
            "ddp-each": EACH,
            **{name: words for name, words in CAST.items() if name.startswith("ddp")},
            "torch-sharded": EXACT["sharded"],
            "torch-acco-int8": OTHERS["acco-int8"],
        }
        specs = [spec(f"{name}-{n}", over_torch[name], "world=torch") for name in at(n, over_torch)]
        runs(specs, n, tmp, "gloo" if n == 2 else "torchrun")
        size = ["world=virtual", f"world.size={n}"]
        twins = {name: words for name, words in here.items() if name not in {**EXACT, **CAST}}
        virtual += [spec(f"{name}-{n}-virtual", words, *size) for name, words in twins.items()]
    both = {"hierarchical": [], "hierarchical-acco": ["exchange=acco", "wire=int8"]}
    runs([spec(f"{name}-4", w, "wire.hierarchical=true") for name, w in both.items()], 4, tmp, "real two hosts")
    size = ["world=virtual", "world.size=4", "world.hosts=2"]
    virtual += [spec(f"{name}-4-virtual", w, "wire.hierarchical=true", *size) for name, w in both.items()]
    runs(virtual, 1, tmp)
    return tmp / "runs"


@pytest.mark.parametrize("name", ["allreduce", "sharded", "horovod", "ddp", "ddp-each", "torch-sharded"])
@pytest.mark.parametrize("n", [2, 3])
def test_the_exact_ones_equal_one_process(name: str, n: int, tmp: Path) -> None:
    close(tmp / f"{name}-{n}", tmp / "alone", 1e-9)


@pytest.mark.parametrize(("name", "n"), at_two_and_three(CAST))
def test_what_the_references_cast_stays_near(name: str, n: int, tmp: Path) -> None:
    alone, cast = losses(tmp / "alone"), losses(tmp / f"{name}-{n}")
    assert cast != alone and cast == pytest.approx(alone, rel=0.03 if "powersgd" in name else 2e-3)
    sent = [record["bytes_sent"] for record in records(tmp / f"{name}-{n}", "commit")]
    whole = records(tmp / f"ddp-{n}", "commit")[-2]["bytes_sent"]
    assert sent[-2] < 0.6 * whole and ("powersgd" not in name or sent[1] > 0.9 * whole), "exact in the warm-up"


def test_hierarchical_equals_one_process(tmp: Path) -> None:
    close(tmp / "hierarchical-4", tmp / "alone", 1e-9)


@pytest.mark.parametrize(("name", "n"), [*at_two_and_three(OTHERS), ("adasum", 2)])
def test_virtual_ranks_give_the_curve_of_real_ones(name: str, n: int, tmp: Path) -> None:
    """Up to the order of sums, which a code with its roundings may turn into a step of its grid."""
    loose = "-" in name
    close(tmp / f"{name}-{n}", tmp / f"{name}-{n}-virtual", 1e-4 if loose else 1e-9)
    if name == "acco-int8":
        close(tmp / f"torch-acco-int8-{n}", tmp / f"{name}-{n}-virtual", 1e-4)
    if n == 3:
        close(tmp / "hierarchical-acco-4", tmp / "hierarchical-acco-4-virtual", 1e-4)


def test_they_are_different_exchanges(tmp: Path) -> None:
    """A comparison that cannot fail would let an option be ignored."""
    ends = {name: tuple(losses(tmp / f"{name}-2")) for name in (*OTHERS, "allreduce", "adasum")}
    assert len(set(ends.values())) == len(ends)


def test_what_each_reports(tmp: Path) -> None:
    for name in (*EXACT, *OTHERS, "ddp", "ddp-each", "adasum"):
        run = tmp / f"{name}-2"
        commits, (end,) = records(run, "commit"), records(run, "end")
        assert [record["tokens"] for record in commits] == [BATCH * (k + 1) for k in range(STEPS)], name
        late = "delayed" in name or name == "compensated"
        for record in commits:
            # Nothing lands in the round where the delay begins.
            assert record["flight_s"] > 0 or (late and record["step"] == 3), name
            assert record["blocked_s"] >= 0 and record["cpu_s_per_token"] > 0, name
            assert record["bytes_sent"] > 0 and record["updates"] == 1 and record["tokens_per_update"] == BATCH, name
            assert len(record["micro_batches_by_rank"]) == 2 and record["skew_s"] >= 0, name
        assert all(audit["replicas_agree"] for audit in records(run, "audit")) and len(records(run, "audit")) == 4
        assert {record["staleness_max"] for record in commits[3:]} == {1.0 if late else 0.0}, name
        settled = {"delayed": BATCH, "delayed-powersgd": BATCH, "compensated": BATCH}.get(name, 0)
        assert end["tokens_settled"] == (BATCH // 2 if "acco" in name else settled), name
    assert "trace in " in (tmp / "acco-2" / "log.txt").read_text()
    trace = json.loads((tmp / "acco-2" / "trace.json").read_text())["traceEvents"]
    seen = {(e["pid"], e["name"], e["args"]["step"]) for e in trace if e["ph"] == "X"}
    assert seen == {(r, lane, s) for r in (0, 1) for lane in ("compute", "flight", "blocked") for s in (4, 5)}
    noisy = [record["noise_scale"] for record in records(tmp / "allreduce-2", "commit")]
    assert any(noisy), "the gradient noise scale is estimated"


def test_bytes_are_those_of_the_formulas(tmp: Path) -> None:
    """Of one update at 2 and 3 ranks, P in fp64: ring 2 (N-1)/N P; ACCO twice that; int8 and fp16 their share of it."""

    def sent(name: str, n: int) -> float:
        # the one before the last: no act, no end
        return records(tmp / f"{name}-{n}", "commit")[-2]["bytes_sent"]

    for n in (2, 3):
        size = sum(w.nbytes for w in weights(tmp / f"allreduce-{n}").values()) * 2 * (n - 1) / n
        for name, share in (("allreduce", 1), ("sharded", 1), ("delayed", 1), ("horovod", 1), ("acco", 2)):
            assert sent(name, n) == pytest.approx(share * size, rel=0.1), (name, n)
        assert sent("sharded-fp16", n) == pytest.approx((0.5 + 0.25 * 0.5) * size, rel=0.15)
        assert sent("allreduce-bf16", n) == pytest.approx(0.25 * size, rel=0.15)
        metas = sent("ddp", n) - size  # beside the gradients
        assert 0 < metas < 0.1 * size
        assert sent("ddp-each", n) - metas == pytest.approx(2 * size), "two micro-batches, so two sums"


@pytest.mark.parametrize("n", [pytest.param(2, marks=pytest.mark.thorough), 3])
def test_resumed_in_mid_flight_it_is_bit_equal(n: int, tmp_path: Path) -> None:
    """By files, over real ranks, several buckets; stopped between two checkpoints' worth of rounds."""
    names = ["acco-int8", "delayed-powersgd", "sharded-fp16"]
    here = {name: OTHERS[name] for name in (names if n == 3 else OTHERS)}  # the others are parts of the three
    here |= {name: EXACT[name] for name in ("sharded", "horovod") if n == 2}
    stop = {"stop": [n - 1, 3]}
    runs(
        [
            spec
            for name, words in here.items()
            for spec in (
                {"words": words_of(tmp_path, f"{name}-a", STEPS, *words)},
                {"words": words_of(tmp_path, f"{name}-b", STEPS, *words), "do": stop},
            )
        ],
        n, tmp_path,
    )  # fmt: skip
    for name in here:
        assert records(tmp_path / "runs" / f"{name}-b", "end")[-1]["reason"] == "stop"
    runs([{"words": words_of(tmp_path, f"{name}-b", STEPS, *words)} for name, words in here.items()], n, tmp_path)
    for name in here:
        assert same_bits(tmp_path / "runs" / f"{name}-a", tmp_path / "runs" / f"{name}-b"), name
    over_torch = {"ddp-powersgd": CAST["ddp-powersgd"]} | ({"ddp": ["exchange=ddp"]} if n == 2 else {})
    for lives in ([("a", {}), ("b", stop)], [("b", {})]):
        runs(
            [
                {"words": words_of(tmp_path, f"{name}-{k}", STEPS, *words), "do": do}
                for name, words in over_torch.items()
                for k, do in lives
            ],
            n, tmp_path,
        )  # fmt: skip
    for name in over_torch:
        assert same_bits(tmp_path / "runs" / f"{name}-a", tmp_path / "runs" / f"{name}-b"), name


@pytest.mark.thorough
def test_residuals_at_another_world_size_are_said(tmp_path: Path) -> None:
    words = words_of(tmp_path, "a", STEPS, "exchange=acco", "wire=int8")
    runs([{"words": words, "do": {"stop": [0, 3]}}], 3, tmp_path)
    runs([{"words": words}], 2, tmp_path)
    assert "residuals of 3 ranks were added up on rank 0" in (tmp_path / "runs" / "a" / "log.txt").read_text()
    assert len(losses(tmp_path / "runs" / "a")) == STEPS


def test_timed_acco_with_a_slow_rank(tmp_path: Path) -> None:
    """Slowed four times: the fast ranks do more micro-batches, replicas stay equal, tokens are counted right."""
    more = ["exchange=acco", "exchange.timed=true", f"audit_every={BATCH}", "micro_batch=1", "exchange.most=30"]
    runs([{"words": words_of(tmp_path, "a", 60, *more), "do": {"slow": [2, 4.0]}}], 3, tmp_path)
    run = tmp_path / "runs" / "a"
    commits, (end,) = records(run, "commit"), records(run, "end")
    by_rank = [sum(r["micro_batches_by_rank"][k] for r in commits) for k in range(3)]
    assert min(by_rank[:2]) > 2 * by_rank[2], by_rank
    context = 32
    assert sum(by_rank) * context == commits[-1]["tokens"], "each micro-batch is one sequence here"
    assert min(r["tokens_per_update"] for r in commits) >= BATCH - 2 * 3 * context, "never below the nominal batch"
    assert max(r["tokens_per_update"] for r in commits) <= 2 * 3 * 30 * context
    assert end["tokens"] >= 60 * BATCH and all(audit["replicas_agree"] for audit in records(run, "audit"))
    assert commits[-1]["loss"] < commits[0]["loss"]
    runs([{"words": words_of(tmp_path, "a", 80, *more)}], 2, tmp_path)
    assert records(run, "end")[-1]["reason"] == "budget", "a timed run goes on, on fewer ranks too"


def test_a_slowed_rank_is_waited_for_and_changes_no_bit(tmp_path: Path) -> None:
    """world.slow by computing, and by sleeping where ranks outnumber cores. Caught: work that leaves a gradient."""
    more = ["exchange=allreduce", "model.width=64", "micro_batch=4"]
    both = {"plain": [], "slow": ["world.slow=1:6"]}
    for n in (2, 3):  # of 2 cores
        runs([{"words": words_of(tmp_path, f"{name}-{n}", STEPS, *more, *w)} for name, w in both.items()], n, tmp_path)
        plain, slow = tmp_path / "runs" / f"plain-{n}", tmp_path / "runs" / f"slow-{n}"
        assert same_bits(plain, slow)
        commits = records(slow, "commit")
        compute, blocked = ([sum(r[key][k] for r in commits) for k in range(n)] for key in (
            "compute_s_by_rank", "blocked_s_by_rank",
        ))  # fmt: skip
        assert max(compute) == compute[1] > 1.5 * sum(compute[k] for k in range(n) if k != 1) / (n - 1)
        assert min(blocked) == blocked[1]
        said = (slow / "log.txt").read_text()
        assert "rank 1 6 times, by " in said and ("sleeping" in said) == (n > usable_cores())


@pytest.mark.thorough
def test_dropout_and_references_are_slowed_without_a_trace(tmp_path: Path) -> None:
    """Random numbers are drawn anew for each micro-batch; libraries hang on the same parameters."""
    cases = {"dropout": ["model.dropout=0.2"], "horovod": ["exchange=horovod", "exchange.bucket_mb=null"]}
    specs = [
        {"words": words_of(tmp_path, f"{name}-{slow}", STEPS, *words, *([f"world.slow={slow}"] * (slow != "none")))}
        for name, words in cases.items()
        for slow in ("none", "0:2.5")
    ]
    runs(specs, 2, tmp_path)
    for name in cases:
        assert same_bits(*(tmp_path / "runs" / f"{name}-{slow}" for slow in ("none", "0:2.5"))), name
