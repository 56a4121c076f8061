"""Paths and names that no file system could take are a sentence where they enter."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import pytest

from hvdllm.config.check import check
from hvdllm.config.compose import compose, config_folder
from hvdllm.errors import UserError
from hvdllm.paths import argument, check_name, path_of
from hvdllm.text.corpus import sources
from hvdllm.trainer.resume import asked
from hvdllm.world.detect import Place

LONG = "a" * 300
ODD = [LONG, f"{LONG}/b", "~nobody-of-that-name/x", "a\0b", "b/" * 3000]


@pytest.mark.parametrize("path", ODD)
def test_a_path_that_cannot_be(path: str) -> None:
    for call in (
        lambda: path_of(path, "x="),
        lambda: asked([f"resume={path}"]),
        lambda: config_folder(path),
        lambda: sources(compose(["text=files", f"text.path={path}"]).text),
        *(
            lambda key=key: check(compose(["text=files", "text.path=.", f"{key}={path}"]), Place())  # type: ignore[misc]
            for key in ("runs_dir", "data_dir", "init_from", "text.tokenizer", "text.path", "text.validation")
        ),
    ):
        with pytest.raises(UserError, match="cannot be opened") as error:
            call()
        assert "\n" not in str(error.value) and len(str(error.value)) < 200
    with pytest.raises(argparse.ArgumentTypeError):
        argument(path)


def test_links_in_a_circle(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(UserError, match="cannot be opened"):
        path_of(str(tmp_path / "a"), "x=")


def test_what_can_be(tmp_path: Path) -> None:
    (tmp_path / "gone").symlink_to("nowhere")
    for path in (tmp_path, tmp_path / "new" / "x", tmp_path / "gone", Path("~/x").expanduser()):
        assert path_of(str(path), "x=") == path
    assert argument("runs/optim.lr=1,seed=2") == Path("runs/optim.lr=1,seed=2")
    check_name("ü" * 100, "name")


@pytest.mark.parametrize("name", ["", ".", "..", ".a", "a/b", LONG, "ü" * 101, "a\0b", "a\nb", "\x1b[2J", "\ud800"])
def test_names(name: str) -> None:
    with pytest.raises(UserError) as error:
        check_name(name, "name")
    assert "\n" not in str(error.value) and len(str(error.value)) < 200
    assert os.sep not in name or "slashes" in str(error.value)


@pytest.mark.parametrize("word", ["project=a/b", "project=" + "a" * 200, "entity=a#b", "group=a:b", "project="])
def test_what_wandb_would_refuse_is_refused_before_the_start(word: str) -> None:
    pytest.importorskip("wandb")
    with pytest.raises(UserError, match=f"track.{word.partition('=')[0]}"):
        check(compose(["track=wandb", f"track.{word}"]), Place())
