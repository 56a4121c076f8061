"""Local steps on real ranks: their curves are those of virtual ranks, which test_<exchange>.py holds against plain
recursions; they go on bit-equal from mid-round; a rank that fails, or a bad number that only one can see, ends all.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from launch import BATCH, HVDLLM, launch, losses, meddled, records, runs, same_bits, weights, words_of

pytestmark = pytest.mark.ranks
STEPS = 12
LONG = 28  # an ask is acted on two marks later, each of some steps
STREAM = ["exchange=streaming_diloco", "exchange.local_steps=4", "exchange.fragments=2", "exchange.delay=1"]
KINDS = {
    "local_sgd": [
        "exchange=local_sgd",
        "exchange.local_steps=4",
        "exchange.pulses=4",
        f"exchange.warmup_tokens={2 * BATCH}",
    ],
    "diloco": ["exchange=diloco", "exchange.local_steps=4", "exchange.pulses=2"],
    "late": [
        "exchange=diloco",
        "exchange.local_steps=3",
        "exchange.pulses=3",
        "exchange.outer_lr=0.2",
        "exchange.overlap=true",
    ],
    "fedavg": [
        "exchange=fedavg",
        "exchange.local_steps=4",
        "exchange.pulses=2",
        "exchange.clients=5",
        "exchange.sampled=4",
        "exchange.alpha=0.5",
        "exchange.prox=0.1",
        "exchange.server=adam",
    ],
    "streaming": STREAM,
    "streaming-int8": [*STREAM, "wire=int8"],
}
INNER = {
    "inner-allreduce": [*KINDS["diloco"], "exchange.inner=allreduce"],
    "inner-sharded": [*KINDS["diloco"], "exchange.inner=sharded", "exchange.inner_wire=bf16", "wire=fp16"],
}
QUIETER = ("local_sgd", "diloco", "streaming-int8")
FP64 = ["precision=fp64", f"eval_every={3 * BATCH}", f"audit_every={6 * BATCH}", "trace_steps=2:3"]


def close(run: Path, other: Path, atol: float) -> None:
    a, b = weights(run), weights(other)
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=atol, msg=lambda m, k=name: f"{run.name}, {k}: {m}")
    assert losses(run) == pytest.approx(losses(other), rel=1e-7), run.name
    assert [r["tokens"] for r in records(run, "commit")] == [r["tokens"] for r in records(other, "commit")]


@pytest.fixture(scope="module")
def tmp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tmp = tmp_path_factory.mktemp("local")

    def spec(name: str, *words: str) -> dict[str, list[str]]:
        return {"words": words_of(tmp, name, STEPS, *FP64, *words)}

    runs([spec(f"{name}-3", *words) for name, words in KINDS.items()], 3, tmp)
    runs([spec("torch-streaming-2", *STREAM, "world=torch")], 2, tmp)
    runs([spec(f"{name}-4", *words) for name, words in INNER.items()], 4, tmp, "two hosts")
    size = ["world=virtual", "world.size=3"]
    virtual = [spec(f"{name}-3-virtual", *words, *size) for name, words in KINDS.items()]
    virtual += [spec("torch-streaming-2-virtual", *STREAM, "world=virtual", "world.size=2")]
    hosts = ["world=virtual", "world.size=4", "world.hosts=2"]
    runs([*virtual, *(spec(f"{name}-4-virtual", *words, *hosts) for name, words in INNER.items())], 1, tmp)
    return tmp / "runs"


@pytest.mark.parametrize(
    "name", [*(f"{kind}-3" for kind in KINDS), *(f"{kind}-4" for kind in INNER), "torch-streaming-2"]
)
def test_virtual_ranks_give_the_curve_of_real_ones(name: str, tmp: Path) -> None:
    close(tmp / name, tmp / f"{name}-virtual", 1e-4 if name.startswith(("streaming-int8", "inner-sharded")) else 1e-9)


def test_they_are_different_exchanges(tmp: Path) -> None:
    ends = {name: records(tmp / f"{name}-3", "eval")[-1]["loss"] for name in KINDS}
    assert len(set(ends.values())) == len(ends)


def test_what_each_reports(tmp: Path) -> None:
    for name in KINDS:
        run = tmp / f"{name}-3"
        commits, evals, (end,) = records(run, "commit"), records(run, "eval"), records(run, "end")
        assert end["reason"] == "budget" and end["tokens"] >= STEPS * BATCH
        assert evals[-1]["tokens"] == end["tokens"] + end["tokens_settled"], "the last one is of all tokens"
        assert "weights_tokens" not in evals[-1]
        assert all(record["bytes_sent"] > 0 and record["grad_norm"] > 0 for record in commits), name
        assert sum(sum(r["micro_batches_by_rank"]) for r in commits) > 0
        if name == "late":  # in mid-round the anchor is older than what is committed
            assert any(e.get("weights_tokens", e["tokens"]) < e["tokens"] for e in evals[:-1])
        assert records(run, "audit")[-1]["spread"] >= 0
    sent = [record["bytes_sent"] for record in records(tmp / "diloco-3", "commit")]
    size = sum(w.nbytes for w in weights(tmp / "diloco-3").values())
    assert sent[1] == pytest.approx(2 * 2 / 3 * size, rel=0.1), "one sum a round"
    assert records(tmp / "local_sgd-3", "commit")[-1]["tokens"] == STEPS * BATCH


@pytest.mark.parametrize("n", [pytest.param(2, marks=pytest.mark.thorough), 3])
def test_resumed_in_mid_round_it_is_bit_equal(n: int, tmp_path: Path) -> None:
    kinds = {name: KINDS[name] for name in (KINDS if n == 2 else ("local_sgd", "late", "fedavg", "streaming-int8"))}
    both = [
        spec
        for name, words in kinds.items()
        for spec in (
            {"words": words_of(tmp_path, f"{name}-a", LONG, *words)},
            {"words": words_of(tmp_path, f"{name}-b", LONG, *words), "do": {"stop": [n - 1, 2]}},
        )
    ]
    runs(both, n, tmp_path)
    for name in kinds:
        assert records(tmp_path / "runs" / f"{name}-b", "end")[-1]["reason"] == "stop"
    runs([{"words": words_of(tmp_path, f"{name}-b", LONG, *words)} for name, words in kinds.items()], n, tmp_path)
    for name in kinds:
        assert same_bits(tmp_path / "runs" / f"{name}-a", tmp_path / "runs" / f"{name}-b"), name


@pytest.mark.thorough
def test_groups_resumed_in_mid_round_and_at_another_size(tmp_path: Path) -> None:
    words = [*INNER["inner-sharded"], "exchange.pulses=4", "exchange.group=2"]
    runs(
        [
            {"words": words_of(tmp_path, "a", LONG, *words)},
            {"words": words_of(tmp_path, "b", LONG, *words), "do": {"stop": [3, 2]}},
            {"words": words_of(tmp_path, "c", LONG, *words), "do": {"stop": [3, 2]}},
        ],
        4, tmp_path,
    )  # fmt: skip
    runs([{"words": words_of(tmp_path, "b", LONG, *words)}], 4, tmp_path)
    assert same_bits(tmp_path / "runs" / "a", tmp_path / "runs" / "b")
    done = launch([*HVDLLM, "train", *words_of(tmp_path, "c", LONG, *words)], "gloo", 2, code=None)
    assert "at least two groups" in done.out and done.out.count("at least two groups") == 1


@pytest.mark.thorough
def test_another_world_size_is_said(tmp_path: Path) -> None:
    words = words_of(tmp_path, "a", LONG, *KINDS["diloco"])
    runs([{"words": words, "do": {"stop": [0, 2]}}], 3, tmp_path)
    runs([{"words": words}], 2, tmp_path)
    assert (
        "3 ranks saved it, 2 go on: what each rank had of its own" in (tmp_path / "runs" / "a" / "log.txt").read_text()
    )
    assert records(tmp_path / "runs" / "a", "end")[-1]["reason"] == "budget"


@pytest.mark.thorough
@pytest.mark.parametrize("kind", ["diloco", "streaming"])
def test_a_killed_rank_ends_the_job_and_nothing_is_lost(kind: str, tmp_path: Path) -> None:
    more = [*KINDS[kind], f"save_every={3 * BATCH}"]
    runs([{"words": words_of(tmp_path, "a", STEPS, *more)}], 2, tmp_path)
    words = words_of(tmp_path, "b", STEPS, *more)
    launch(meddled(words, kill=[1, 2]), "gloo", 2, code=None)
    launch([*HVDLLM, "train", *words], "gloo", 2)
    assert same_bits(tmp_path / "runs" / "a", tmp_path / "runs" / "b")


@pytest.mark.parametrize("kind", ["late", "streaming", *(pytest.param(k, marks=pytest.mark.thorough) for k in QUIETER)])
def test_a_bad_gradient_that_only_one_rank_sees_stops_all(kind: str, tmp_path: Path) -> None:
    """A lane's round is named by its first window: on rank 1 of 2 its windows are 1, 3, 5, ..., eleven a round."""
    words = words_of(tmp_path, "a", STEPS, *KINDS[kind], "save_every=1", "keep=99")
    done = launch(meddled(words, bad=[1, 1 + 2 * 11 * 4, "blocks.0.mlp.up.weight"]), "gloo", 2, code=None)
    assert "the gradient of `blocks.0.mlp.up.weight` is not finite on rank 1" in done.out, done.out
    assert done.out.count("is not finite") == 1 and "bug in hvdllm" not in done.out
    assert records(tmp_path / "runs" / "a", "end")[-1]["reason"] == "failed"
