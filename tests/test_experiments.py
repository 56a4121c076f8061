"""Every file of conf/experiment is run, in a tiny variant: what is a sweep as a sweep, and its report is written."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
from launch import BATCH, HVDLLM, RANKS, launch, records, words_of

from hvdllm.cli.main import main
from hvdllm.launch import lab

ROOT = Path(__file__).resolve().parents[1]
FILES = {file.stem: file.read_text() for file in (ROOT / "conf" / "experiment").glob("*.yaml")}
SWEEPS = {
    "race": ["seed=0", "launch=horovodrun", "exchange=allreduce,streaming_diloco"],
    "slow_link": ["seed=0", "exchange=allreduce", "wire=fp32,int8"],
    "acco_paper": ["seed=0", "optim.lr=1e-3", "world=virtual", "world.size=2", "exchange=delayed,allreduce"],
    "diloco_h": ["seed=0", "world.size=2", "exchange=diloco", "exchange.local_steps=2,4"],
    "slow_rank": ["seed=0", "exchange=acco_timed,local_sgd_by_speed", "launch=horovodrun"],
    "staleness": ["seed=0", "exchange.staleness=0,null", "world.size=2"],
    "digits": ["seed=0", "exchange=allreduce,acco", "world=virtual", "world.size=2"],
}
ALONE = ("laptop", "shakespeare_char", "bert")
MARKS = {
    "race": [pytest.mark.ranks, pytest.mark.thorough],
    "slow_rank": pytest.mark.ranks,
    "slow_link": [pytest.mark.ranks, pytest.mark.thorough],
}


def tiny(tmp: Path, *more: str) -> list[str]:
    """Words of a tiny run that leave what an experiment is about."""
    left = ("name=", "schedule=", "exchange.", "log_every=", "text=", "optim.")
    words = [word for word in words_of(tmp, "x", 4) if not word.startswith(left)]
    return [*words, "text=files", f"eval_every={2 * BATCH}", *more]


def test_the_files_are_these_and_say_how_they_are_started() -> None:
    assert FILES.keys() == {*ALONE, "chat_lora", "clicks", "acco_finetune", "drift", *SWEEPS}
    for name, text in FILES.items():
        assert text.startswith("# @package _global_\n#") and f"experiment={name}" in text, name
        assert (f"hvdllm train -m experiment={name}" in text) == (name in (*SWEEPS, "acco_finetune", "drift")), name


@pytest.mark.ranks
@pytest.mark.thorough  # the quickstart is one of README's commands
@pytest.mark.parametrize("name", ALONE)
def test_one_run(name: str, tmp_path: Path) -> None:
    words = [word for word in tiny(tmp_path, f"experiment={name}", "name=one") if not word.startswith("text=")]
    words += ["text=files"] if name != "shakespeare_char" else []
    words = [word for word in words if name != "bert" or not word.startswith("model.kv_heads=")]
    launch([*HVDLLM, "train", *words, f"batch_tokens={BATCH}"], "gloo", 2)
    assert records(tmp_path / "runs" / "one", "end")[-1]["reason"] == "budget"


SHAPE = ["text.tokenizer=bytes", "model.layers=1", "model.width=16", "model.heads=2", "model.context=64"]


def talk(tmp: Path) -> list[str]:
    """Writes conversations of unequal lengths to talk.jsonl. Returns words for the folders of its runs."""
    rows = [{"prompt": f"Say {i}", "completion": f"{i} " * (1 + i % 5)} for i in range(60)]
    (tmp / "talk.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [f"runs_dir={tmp}/runs", f"data_dir={tmp}/data"]


@pytest.mark.ranks
def test_acco_finetune_names_each_option_with_its_wire(tmp_path: Path) -> None:
    """Of the five, ACCO and the paper's DDP. Conversations, so their micro-batches count unequally."""
    exchanges = "acco+wire=bf16,ddp+wire=fp32+exchange.sync=micro_batch"
    assert f" {exchanges.replace(',', ',ddp+wire=bf16,ddp+wire=fp32,')}," in FILES["acco_finetune"]
    words = [
        *SHAPE,
        *talk(tmp_path),
        f"text.path={tmp_path}/talk.jsonl",
        "text.validation_share=0.2",
        "launch.link=null",
    ]
    words += [
        f"exchange={exchanges}",
        "seed=0",
        "micro_batch=3",
        "batch_tokens=90",
        "budget_tokens=400",
        "eval_every=100",
    ]
    launch([sys.executable, str(RANKS / "body_sweep.py"), "-m", "experiment=acco_finetune", *words, "launch.sweep=s"])
    losses = {}
    for name in ("acco,wire=bf16", "ddp,wire=fp32,exchange.sync=micro_batch"):
        run = tmp_path / "runs" / "s" / f"exchange={name}"
        assert records(run, "run")[0]["config"]["world"]["kind"] == "torch"
        assert records(run, "end")[-1]["reason"] == "budget"
        losses[name] = records(run, "eval")[-1]["loss"]
    assert len(set(losses.values())) == 2
    page = tmp_path / "r.md"
    report = ["--by", "exchange,wire", "--reference", "acco", "--out", str(page)]
    launch([*HVDLLM, "report", str(tmp_path / "runs" / "s"), *report])
    table = page.read_text().partition("best first")[2]
    assert re.search(r"\| acco, bf16 .*\| reference \|", table) and "| ddp, fp32 |" in table


def test_drift_reports_how_each_exchange_follows_a_change(tmp_path: Path) -> None:
    """Two of its exchanges on three texts of numbered documents, which a list of paths plays one after the other."""
    for name in "abc":
        rows = [json.dumps({"text": f"{name * 20} {i}"}) for i in range(80)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows) + "\n")
    paths = ",".join(f"{tmp_path}/{name}.jsonl" for name in "abc")
    words = [
        *SHAPE, "model.context=16", "batch_tokens=128", "budget_tokens=4096", "log_every=256", "eval_every=1024",
        "text.rate=0", "text.slice_tokens=1024", "text.window_tokens=256", "device=cpu", f"data_dir={tmp_path}/data",
        "world=virtual", "world.size=2", f"runs_dir={tmp_path}/runs", "seed=0", f"text.path=[{paths}]",
        "exchange=allreduce,local_sgd+exchange.local_steps=2", "text.replay=0.25", "launch.sweep=s",
    ]  # fmt: skip
    launch([sys.executable, str(RANKS / "body_sweep.py"), "-m", "experiment=drift", *words])
    page = tmp_path / "r.md"
    launch([*HVDLLM, "report", str(tmp_path / "runs" / "s"), "--out", str(page)])
    table = page.read_text().partition("After a change of the stream")[2]
    assert "| change 1 | allreduce |" in table and "| change 1 | local\\_sgd |" in table


def test_fine_tuning_goes_on_from_another_run(tmp_path: Path) -> None:
    shape, folders = [*SHAPE, "device=cpu"], [*talk(tmp_path), "world=virtual", "world.size=2"]
    source = ["text=files", f"text.path={ROOT}/README.md", f"text.validation={ROOT}/conf/README.md"]
    assert main(["train", *shape, *folders, *source, "batch_tokens=256", "budget_tokens=512", "name=base"]) == 0
    tuned = [f"text.path={tmp_path}/talk.jsonl", f"init_from={tmp_path}/runs/base", "name=tuned", "budget_tokens=600"]
    words = [*shape, *folders, *tuned, "batch_tokens=100", "text.validation_share=0.2"]
    assert main(["train", "experiment=chat_lora", *words]) == 0
    run = tmp_path / "runs" / "tuned"
    assert records(run, "end")[-1]["reason"] == "budget" and records(run, "run")[0]["parameters_frozen"] > 0
    assert (run / "frozen.safetensors").exists()


@pytest.mark.parametrize("name", [pytest.param(name, marks=MARKS.get(name, ())) for name in SWEEPS])
def test_a_sweep(name: str, tmp_path: Path) -> None:
    if name == "slow_link" and lab.missing():
        pytest.skip(str(lab.missing()))
    asked = {each for text in re.findall(r"exchange: (\S+)", FILES[name]) for each in text.split(",")}
    words = tiny(tmp_path, f"experiment={name}", *SWEEPS[name], f"launch.sweep={name}")
    if name == "digits":
        words = [word for word in words if not word.startswith(("model", "text", "batch_tokens=", "budget_tokens="))]
        words += ["model.width=4", "batch_tokens=64", "budget_tokens=640", "eval_every=320"]
    forked = "launch=horovodrun" not in words  # else ranks are started by horovodrun, as a user's are
    train = [sys.executable, str(RANKS / "body_sweep.py")] if forked else [*HVDLLM, "train"]
    done = launch([*train, "-m", *words])
    points = [path for path in (tmp_path / "runs" / name).iterdir() if (path / "config.yaml").exists()]
    assert len(points) == 2, done.out
    for point in points:
        assert records(point, "end")[-1]["reason"] == "budget"
    if name == "digits":
        assert re.search(r"^point +images +time", done.out, re.M) and "tokens" not in done.out
    exchanges = {records(point, "run")[0]["config"]["exchange"]["name"] for point in points}
    assert exchanges <= asked or name in ("slow_rank", "diloco_h")  # presets; a file without a sweep
    if name == "slow_rank":
        assert exchanges == {"acco", "local_sgd"}
        for point in points:
            last = records(point, "commit")[-1]
            speeds = last["micro_batches_per_s_by_rank"]
            assert speeds[1] < speeds[0], (point, last)
    page = tmp_path / "report.html"
    by = ["--by", "exchange.staleness,world"] if name == "staleness" else []
    by += ["--metric", "accuracy"] if name == "digits" else []
    launch([*HVDLLM, "report", str(tmp_path / "runs" / name), *by, "--out", str(page)])
    words = {"slow_link": "int8", "staleness": "staleness=0", "slow_rank": "Uneven ranks", "diloco_h": "diloco"}
    words["digits"] = "validation error (1 - accuracy)"
    assert page.stat().st_size > 10_000 and words.get(name, "allreduce") in page.read_text()
    assert json.loads((tmp_path / "runs" / name / "sweep.json").read_text())
