"""The process that follows a run's records, and the run's end of it: what a bad tracker does to a run, nothing."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from hvdllm.config import check, compose
from hvdllm.errors import UserError
from hvdllm.track import base, mirror, process
from hvdllm.track.mirror import Mirror
from hvdllm.world.detect import Place

CONFIG = compose.compose(["track=tensorboard"])


class Kept:
    """A tracker that keeps what it gets, and raises at records whose `bad` is set."""

    def __init__(self, before: list[dict[str, Any]]) -> None:
        self.before, self.got, self.failed = before, [], None

    def record(self, number: int, record: dict[str, Any]) -> None:
        if record.get("bad"):
            raise ValueError("it does not fit")
        self.got.append((number, record["tokens"]))

    def close(self, failed: bool) -> None:
        self.failed = failed


def served(folder: Path, *batches: list[dict[str, Any]]) -> tuple[Kept, list[str]]:
    made: list[Kept] = []
    said: list[Any] = []

    def make(config: Any, folder: Path, kept: dict[str, Any], before: Any, say: Any) -> Kept:
        made.append(Kept(before))
        return made[0]

    process.serve(folder, "kept", CONFIG, make, iter(batches), lambda what, value: said.append((what, value)))
    assert ("started", None) in said
    return made[0], [value for what, value in said if what == "say"]


def of(kind: str, tokens: int = 0, **more: Any) -> dict[str, Any]:
    return {"kind": kind, "tokens": tokens, **more}


def test_a_record_that_raises_is_said_once_and_the_rest_arrives(tmp_path: Path, capsys: Any) -> None:
    got, said = served(tmp_path, [of("run"), of("commit", 1, bad=True), of("commit", 2)], [of("commit", 3, bad=True)])
    assert got.got == [(0, 0), (2, 2)] and len(said) == 1 and "it does not fit" in said[0]
    assert capsys.readouterr().err.count("Traceback") == 2


def test_numbers_grow_over_lives_while_tokens_go_back(tmp_path: Path) -> None:
    first = [of("run"), of("commit", 1), of("commit", 2), of("commit", 3)]
    served(tmp_path, first)
    second = [*first[:2], of("run"), of("event", 1), of("commit", 2)]  # cut behind a checkpoint at 1
    got, _ = served(tmp_path, second, [of("end", 2, reason="budget")])
    assert got.got == [(4, 0), (5, 1), (6, 2), (7, 2)] and got.before == second[:2] and got.failed is False
    assert json.loads((tmp_path / "track.json").read_text()) == {"kept": {"records": 8, "tokens": 3}}


def test_what_was_never_sent_comes_with_the_next_life(tmp_path: Path) -> None:
    served(tmp_path, [of("run"), of("commit", 1)])
    got, _ = served(tmp_path, [of("run"), of("commit", 1), of("commit", 2), of("run"), of("commit", 3)])
    assert [tokens for _, tokens in got.got] == [2, 0, 3]


@pytest.mark.parametrize(
    ("end", "failed"), [([], True), ([of("end", reason="failed")], True), ([of("end", reason="stop")], False)]
)
def test_a_run_without_an_end_was_killed(end: list[dict[str, Any]], failed: bool, tmp_path: Path) -> None:
    assert served(tmp_path, [of("run"), *end])[0].failed is failed


def test_a_broken_state_begins_anew(tmp_path: Path) -> None:
    (tmp_path / "track.json").write_text("[")
    assert served(tmp_path, [of("run")])[0].got == [(0, 0)]


def test_following_a_file_that_grows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alarms: list[int] = []
    monkeypatch.setattr("signal.alarm", alarms.append)
    monkeypatch.setattr(process, "EVERY_S", 0.0)
    ends = os.pipe()
    path = tmp_path / "metrics.jsonl"
    with open(path, "w", buffering=1) as out, open(path) as file:
        out.write('{"kind": "run"}\nnot JSON\n[1]\n{"kind": "com')
        batches = process.follow(file, ends[0])
        assert next(batches) == [{"kind": "run"}]
        out.write('mit"}\n{"kind": "end"}\n')
        out.flush()
        assert next(batches) == [{"kind": "commit"}, {"kind": "end"}] and alarms == []
        (tmp_path / "new").write_text('{"kind": "other life"}\n')
        os.replace(tmp_path / "new", path)
        out.write('{"kind": "last"}\n')
        out.flush()
        os.close(ends[1])
        assert list(batches) == [[{"kind": "last"}]] and alarms == [round(base.END_S)]
    os.close(ends[0])


def test_names() -> None:
    record = {
        "kind": "commit",
        "tokens": 4,
        "loss": 1.5,
        "hidden": None,
        "micro_batches_by_rank": [2, 3, 7],
        "none": [],
    }
    by_rank = {f"train/micro_batches_by_rank/{what}": value for what, value in (("min", 2), ("mean", 4), ("max", 7))}
    assert dict(base.named(record)) == {"train/loss": 1.5, **by_rank}
    assert dict(base.named({"kind": "eval", "loss": 2.0})) == {"eval/loss": 2.0}


# ------------------------------------------------------------------ the run's end
def ran(code: str, tmp_path: Path, patient: bool = False) -> tuple[list[str], Mirror]:
    said: list[str] = []
    one = Mirror([sys.executable, "-c", code], tmp_path, said.append)
    one._thread.join() if "exit" in code else one.refusal(60)
    one.close(patient)
    assert one._process is not None and one._process.poll() is not None
    return said, one


def test_a_tracker_that_dies_is_said_once(tmp_path: Path) -> None:
    said, one = ran("import sys; print('{\"x\": 1}\\n[]\\n...'); sys.exit('no room')", tmp_path)
    assert len(said) == 1 and "the run goes on" in said[0]
    assert one.refusal(0) is not None and (tmp_path / "track.log").read_text() == "no room\n"


@pytest.mark.parametrize("patient", [True, False])
def test_a_tracker_that_hangs_is_ended(patient: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mirror, "STOP_S", 0.1)
    monkeypatch.setattr(mirror, "END_S", -0.9)
    said, one = ran("import time; print('{\"started\": null}', flush=True); time.sleep(1000)", tmp_path, patient)
    assert len(said) == patient and one._process is not None and one._process.returncode == -9


@pytest.mark.parametrize(
    ("end", "patient", "says"), [("exit(3)", True, 1), ("exit(3)", False, 1), ("exit(0)", True, 0)]
)
def test_a_tracker_that_fails_behind_the_end_of_the_run_is_said(
    end: str, patient: bool, says: int, tmp_path: Path
) -> None:
    """A short run is over before its tracker has started. Seen to catch: its exit code that nobody looks at."""
    said: list[str] = []
    code = f"import os, sys; print('{{\"started\": null}}', flush=True); sys.stdin.read(); os._{end}"
    one = Mirror([sys.executable, "-c", code], tmp_path, said.append)
    one.refusal(60)
    one.close(patient)
    assert len(said) == says and all("the tracker failed" in text for text in said)


def test_one_that_cannot_be_started(tmp_path: Path) -> None:
    said: list[str] = []
    one = Mirror([str(tmp_path / "nothing")], tmp_path, said.append)
    one.close(True)
    assert len(said) == 1 and "No such file" in said[0] and "ended" in str(one.refusal(0))


def test_none_is_none(tmp_path: Path) -> None:
    assert mirror.start(compose.compose([]), tmp_path, pytest.fail) is None and not list(tmp_path.iterdir())


# ------------------------------------------------------------------ what is said before training
@pytest.mark.parametrize(
    ("word", "says"),
    [("track.tags=''", "track.tags="), ("track.tags=[a,'']", "list of tags"), ("track.project=''", "track.project")],
)
def test_settings_that_cannot_be(word: str, says: str) -> None:
    here = Place("none", 0, 1)
    check.check(compose.compose(["track=wandb", "track.tags=[a,b]"]), here)
    with pytest.raises(UserError, match=says.replace("[", r"\[")):
        check.check(compose.compose(["track=wandb", word]), here)


@pytest.mark.parametrize("name", ["wandb", "tensorboard"])
def test_a_package_that_is_not_there(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=f"pip install {name}"):
        check.check(compose.compose([f"track={name}"]), Place("none", 0, 1))
