"""Where the next text of a replayed list begins: in the log, and in the tokens that a run has trained on."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from hvdllm import runs
from hvdllm.cli.main import main
from hvdllm.online.changes import Changes
from hvdllm.online.log import Log, Writer
from hvdllm.online.rounds import Layout, Round, Rounds
from hvdllm.online.sources import made
from hvdllm.text.parts import Stream

KIND = np.dtype(np.uint16)


def texts(folder: Path, count: int = 40) -> list[str]:
    paths = [folder / f"{name}.jsonl" for name in "abc"]
    for path in paths:
        lines = [json.dumps({"text": f"{path.stem * 30} {number}"}) + "\n" for number in range(count)]
        path.write_text("".join(lines))
    return [str(path) for path in paths]


def test_what_is_read_at_a_time_is_of_one_text_also_after_a_restart(tmp_path: Path) -> None:
    settings = Stream(source="replay", path=texts(tmp_path, 3), rate=0)
    source = made(settings, print)
    source.begin([])
    taken = [source.read(0.0) for _ in range(4)]
    assert [each.at for each in taken] == [{"documents": d, "text": t} for d, t in ((3, 0), (6, 1), (9, 2), (9, 2))]
    assert [len(each.texts) for each in taken] == [3, 3, 3, 0] and taken[-1].over
    again = made(settings, print)
    again.begin([taken[0].at, taken[1].at])
    assert again.read(0.0).texts == taken[2].texts


def filled(folder: Path, borders: tuple[int, ...], each: int = 10) -> Changes:
    """A log whose texts have so many tokens, each appended ten tokens at a time, and rounds of two windows of ten."""
    writer = Writer(folder, KIND)
    for text, tokens in enumerate(borders):
        for _ in range(tokens // each):
            writer.append([np.zeros(each, KIND)], 1, each, {"text": text})
    writer.close()
    return Changes(Log(folder, KIND), Rounds(folder), Layout(10, 1000, 1), 10)


def test_a_text_begins_where_the_first_round_with_it_does(tmp_path: Path) -> None:
    """The border, 60 tokens, is behind six windows less one that needs its last target: round 2 has windows 4 and 5."""
    changes, rounds = filled(tmp_path, (60, 30, 50)), Rounds(tmp_path)
    for number in range(3):
        rounds.add(number, Round(2 * number, 2, 1, 2 * number + 2, number))  # 0, 1, 2 windows of the past
    assert changes.passed(20) == [] and changes.passed(50) == []
    assert changes.passed(51) == [(1, 50)], "20 tokens, and 20 with 10 of the past"
    assert changes.passed(10**9) == [], "the round with the third text is not decided yet"
    rounds.add(3, Round(6, 2, 1, 8, 0))
    assert changes.passed(10**9) == []
    rounds.add(4, Round(8, 2, 1, 10, 0))
    assert changes.passed(10**9) == [(2, 110)]


def test_what_an_earlier_life_has_told_is_not_told_again(tmp_path: Path) -> None:
    filled(tmp_path, (60, 30))
    rounds = Rounds(tmp_path)
    for number in range(4):
        rounds.add(number, Round(2 * number, 2, 1, 2 * number + 2, 0))
    told = {
        seen: Changes(Log(tmp_path, KIND), rounds, Layout(10, 1000, 1), 10, seen).passed(80) for seen in (0, 40, 41, 60)
    }
    assert told == {0: [(1, 40)], 40: [(1, 40)], 41: [], 60: []}


@pytest.mark.parametrize("exchange", ["allreduce", "parameter_server"])
def test_a_run_records_where_texts_begin_and_a_resumed_one_does_not_repeat_it(
    tmp_path: Path, exchange: str, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = texts(tmp_path)
    words = [
        "train", "text=stream", f"text.path=[{','.join(paths)}]", "text.rate=0", "text.tokenizer=bytes",
        "text.slice_tokens=1024", "model.layers=1", "model.width=16", "model.heads=2", "model.context=16",
        "batch_tokens=192", "name=a", f"runs_dir={tmp_path}", f"data_dir={tmp_path / 'data'}", "device=cpu",
        "device.threads=1", "log_every=192", "eval_every=0", "save_every=384", "sample_every=0", "schedule=constant",
        "schedule.warmup=0", f"exchange={exchange}", "world=virtual", "world.size=2",
    ]  # fmt: skip
    assert main([*words, "budget_tokens=1536"]) == 0
    assert main([*words, "budget_tokens=3072"]) == 0
    events = [each for each in runs.records(tmp_path / "a") if "change" in each]
    assert [(each["change"], each["what"]) for each in events] == [
        (each["change"], f"text {each['change'] + 1} of the stream begins after {each['change_tokens']:,} tokens")
        for each in events
    ]
    assert [each["change"] for each in events] == [1, 2]
    assert all(each["change_tokens"] < each["tokens"] for each in events)
    said = capsys.readouterr().out
    assert "text 2 of the stream begins after" in said and "nats a token, of all text before it was learnt" in said
    assert "a faster disk" not in said
    *_, end = (each for each in runs.records(tmp_path / "a") if each["kind"] == "end")
    assert end["prequential_whole"] > 0
