"""Files that somebody else may have written: regular ones, inside their folder, of a sane size and depth."""

import gzip
import json
import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hvdllm import runs, untrusted
from hvdllm.errors import RunError, UserError
from hvdllm.text import corpus
from hvdllm.text.parts import Files
from hvdllm.text.tokenize import BYTES, Tokenizer
from hvdllm.track import process


def test_a_regular_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"a": [1, {"b": null}]}')
    (tmp_path / "link").symlink_to("a.json")
    for name in ("a.json", "link"):  # a link that stays inside is as good
        assert untrusted.read_json(tmp_path / name, 100, tmp_path) == {"a": [1, {"b": None}]}


def odd(kind: str, folder: Path) -> Path:
    """A file that is none, and would be waited for, or read for ever."""
    path = folder / "odd"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "link out":
        (folder.parent / "outside").write_text("{}")
        path.symlink_to(folder.parent / "outside")
    elif kind == "loop":
        path.symlink_to("odd")
    elif kind == "folder":
        path.mkdir()
    else:
        with open(path, "wb") as file:
            file.truncate(2**40)  # holes: nothing on the disk
    return path


KINDS = ["pipe", "device", "link out", "loop", "folder", "huge"]


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_file_of_the_folder_is_not_read(tmp_path: Path, kind: str) -> None:
    (tmp_path / "in").mkdir()
    with pytest.raises((untrusted.Unfit, OSError)):
        untrusted.read(odd(kind, tmp_path / "in"), 1000, tmp_path / "in")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["config.yaml", "tokenizer.json", "metrics.jsonl", "track.json"])
def test_no_reader_of_a_runs_folder_waits_or_follows(tmp_path: Path, kind: str, name: str) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    odd(kind, folder).rename(folder / name)
    if name == "config.yaml":
        with pytest.raises(UserError, match=r"config\.yaml") as error:
            runs.read_config(folder)
        assert "\n" not in str(error.value)
    elif name == "tokenizer.json":
        with pytest.raises(UserError, match=r"tokenizer\.json"):
            Tokenizer.load(folder / name, folder)
    elif name == "metrics.jsonl":
        said: list[str] = []
        assert list(runs.records(folder, said.append)) == [] and len(said) <= 1
    else:
        assert process.read_state(folder) == {}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: &a [1]\nb: *a\n", "alias"),
        ("a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n", "alias"),
        ("[" * 500 + "]" * 500, "nested|not YAML"),
        ("a: " + "[" * 40 + "]" * 40, "nested"),
        ("a: [", "not YAML"),
        ("? [a]\n: b", "not YAML"),
        ("a: 2000-99-99", "not YAML"),
    ],
)
def test_yaml_of_strangers(text: str, says: str) -> None:
    with pytest.raises(untrusted.Unfit, match=says):
        untrusted.parsed_yaml(text.encode())


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 40 + "1" + "}" * 40, "{", "nul", "1" * 5000, b"\xff"])
def test_json_of_strangers(text: Any) -> None:
    with pytest.raises(untrusted.Unfit):
        untrusted.parsed(text)


def test_a_link_is_not_written_through(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("mine")
    folder = runs.Folder(tmp_path / "run")
    folder.path.mkdir()
    for name in ("log.txt", "metrics.jsonl", "tokenizer.json", "config.yaml"):
        (folder.path / name).symlink_to(precious)
    with pytest.raises(RunError, match="link"):
        folder.append("log.txt", "x")
    with pytest.raises(RunError, match="link"):
        folder.record("run", {})
    runs.write_whole(folder.path / "config.yaml", "new")
    Tokenizer(BYTES).save(folder.path / "tokenizer.json")
    assert precious.read_text() == "mine" and not (folder.path / "config.yaml").is_symlink()


def test_a_temporary_name_that_is_taken_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("mine")
    (tmp_path / f".a.{os.getpid()}").symlink_to("precious")
    runs.write_whole(tmp_path / "a", "new")
    assert (tmp_path / "precious").read_text() == "mine" and (tmp_path / "a").read_text() == "new"


def fifo(path: Path) -> None:
    os.mkfifo(path)


def deep(path: Path) -> None:
    path.write_text("[" * 100_000 + "\n")


def long(path: Path) -> None:
    path.write_text('{"text": "' + "x" * (untrusted.MOST_LINE + 1) + '"}\n')


@pytest.mark.parametrize(("make", "says"), [(fifo, "regular"), (deep, "nested too deeply"), (long, "line 1")])
def test_a_text_is_not_trusted_either(tmp_path: Path, make: Callable[[Path], None], says: str) -> None:
    make(tmp_path / "a.jsonl")
    with pytest.raises(UserError, match=says) as error:
        list(corpus.documents(Files(path=str(tmp_path / "a.jsonl"))))
    assert "a.jsonl" in str(error.value) and "\n" not in str(error.value)


def test_a_line_that_grows_when_it_is_unpacked_takes_bounded_memory(tmp_path: Path) -> None:
    with gzip.open(tmp_path / "a.jsonl.gz", "wb", compresslevel=1) as file:
        file.write(b'{"text": "')
        for _ in range(150):
            file.write(b"x" * 2**20)
        file.write(b'"}\n')
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match="16 MiB in line 1"):
        list(corpus.documents(Files(path=str(tmp_path / "a.jsonl.gz"))))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 150 * 1024  # kB


def test_a_state_of_a_tracker_of_another_form_is_none(tmp_path: Path) -> None:
    good = {"id": "0a1b2c3d4e5f", "records": 3, "tokens": 99}
    bad = {"a": {"id": "../../x", "records": 1}, "b": {"records": "many"}, "c": [], "d": {"id": "x" * 200}}
    (tmp_path / "track.json").write_text(json.dumps({"wandb": good, **bad}))
    assert process.read_state(tmp_path) == {"wandb": good}
