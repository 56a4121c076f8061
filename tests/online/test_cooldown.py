"""`hvdllm cooldown`: a finished model branches off, and the run that it comes from goes on as if nothing had been."""

from __future__ import annotations

import hashlib
import os
import signal
import sys
from pathlib import Path

import pytest
from launch import Job, launch
from log_kit import MODEL, SHORT, fill, trained, values

from hvdllm import runs
from hvdllm.cli.main import main
from hvdllm.registry import LIBRARIES, parts

HVDLLM = [sys.executable, "-m", "hvdllm"]
EXCHANGES = [
    name for name, part in parts("exchange").items() if part.facts.carries not in LIBRARIES and not part.facts.clients
]


def content(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def begun(tmp_path: Path, *more: str) -> Path:
    """A run on a stream of its own log, as it stands after a while."""
    fill(tmp_path / "log", 240)
    trained(tmp_path, *more)
    (tmp_path / "a" / "log").mkdir(exist_ok=True)
    for path in (tmp_path / "log").iterdir():
        (tmp_path / "a" / "log" / path.name).write_bytes(path.read_bytes())
    return tmp_path / "a"


@pytest.mark.parametrize(
    "exchange",
    [
        name
        if name in ("allreduce", "local_sgd", "parameter_server")
        else pytest.param(name, marks=pytest.mark.thorough)
        for name in EXCHANGES
    ],
)
def test_a_finished_model_branches_off(tmp_path: Path, exchange: str, capsys: pytest.CaptureFixture[str]) -> None:
    short = {**SHORT, "streaming_diloco": ("exchange.local_steps=4", "exchange.fragments=2")}.get(exchange, ())
    size = 3 if exchange == "parameter_server" else 2
    folder = begun(tmp_path, f"exchange={exchange}", "world=virtual", f"world.size={size}", *short)
    before = content(folder)
    assert main(["cooldown", str(folder), f"data_dir={tmp_path / 'data'}", "budget_tokens=960"]) == 0
    assert content(folder) == before
    (made,) = tmp_path.glob("a-cooldown-*")
    records = list(runs.records(made))
    assert (made / "final" / "model.safetensors").exists()
    assert [record["reason"] for record in records if record["kind"] == "end"] == ["budget"]
    rates = values(records, "lr")
    assert 3e-3 * 0.3 >= rates[0] > rates[-1] > 0, "from the rate that was held"
    assert rates == sorted(rates, reverse=True)
    first = [values(list(each), "loss/slice-0", "eval")[-1] for each in (runs.records(folder), records)]
    assert first[1] < first[0] + 0.02, "it begins with the weights of the run"
    config = runs.read_config(made)
    assert config.init_optimizer == (exchange not in ("local_sgd", "diloco", "streaming_diloco"))
    capsys.readouterr()
    assert main(["cooldown", str(folder), f"data_dir={tmp_path / 'data'}", "budget_tokens=960"]) == 0
    assert "has finished" in capsys.readouterr().out


def test_it_takes_the_newest_text_and_the_rate_of_the_checkpoint(tmp_path: Path) -> None:
    """Seen to catch: the rate that is held, taken where the run has just been re-warmed."""
    folder = begun(tmp_path, "schedule.rewarm_at=[1600]")
    assert main(["cooldown", str(folder), f"data_dir={tmp_path / 'data'}", "name=c", "budget_tokens=960"]) == 0
    records = list(runs.records(tmp_path / "c"))
    assert values(records, "lr")[0] == pytest.approx(3e-3 * (0.3 + 0.7 * 320 / 400) * 5 / 6)
    from hvdllm.online.rounds import Rounds

    first = Rounds(tmp_path / "c" / "log").get(0)
    assert first is not None and first.first > 240 * 40 // 16 // 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "needs the folder of a run"),
        (["budget_tokens=9"], "needs the folder of a run"),
        (["{tmp}/none"], "is not the folder of a run"),
        (["{tmp}/other"], "was not trained on a stream"),
        (["{tmp}/a"], "has no whole checkpoint yet"),
        (["{tmp}/b", "optim.lrr=1"], "optim.lrr"),
        (["{tmp}/b", "budget_tokens=1M"], "holds 4,"),
        (["{tmp}/b", "launch=horovodrun"], "start it under a launcher"),
        (["{tmp}/c"], "holds no text: give text.path="),
        (["{tmp}/b", "--step"], "there is no flag --step"),
    ],
)
def test_what_cannot_work_is_a_sentence(
    tmp_path: Path, words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    fill(tmp_path / "log", 120)
    if words and words[0].endswith(("/a", "/b", "/c")):
        name = words[0][-1]
        trained(tmp_path, "budget_tokens=384", "eval_every=0", *(["save_every=0"] * (name == "a")), name=name)
        for path in (tmp_path / "log").iterdir() if name != "c" else ():
            (tmp_path / name / "log" / path.name).write_bytes(path.read_bytes())
    if words and words[0].endswith("other"):
        from hvdllm.config import compose

        runs.Folder(tmp_path / "other").create(compose.compose([]))
    capsys.readouterr()
    assert main(["cooldown", *(word.format(tmp=tmp_path) for word in words)]) == 2
    found = capsys.readouterr().err.splitlines()
    assert len(found) == 1 and said in found[0], found


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cooldown", "--help"]) == 0
    assert "hvdllm cooldown RUN" in capsys.readouterr().out


@pytest.mark.ranks
@pytest.mark.parametrize("how", ["gloo", "torchrun"])
def test_under_a_launcher_while_the_run_goes_on(tmp_path: Path, how: str) -> None:
    """The run trains in another process, saves, publishes and deletes older checkpoints all the time."""
    more = ["text.rate=0", "text.path=" + str(tmp_path / "text.jsonl"), "budget_tokens=1e9", "save_every=19200"]
    lines = [f'{{"text": "{number} the quick brown fox jumps over it"}}\n' for number in range(200_000)]
    (tmp_path / "text.jsonl").write_text("".join(lines))
    common = [f"runs_dir={tmp_path}", f"data_dir={tmp_path / 'data'}"]
    words = [
        *HVDLLM, "train", "text=stream", "text.tokenizer=bytes", "text.slice_tokens=1024", *MODEL, "batch_tokens=192",
        "name=a", *common, "log_every=1920", "eval_every=0", "sample_every=0", "schedule=infinite",
        "schedule.warmup_tokens=400", "schedule.settle_tokens=400", *more,
    ]  # fmt: skip
    with Job(words) as job:
        job.until(lambda: any((tmp_path / "a" / "checkpoints").glob("[0-9]*/manifest.json")))
        command = [*HVDLLM, "cooldown", str(tmp_path / "a"), *common, "budget_tokens=1920", "name=c", "eval_every=0"]
        launch(command, how, 2)
        assert job.process.poll() is None, "the run goes on"
        os.kill(job.process.pid, signal.SIGTERM)
        assert job.wait().code == 75
    (end,) = [record for record in runs.records(tmp_path / "c") if record["kind"] == "end"]
    assert end["reason"] == "budget" and (tmp_path / "c" / "final" / "model.safetensors").exists()
