"""`hvdllm bench exchange` from its words to its table, with real ranks over the loopback."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
from launch import BATCH, HVDLLM, TINY, Job, launch, write_text

from hvdllm.launch import lab

pytestmark = pytest.mark.ranks
OWN = ("log_every", "eval_every", "sample_every", "schedule")  # which the bench sets itself


def settings(tmp: Path) -> list[str]:
    write_text(tmp / "text")
    paths = [f"text.path={tmp}/text/train.txt", f"text.validation={tmp}/text/validation.txt", f"data_dir={tmp}/data"]
    return [word for word in (*TINY, *paths) if not word.startswith(OWN)]


def test_over_the_loopback(tmp_path: Path) -> None:
    out = tmp_path / "figures.json"
    flags = ["--link", "none", "--exchanges", "allreduce,aco", "--steps", "3", "--repetitions", "1", "--json", str(out)]
    done = launch([*HVDLLM, "bench", "exchange", *flags, *settings(tmp_path)])
    assert "loopback of this machine" in done.out and "aco refused: there is no exchange=aco" in done.out
    figures = json.loads(out.read_text())
    cases = figures["cases"]
    assert list(cases) == ["compute alone", "Horovod idle", "allreduce", "aco"] and figures["batch_tokens"] == BATCH
    assert [cases[label].get("horovod") for label in cases] == [False, True, True, None]
    assert cases["compute alone"]["figures"]["tokens_per_update"] == BATCH // 2, "22 sequences: 11 each"
    assert cases["compute alone"]["figures"]["sent_mb"] == cases["Horovod idle"]["figures"]["sent_mb"] == 0
    own = cases["allreduce"]["figures"]
    assert own["updates"] == 3 + 3 + 1 and own["tokens_per_update"] == BATCH and own["wire_mb"] is None
    # Two ranks send their whole gradient once: 4 bytes for each parameter, padding and a little meta on top.
    (parameters,) = {rep["sent"] / 3 / 4 for rep in cases["allreduce"]["repetitions"]}
    assert 20_000 < parameters < 60_000 and own["sent_mb"] == pytest.approx(parameters * 4 / 1e6)
    assert own["sum_ms"] > 0 and own["sum_mb"] == pytest.approx(own["sent_mb"], rel=0.02), "the same sum, without meta"
    assert cases["compute alone"]["figures"]["sum_ms"] is None, "a rank that trains alone sums nothing"
    assert own["flight_ms"] > 0 and own["bound"] > 0 and own["loss"] > 0
    assert figures["threads"] == 1 and {"torch", "horovod"} <= figures["versions"].keys()


@pytest.mark.thorough
def test_with_a_slow_rank(tmp_path: Path) -> None:
    out, label = tmp_path / "figures.json", "local_sgd+exchange.local_steps=2"
    flags = ["--link", "none", "--exchanges", label, "--steps", "3", "--repetitions", "1", "--slow", "1:4"]
    with Job([*HVDLLM, "bench", "exchange", *flags, "--json", str(out), *settings(tmp_path)]) as job:
        done = job.wait(400)  # four starts of two ranks
    assert done.code == 0, done.out
    assert "what the slowest allows" in done.out
    figures = json.loads(out.read_text())
    fast, slow = figures["rank_tokens_per_s"]["compute alone, slowed"]
    assert slow < fast and len(figures["rank_tokens_per_s"]["compute alone"]) == 2
    own = figures["cases"][label]["figures"]
    assert own["kept"] == pytest.approx(own["tokens_per_s"] / (fast + slow))
    assert "exchange.by_speed=true" in figures["cases"][label]["settings"]


@pytest.mark.thorough
@pytest.mark.skipif(bool(lab.missing()), reason=str(lab.missing()))
def test_between_two_hosts_and_a_run_that_stands_still(tmp_path: Path) -> None:
    """The counters of the interfaces agree with the count; a limit that nothing can meet ends in a sentence."""
    out = tmp_path / "figures.json"
    flags = ["--exchanges", "allreduce", "--steps", "3", "--warmup", "1", "--repetitions", "1", "--json", str(out)]
    launch([*HVDLLM, "bench", "exchange", *flags, *settings(tmp_path)])
    own = json.loads(out.read_text())["cases"]["allreduce"]["figures"]
    assert own["packet_bytes"] < 1515 and 0.9 < own["wire_ratio"] < 1.5  # 0.1 MB: what else is said weighs more
    done = launch([*HVDLLM, "bench", "exchange", *flags, "--limit", "0.2", *settings(tmp_path)], code=1)
    assert done.out.count("was not done after 0 s (--limit)") >= 3
    assert not [name for name in lab.names() if name in lab.leftovers(lab.names())]
