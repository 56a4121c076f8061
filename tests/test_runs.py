"""A run's folder: records that survive a kill, and one sentence where the disk or the file is at fault."""

import errno
import os
import re
from pathlib import Path
from typing import Any

import pytest

from hvdllm import runs
from hvdllm.config import compose
from hvdllm.errors import RunError, UserError


def test_names_sort_by_time_and_differ() -> None:
    names = {runs.new_name() for _ in range(20)}
    assert len(names) > 1 and all(re.fullmatch(r"\d{8}-\d{6}-[0-9a-f]{4}", name) for name in names)


def test_a_folder_reads_back(tmp_path: Path) -> None:
    folder = runs.Folder(tmp_path / "deep" / "run")
    config = compose.compose(["seed=3", "optim=sgd", "sample_prompt='for x in:'"])
    folder.create(config)
    folder.create(config)  # again, when a run goes on
    assert runs.read_config(folder.path) == config and (folder.path / "checkpoints").is_dir()
    for text in ("one\n", "zwei ü\n"):
        folder.append("log.txt", text)
    assert (folder.path / "log.txt").read_text(encoding="utf-8") == "one\nzwei ü\n"


@pytest.mark.parametrize("content", [None, "", "[1, 2]", "a: [", "seed: 1"])
def test_what_is_no_configuration(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "config.yaml").write_text(content)
    with pytest.raises(UserError) as error:
        runs.read_config(tmp_path)
    assert "\n" not in str(error.value)


def test_records(tmp_path: Path) -> None:
    assert list(runs.records(tmp_path)) == []
    folder = runs.Folder(tmp_path)
    folder.record("run", {"text": "a\u2028b"})
    folder.record("end", {"tokens": 3}, sync=True)
    assert list(runs.records(tmp_path)) == [{"kind": "run", "text": "a\u2028b"}, {"kind": "end", "tokens": 3}]
    folder.close()
    folder.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert all(line.startswith('{"kind": ') for line in lines)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('7\n[]\nnot json\n{"kind": "commit", "tok')
    assert [record["kind"] for record in runs.records(tmp_path)] == ["run", "end"]


LIFE = [
    *[("run", {}), ("commit", {"tokens": 100}), ("eval", {"tokens": 200}), ("save", {"tokens": 200})],
    *[("commit", {"tokens": 200}), ("event", {"what": "resumed", "tokens": 200}), ("commit", {"tokens": 300})],
    *[("eval", {"tokens": 300}), ("save", {"tokens": 300}), ("end", {"tokens": 150})],
]


@pytest.mark.parametrize(
    ("tokens", "left"), [(200, [0, 1, 2, 3, 5]), (300, [0, 1, 2, 3, 4, 5, 7, 8]), (0, [0, 5]), (None, [0, 5])]
)
def test_what_a_resume_takes_back(tmp_path: Path, tokens: int | None, left: list[int]) -> None:
    folder = runs.Folder(tmp_path)
    for kind, values in LIFE:
        folder.record(kind, values)
    folder.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"kind": "eval", "tokens": 1')
    folder.truncate(tokens)
    folder.record("commit", {"tokens": 999})
    folder.close()
    expected = [{"kind": LIFE[i][0], **LIFE[i][1]} for i in left] + [{"kind": "commit", "tokens": 999}]
    said: list[str] = []
    assert list(runs.records(tmp_path, said.append)) == expected and not said


def test_nothing_to_take_back(tmp_path: Path) -> None:
    runs.Folder(tmp_path).truncate(None)
    assert (tmp_path / "metrics.jsonl").read_text() == ""


@pytest.mark.parametrize("act", ["create", "cut", "append", "record"])
def test_a_disk_that_refuses_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, act: str) -> None:
    def full(*args: Any, **more: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    folder = runs.Folder(tmp_path)
    monkeypatch.setattr(runs, "write_whole", full)
    monkeypatch.setattr("builtins.open", full)
    calls = {
        "create": lambda: folder.create(compose.Config()),
        "cut": lambda: folder.truncate(None),
        "append": lambda: folder.append("log.txt", "x"),
        "record": lambda: folder.record("commit", {}),
    }
    with monkeypatch.context() as patch:
        patch.setattr(compose, "to_yaml", lambda config: "")
        with pytest.raises(RunError, match=re.escape(f"cannot write to {tmp_path} (No space left on device)")) as error:
            calls[act]()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_file_is_whole_or_the_old_one_when_a_kill_comes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    path = tmp_path / "file"
    runs.write_whole(path, b"old")

    class Killed(BaseException):
        pass

    def kill(*args: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(os, call, kill)
        with pytest.raises(Killed):
            runs.write_whole(path, "new and longer")
    assert path.read_bytes() == b"old"
    runs.write_whole(path, "new")
    assert path.read_text() == "new"
    assert [file.name for file in tmp_path.iterdir()] == ["file"], "what the kill left was taken over"
