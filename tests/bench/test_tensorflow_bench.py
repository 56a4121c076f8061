"""What of jobs/bench/tensorflow.sh holds without TensorFlow; where that is installed, that it computes what we do."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow_bench as bench
import torch
from tensorflow_bench import Network, Point, Request, Seen

from hvdllm import runs
from hvdllm.cli.main import main
from hvdllm.config.compose import compose
from hvdllm.errors import UserError
from hvdllm.report import compare, read
from hvdllm.task import causal_lm
from hvdllm.task.stream import Stream
from hvdllm.text import shards

sys.path.insert(0, str(bench.PROGRAM.parent))
import tensorflow_shards

ASKED = Request("ring", 0.0, None, 50, (0,), ())
SMALL = [
    "model.width=32", "model.layers=2", "model.heads=4", "model.kv_heads=2", "model.context=16", "batch_tokens=128",
    "text=files", "text.tokenizer=bytes", "log_every=128", "eval_tokens=640", "save_every=0", "sample_every=0",
    "audit_every=0", "precision=fp64", "device.threads=1", "device=cpu",
]  # fmt: skip
UPDATES = 12
LOOPBACK = Network("loopback", None, False)


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    text = "\n".join(f"{k}: the quick brown fox jumps over {k * k} lazy dogs" for k in range(90))
    (tmp_path / "text.txt").write_text(text)
    (tmp_path / "valid.txt").write_text(text[::-1][:1000])
    folders = [f"text.path={tmp_path}/text.txt", f"text.validation={tmp_path}/valid.txt"]
    folders += [f"data_dir={tmp_path}/data", f"runs_dir={tmp_path}/runs"]
    return [*SMALL, *folders, f"budget_tokens={128 * UPDATES}", f"eval_every={128 * 4}"]


def trained(words: list[str], name: str = "ours") -> Path:
    assert main(["train", f"name={name}", *words]) == 0
    return Path(compose(words).runs_dir) / name


# ------------------------------------------------------------------ batches
@pytest.mark.parametrize(("rank", "size"), [(0, 1), (0, 2), (1, 2), (2, 3)])
def test_the_reader_takes_what_our_stream_takes(rank: int, size: int, words: list[str]) -> None:
    """Over the end of an epoch, and where the ranks have unequal shares."""
    config = compose(words)
    train = causal_lm.prepare(config, say=lambda text: None, whole=True, wanted=None).train
    corpus = shards.prepare(config.text, shards.data_folder(config.data_dir), say=lambda text: None)
    rounds = range(2 * len(train) // 8)
    stream = Stream(
        train, batch=8, micro_batch=8, seed=3, rank=rank, size=size, device=torch.device("cpu")
    )  # fmt: skip
    theirs = list(tensorflow_shards.steps(corpus.folder / "train.bin", 16, 8, 3, rounds, rank, size))
    assert len(theirs) == len(rounds) > 20 and theirs[0].dtype == np.int32
    for k, windows in zip(rounds, theirs, strict=True):
        (batch,) = stream.share(k)
        assert np.array_equal(windows[:, :-1], batch.inputs) and np.array_equal(windows[:, 1:], batch.targets)


def test_the_page_shows_the_reader_as_it_is() -> None:
    reader = (bench.PROGRAM.parent / "tensorflow_shards.py").read_text()
    (shown,) = re.findall(r"```python\n(HEADER.*?)```", (bench.PROGRAM.parent / "README.md").read_text(), re.S)
    assert reader.endswith("\n\n" + shown) and len(reader.splitlines()) < 40


def test_held_out_windows_are_ours(words: list[str]) -> None:
    config = compose(words)
    data = causal_lm.prepare(config, say=lambda text: None, whole=True, wanted=None)
    corpus = shards.prepare(config.text, shards.data_folder(config.data_dir), say=lambda text: None)
    windows = tensorflow_shards.opened(corpus.folder / "validation.bin", 16)
    inputs, targets, _ = data.validation.take(np.arange(len(data.validation)), None)
    assert len(windows) == len(data.validation) > 3
    assert np.array_equal(windows[:, :-1], inputs) and np.array_equal(windows[:, 1:], targets)


def test_a_push_has_the_rate_of_the_tokens_with_it(words: list[str]) -> None:
    config = compose(words)
    whole, halves = bench.rates(config, UPDATES), bench.rates(config, 2 * UPDATES)
    assert halves[1::2] == whole and len(set(halves)) > UPDATES


# ------------------------------------------------------------------ the run folder
def task(more: float) -> dict[str, Any]:
    """What a task writes: two records and an evaluation after each."""
    records = [{"tokens": 512 * k, "seconds": 1.5 * k, "loss": 5.0 - k, "lr": 1e-3, "updates": 4} for k in (1, 2, 3)]
    evals = [{"tokens": 512 * k, "seconds": 1.5 * k, "loss": 5.5 - k, "wall_s": 2.0 * k} for k in (1, 2, 3)]
    marks = [[1.5 * k, 512 * k, 1066.0 * k + more, k, 566.0 * k, k, 0.5 * k] for k in (1, 2, 3)]
    return {"records": records, "evals": evals, "marks": marks, "versions": {"python": "3", "tensorflow": "2.21.0"}}


def test_the_report_reads_the_folder_beside_ours(words: list[str], tmp_path: Path) -> None:
    ours, place = trained(words), tmp_path / "tasks"
    place.mkdir()
    for k in range(2):
        (place / f"worker-{k}.json").write_text(json.dumps(task(more=k)))
    seen, tasks = bench.seen_of_tensorflow(place, Network("link", None, True), compose(words))
    bench.kept(tasks, ours, "tensorflow_mwms_ring", tmp_path / "runs" / "theirs")
    assert runs.records(tmp_path / "runs" / "theirs", pytest.fail)  # whole, with sums
    found, skipped = read.gather([str(tmp_path / "runs")])
    assert not skipped and {run.name for run in found} == {"ours", "theirs"}
    theirs = next(run for run in found if run.name == "theirs")
    assert theirs.notes == [] and theirs.status == "finished"
    assert [(one.tokens, one.loss, one.seconds) for one in theirs.evals] == [
        (512.0, 4.5, 1.5), (1024.0, 3.5, 3.0), (1536.0, 2.5, 4.5),
    ]  # fmt: skip
    assert theirs.evals[-1].bytes == seen.points[-1].interface == 3 * 750.0  # the mean of both hosts, without frames
    assert theirs.sums.updates == 12 and theirs.sums.cpu_s == pytest.approx(3.0)
    both = compare.compare(found, ["exchange", "versions"], [], anyway=False)
    assert {group.label for group in both.groups} == {"allreduce", "tensorflow_mwms_ring"} and both.fair
    with pytest.raises(UserError, match="the runs differ in versions"):
        compare.compare(found, ["exchange"], [], anyway=False)


def test_figures_leave_out_what_comes_before_the_first_evaluation() -> None:
    points = [Point(128 * k, 10.0 + k if k > 1 else 1.0, 3.0, 1000.0 * k, 2000.0 * k) for k in (1, 2, 3, 4)]
    assert Seen(points, 3.0, 128, 200).figures() == (1000.0, 128.0, 1000.0, 2000.0)
    assert Seen([Point(256, 1.0, 3.0, None, 0.0), Point(768, 3.0, 3.0, None, 8.0)], 3.0, 128, 1).figures() == (
        500.0, 256.0, None, 2.0,
    )  # fmt: skip


def test_curves_that_are_not_one_are_said() -> None:
    def curve(off: float) -> Seen:
        return Seen([Point(128 * k, k, 3.0 + off * (k == 9), 0.0, 0.0) for k in range(1, 61)], 3.0, 128, 1)

    found = {"allreduce": [curve(0)], "ddp": [curve(3e-4)], "tensorflow_mwms_ring": [curve(0.03)], "x": [curve(1)]}
    assert bench.apart(found, "fp64")[0].startswith("ddp: ")
    (only,) = bench.apart(found, "fp32")
    assert only.startswith("tensorflow_mwms_ring: ") and "1.0e-02" in only
    assert "| 1.0e-02 |" in bench.table(found)


# ------------------------------------------------------------------ refusals
@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("model=gpt2", "model.positions=learned is not written for TensorFlow here: .*model.positions=rope"),
        ("optim=sgd", "needs optim.name=adamw"),
        ("wire=int8", "needs wire.name=fp32"),
        ("precision=bf16", "give fp32 or fp64"),
        ("batch_tokens=384", "give a multiple of 256"),
        ("model.tied=false", "model.tied=false is not"),
    ],
)
def test_what_tensorflow_cannot_train_is_refused(word: str, said: str) -> None:
    why = bench.unfit(compose(["model.context=128", word]), ASKED, 0)
    assert why is not None
    with pytest.raises(UserError, match=said):
        raise UserError(why)


def test_nccl_needs_a_gpu_for_each_worker() -> None:
    nccl = bench.parsed(["--communication", "nccl"])
    assert "needs a GPU for each of 2 workers, and this machine has 1" in str(bench.unfit(compose([]), nccl, 1))
    assert bench.unfit(compose([]), nccl, 2) is None and nccl.link is None
    assert bench.gpu_of(1, nccl) == ["env", "CUDA_VISIBLE_DEVICES=1"]
    assert bench.gpu_of(1, ASKED) == ["env", "CUDA_VISIBLE_DEVICES="]


@pytest.mark.parametrize(
    "argv", [["--updates", "3"], ["--seeds", "x"], ["seed=1"], ["budget_tokens=1"], ["world=torch"]]
)
def test_words_that_the_comparison_sets_itself(argv: list[str]) -> None:
    with pytest.raises(UserError):
        bench.parsed(argv)


# ------------------------------------------------------------------ TensorFlow
def with_tensorflow() -> Path:
    """A Python that has TensorFlow: this one, or that of the environment that jobs/bench/tensorflow.sh makes."""
    if importlib.util.find_spec("tensorflow"):
        return Path(sys.executable)
    python = bench.ROOT / "runs" / "tensorflow" / "env" / "bin" / "python"
    if not python.exists():
        pytest.skip("TensorFlow is not installed here: jobs/bench/tensorflow.sh makes an environment with it")
    return python


@pytest.mark.ranks
@pytest.mark.parametrize("strategy", ["one", "mwms"])
def test_tensorflow_computes_what_we_do(strategy: str, words: list[str], tmp_path: Path) -> None:
    """Model, clipping, AdamW, schedule and batches are equal up to rounding in fp64."""
    python, ours, place = with_tensorflow(), trained([*words, "optim.clip=0.5"]), tmp_path / "theirs"
    config = compose([*words, "optim.clip=0.5"])
    bench.run_tensorflow(strategy, config, Request("ring", 0.0, None, UPDATES, (0,), ()), LOOPBACK, python, place)
    seen, _ = bench.seen_of_tensorflow(place, LOOPBACK, config)
    lines = list(runs.records(ours))
    losses = [line["loss"] for line in lines if line["kind"] == "commit"]
    assert losses[-1] < losses[0] - 0.1  # something was learnt
    assert [point.loss for point in seen.points] == pytest.approx(losses, rel=1e-12)
    assert seen.validation == pytest.approx([line["loss"] for line in lines if line["kind"] == "eval"][-1], rel=1e-12)


@pytest.mark.ranks
def test_tensorflows_servers_learn(words: list[str], tmp_path: Path) -> None:
    python, place, config = with_tensorflow(), tmp_path / "theirs", compose(words)
    bench.run_tensorflow("ps", config, Request("ring", 0.0, None, UPDATES, (0,), ()), LOOPBACK, python, place)
    seen, (chief,) = bench.seen_of_tensorflow(place, LOOPBACK, config)
    assert [point.tokens for point in seen.points] == [512, 1024, 1536]
    assert seen.points[-1].loss < seen.points[0].loss and seen.validation < 5.3  # ln 257 is 5.55
    assert 0 <= chief["records"][0]["staleness_max"] < 2 * UPDATES
