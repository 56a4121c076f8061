"""Phase x exchange x exit mode, where something flies, a driver thread walks it, or the weights are in pieces."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from launch import BATCH, HVDLLM, Job, launch, meddled, records, runs, same_bits, slots, words_of

pytestmark = pytest.mark.ranks
STEPS = 10
KINDS = {
    "sharded": ["exchange=sharded"],
    "delayed-int8": ["exchange=delayed", f"exchange.warmup_tokens={BATCH}", "wire=int8"],
    "acco": ["exchange=acco"],
    "acco-torch": ["exchange=acco", "world=torch"],
    "ddp": ["exchange=ddp"],
}


def but(*often: str) -> list[Any]:
    """All kinds, those that are not named as thorough."""
    return [kind if kind in often else pytest.param(kind, marks=pytest.mark.thorough) for kind in KINDS]


@pytest.mark.parametrize("kind", but("acco"))
def test_a_killed_rank_ends_the_job_and_nothing_is_lost(kind: str, tmp_path: Path) -> None:
    more = [*KINDS[kind], f"save_every={3 * BATCH}"]
    runs([{"words": words_of(tmp_path, "a", STEPS, *more)}], 2, tmp_path)
    words = words_of(tmp_path, "b", STEPS, *more)
    launch(meddled(words, kill=[1, 8]), "gloo", 2, code=None)
    assert records(tmp_path / "runs" / "b", "save")[-1]["step"] == 6
    launch([*HVDLLM, "train", *words], "gloo", 2)
    assert same_bits(tmp_path / "runs" / "a", tmp_path / "runs" / "b")


@pytest.mark.parametrize(
    ("exchange", "who"), [("ddp", "because rank 1 is gone"), ("horovod", "most likely because another rank is gone")]
)
def test_who_survives_says_that_a_peer_is_gone(exchange: str, who: str, tmp_path: Path) -> None:
    """Of ranks that nobody ends, as under srun: the library that moves the sums has errors of its own."""
    words = words_of(tmp_path, "a", STEPS, f"exchange={exchange}", "exchange.bucket_mb=null")
    command, (point, places) = meddled(words, kill=[1, 4]), slots("gloo", 2)
    with closing(point), Job(command, **places[0]) as survivor, Job(command, **places[1]) as dead:
        assert dead.wait().code == -9
        done = survivor.wait()
    assert done.code == 1 and f"rank 0: a collective failed, {who}" in done.out
    assert "bug in hvdllm" not in done.out and "Traceback" not in done.out


@pytest.mark.parametrize("kind", but("delayed-int8"))
def test_a_rank_that_fails_shows_its_own_error_once(kind: str, tmp_path: Path) -> None:
    done = launch(meddled(words_of(tmp_path, "a", STEPS, *KINDS[kind]), fail=[1, 3]), "gloo", 2, code=None)
    assert "an apple fell on the fan" in done.out and "rank 1: this is a bug" in done.out
    assert "a collective failed" not in done.out and "HorovodInternalError" not in done.out


@pytest.mark.parametrize("kind", but("delayed-int8", "acco"))
def test_a_bad_gradient_on_one_rank_stops_all_before_it_counts(kind: str, tmp_path: Path) -> None:
    """Round 5; where sums are late, or two a batch, it counts in another step. No step from there on was saved."""
    words = words_of(tmp_path, "a", STEPS, *KINDS[kind], "save_every=1", "keep=99")
    done = launch(meddled(words, bad=[1, 5, "blocks.0.mlp.up.weight"]), "gloo", 2, code=None)
    step = {"acco": 3, "acco-torch": 3}.get(kind, 6)
    assert f"step {step}: the gradient of `blocks.0.mlp.up.weight` is not finite on rank 1" in done.out
    assert done.out.count("is not finite") == 1 and "bug in hvdllm" not in done.out
    run = tmp_path / "runs" / "a"
    assert [record["step"] for record in records(run, "save")] == list(range(1, step))
    assert records(run, "end")[-1]["reason"] == "failed"


def test_what_the_library_has_moved_is_named_too(tmp_path: Path) -> None:
    words = words_of(tmp_path, "a", STEPS, "exchange=horovod", "exchange.bucket_mb=null", "wire=fp16")
    done = launch(meddled(words, bad=[1, 5, "embed.weight"]), "gloo", 2, code=None)
    assert "step 6: the gradient of `embed.weight` is not finite on rank 1" in done.out


def test_a_sum_that_overflows_on_the_wire_says_so(tmp_path: Path) -> None:
    """Each rank's gradient is finite; scaled for fp16 their sum is not."""
    words = words_of(tmp_path, "a", STEPS, "wire=fp16", "optim.lr=0.001")
    done = launch(meddled(words, large=[0, 3, 1e8]), "gloo", 2, code=None)
    assert "although each rank's own is: it overflowed" in done.out and done.out.count("overflowed") == 1
