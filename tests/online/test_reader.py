"""The process that reads: whatever dies, each document is in the log once, and what is trained on follows the log."""

from __future__ import annotations

import json
import os
import resource
import signal
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from redis_server import Server

from hvdllm import runs
from hvdllm.cli.main import main
from hvdllm.errors import RunError
from hvdllm.online import intake as intake_module
from hvdllm.online.intake import Intake
from hvdllm.online.log import Log, Writer
from hvdllm.text.parts import Stream
from hvdllm.text.tokenize import BYTES, Tokenizer

LIMIT_S = 60.0


def tokenizer(folder: Path) -> Path:
    Tokenizer(BYTES).save(folder / "tokenizer.json")
    return folder / "tokenizer.json"


def until(what: object, limit_s: float = LIMIT_S) -> None:
    end = time.monotonic() + limit_s
    while not what():  # type: ignore[operator]
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.02)


def in_log(folder: Path) -> list[str]:
    log = Log(folder, np.dtype(np.uint16))
    log.refresh()
    tokens = log.tokens(0, log.last.tokens)
    return [Tokenizer(BYTES).decode(each) for each in np.split(tokens, np.flatnonzero(tokens == 256) + 1) if len(each)]


def test_a_reader_that_is_killed_again_and_again_brings_each_document_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen to catch: a place that is written before the tokens, tokens behind the last entry that stay."""
    monkeypatch.setattr(intake_module, "AGAIN_S", (0.05,))
    source, log, said = tmp_path / "source", tmp_path / "log", list[str]()
    source.mkdir()
    log.mkdir()
    wanted = [f"document {number} " + "x" * (number % 50) for number in range(3000)]
    intake = Intake(Stream(source="folder", path=str(source)), log, tokenizer(tmp_path), said.append)
    try:
        for first in range(0, 3000, 500):
            rows = "".join(json.dumps({"text": text}) + "\n" for text in wanted[first : first + 500])
            with (source / f"{first % 1000}.jsonl").open("a") as out:
                out.write(rows)
            time.sleep(0.1)
            until(lambda: intake._process.poll() is None)
            os.kill(intake._process.pid, signal.SIGKILL)
        until(lambda: len(in_log(log)) >= 3000)
    finally:
        intake.close()
    assert Counter(in_log(log)) == Counter(wanted)
    assert any("is started again" in each for each in said)


def test_a_full_disk_stops_the_intake_is_said_once_and_goes_on_when_there_is_room(tmp_path: Path) -> None:
    """Seen to catch: documents that are lost or doubled where an append fails half way."""
    source, log, said = tmp_path / "source", tmp_path / "log", list[str]()
    source.mkdir()
    log.mkdir()
    wanted = [f"document {number}" for number in range(4000)]
    intake = Intake(Stream(source="folder", path=str(source)), log, tokenizer(tmp_path), said.append)
    reader = intake._process.pid
    try:
        until((log / "index.jsonl").exists)
        resource.prlimit(reader, resource.RLIMIT_FSIZE, (20_000, -1))  # files may not grow beyond that
        for first in range(0, 4000, 400):
            rows = "".join(json.dumps({"text": text}) + "\n" for text in wanted[first : first + 400])
            (source / f"{first:04}.jsonl").write_text(rows)
        until(lambda: any("cannot be written" in each for each in said))
        intake.check()  # training goes on
        time.sleep(2.5)
        resource.prlimit(reader, resource.RLIMIT_FSIZE, (-1, -1))
        until(lambda: len(in_log(log)) >= 4000)
    finally:
        intake.close()
    assert in_log(log) == wanted and intake._process.pid == reader
    assert [("cannot be written" in each, "can be written again" in each) for each in said] == [
        (True, False), (False, True),
    ]  # fmt: skip


def test_what_redis_has_trimmed_before_it_was_read_is_a_sentence_with_the_gap(tmp_path: Path) -> None:
    pytest.importorskip("redis")
    try:
        server = Server(tmp_path)
    except FileNotFoundError as error:
        pytest.skip(str(error))
    log, said = tmp_path / "log", list[str]()
    log.mkdir()
    for number in range(100):
        server.client.xadd("documents", {"text": f"document {number}"})
    server.client.xtrim("documents", maxlen=40, approximate=False)
    settings = Stream(source="redis", address=server.address)
    intake = Intake(settings, log, tokenizer(tmp_path), said.append)
    try:
        until(lambda: len(in_log(log)) == 40 and said)
    finally:
        intake.close()
        server.close()
    assert said == ["60 entries were gone from the stream before they were read: a gap in what is learnt"]


def test_the_log_of_another_source_is_one_sentence(tmp_path: Path) -> None:
    log = tmp_path / "log"
    writer = Writer(log, np.dtype(np.uint16))
    writer.append([np.arange(3, dtype=np.uint16)], 1, 3, {"files": "none", "documents": []})
    writer.close()
    intake = Intake(Stream(source="folder", path=str(tmp_path)), log, tokenizer(tmp_path), print)
    try:
        until(lambda: intake._problem is not None)
        assert "was not read from text.source=folder: take a new run" in str(intake._problem)
    finally:
        intake.close()


def test_what_the_reader_cannot_do_is_one_sentence(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.mkdir()
    intake = Intake(Stream(source="folder", path="/nonexistent"), log, tokenizer(tmp_path), print)
    try:
        until(lambda: intake._problem is not None)
        with pytest.raises(RunError, match="there is no such folder"):
            intake.check()
    finally:
        intake.close()


def test_a_reader_ends_with_its_parent(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.mkdir()
    pid = os.fork()
    if pid == 0:
        try:
            intake = Intake(Stream(source="folder", path=str(tmp_path)), log, tokenizer(tmp_path), print)
            (tmp_path / "pid").write_text(str(intake._process.pid))
        finally:
            os._exit(0)  # without close(): as if it was killed
    os.waitpid(pid, 0)
    reader = int((tmp_path / "pid").read_text())

    def gone() -> bool:
        try:
            return Path(f"/proc/{reader}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
        except FileNotFoundError:
            return True

    until(gone)


def words(tmp_path: Path, *more: str) -> list[str]:
    return [
        "train", "text=stream", "text.tokenizer=bytes", "text.slice_tokens=2048", "model.layers=1", "model.width=16",
        "model.heads=2", "model.context=16", "batch_tokens=192", "name=a", f"runs_dir={tmp_path}", "device=cpu",
        f"data_dir={tmp_path / 'data'}", "device.threads=1", "log_every=192", "eval_every=4000", "save_every=960",
        "sample_every=0", "text.wait_s=0.2", "schedule=infinite", "schedule.warmup_tokens=400", *more,
    ]  # fmt: skip


def test_a_run_plays_a_text_evaluates_slices_publishes_and_ends_with_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text").mkdir()
    for number in range(60):
        (tmp_path / "text" / f"{number:02}.txt").write_text(
            f"{number} the quick brown fox jumps over the lazy dog " * 4
        )
    more = [f"text.path={tmp_path / 'text'}", "text.rate=0", "budget_tokens=100000", "publish_every=1920"]
    assert main(words(tmp_path, *more)) == 75  # the stream has ended before the budget
    records = list(runs.records(tmp_path / "a"))
    evals = [record for record in records if record["kind"] == "eval"]
    assert evals and "loss/slice-0" in evals[-1]
    commits = [record for record in records if record["kind"] == "commit"]
    assert commits[-1]["prequential_recent"] < commits[0]["prequential_recent"]
    assert commits[-1]["arrived"] <= 60
    assert len(in_log(tmp_path / "a" / "log")) == 60
    latest = tmp_path / "a" / "published" / "latest"
    assert (latest / "model.safetensors").exists() and len(os.listdir(tmp_path / "a" / "published")) == 3
    capsys.readouterr()
    assert main(["cooldown", str(tmp_path / "a"), "name=cool", "budget_tokens=960"]) == 0
    assert (tmp_path / "cool" / "final" / "model.safetensors").exists()
    rates = [record["lr"] for record in runs.records(tmp_path / "cool") if record["kind"] == "commit"]
    assert rates == sorted(rates, reverse=True) and rates[-1] < rates[0]


def test_a_stream_goes_on_where_it_was_stopped_while_documents_arrive(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    wanted = [f"{number} the quick brown fox jumps over the lazy dog" for number in range(400)]
    done = threading.Event()

    def write() -> None:
        with (source / "a.jsonl").open("a") as out:
            for text in wanted:
                out.write(json.dumps({"text": text}) + "\n")
                out.flush()
                if done.wait(0.005):
                    return

    def stop() -> None:
        until(lambda: (tmp_path / "a" / "log" / "rounds.bin").exists())
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGINT)

    threads = [threading.Thread(target=write), threading.Thread(target=stop)]
    for thread in threads:
        thread.start()
    more = ["text.source=folder", f"text.path={source}"]
    try:
        assert main(words(tmp_path, *more, "budget_tokens=100000")) == 75
        assert main(words(tmp_path, *more, "budget_tokens=9600")) == 0
    finally:
        done.set()
        for thread in threads:
            thread.join()
    found = in_log(tmp_path / "a" / "log")
    assert found == wanted[: len(found)]


def test_where_a_stream_arrives_is_not_taken_from_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("the quick brown fox " * 400)
    play = [f"text.path={tmp_path / 'text'}", "text.rate=0"]
    assert main(words(tmp_path, *play, "budget_tokens=1920")) == 0
    assert main(["train", f"resume={tmp_path / 'a'}", "budget_tokens=3840"]) == 2
    assert "give text.source=replay and what goes with it again" in capsys.readouterr().err
    assert main(["train", f"resume={tmp_path / 'a'}", "budget_tokens=3840", "text.source=replay", *play]) == 0
