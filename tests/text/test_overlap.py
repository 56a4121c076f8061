"""Validation text that stands in the training text: what is told apart, and how much is left."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest

from hvdllm.text import overlap, shards
from hvdllm.text.corpus import documents
from hvdllm.text.overlap import RUN, repeated, share
from hvdllm.text.parts import Files


def slow(train: np.ndarray, validation: np.ndarray) -> list[bool]:
    runs = {tuple(train[k : k + RUN].tolist()) for k in range(len(train) - RUN + 1)}
    return [tuple(validation[k : k + RUN].tolist()) in runs for k in range(len(validation) - RUN + 1)]


@pytest.mark.parametrize("block", [1, 7, 64, 10_000])
def test_runs_are_found_wherever_they_stand(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overlap, "BLOCK", block)
    draw = np.random.default_rng(0)
    train = draw.integers(0, 4, 700, dtype=np.uint16)
    own = draw.integers(0, 4, 120, dtype=np.uint16)
    validation = np.concatenate([own, train[-RUN:], own[:9], train[100:180], own[9:], train[: RUN - 1], train[:RUN]])
    found = repeated(train, validation)
    assert found.tolist() == slow(train, validation) and 30 < found.sum() < 60


def test_what_is_shorter_than_a_run_repeats_nothing() -> None:
    few, many = np.zeros(RUN - 1, dtype=np.uint16), np.zeros(200, dtype=np.uint16)
    assert len(repeated(many, few)) == 0 and not repeated(few, many).any() and repeated(many, many).all()


def test_the_share_is_of_windows_that_hold_a_whole_run() -> None:
    context = 60  # windows of 61 tokens: a run of 50 fits at places 0 to 11
    seen = np.zeros(6 * context, dtype=bool)
    for place in (11, context + 12, 3 * context):
        seen[place] = True
    assert share(seen, context, 5) == 2 / 5, "the second begins too late to lie in its window"
    assert share(seen, context, 1) == 1 and share(np.zeros(0, dtype=bool), context, 3) == 0


# ------------------------------------------------------------------ told apart by content
def lines(seed: int, count: int) -> str:
    draw = random.Random(seed)
    return "".join(" ".join(str(draw.random()) for _ in range(3)) + "\n" for _ in range(count))


def sides(path: Path, **more: object) -> tuple[set[str], set[str]]:
    """Lines of the training text, and of the validation text."""
    found: tuple[list[str], list[str]] = ([], [])
    for each in documents(Files(path=str(path), **more)):  # type: ignore[arg-type]
        found[each.held_out].append(each.text)
    train, valid = (set("".join(side).splitlines()) - {""} for side in found)
    return train, valid


def test_copies_that_differ_in_their_end_are_on_one_side(tmp_path: Path) -> None:
    for k in range(60):
        text = lines(k, 40)
        (tmp_path / f"{k}-a.txt").write_text(text)
        (tmp_path / f"{k}-b.txt").write_text(text.rstrip("\n") + "\n\n" * (k % 3))
        (tmp_path / f"{k}-c.txt").write_bytes(text.replace("\n", "\r\n").encode())
    train, valid = sides(tmp_path, validation_share=0.3)
    assert valid and not valid & train


def test_a_part_of_a_large_file_that_stands_elsewhere_is_on_one_side_but_for_its_ends(tmp_path: Path) -> None:
    """1.6 MB, and the same again behind a line, before one, and without a twentieth in the middle. Cut at every 64 KiB,
    three quarters of the validation lines stood in the training text."""
    text = lines(0, 28_000)
    cut = len(text) // 2
    copies = {"a": text, "b": "one line more\n" + text, "c": text + "a last line\n"}
    for name, copy in {**copies, "d": text[: cut - 40_000] + text[cut + 40_000 :]}.items():
        (tmp_path / f"{name}.txt").write_text(copy)
    train, valid = sides(tmp_path, validation_share=0.3)
    assert len(valid) > 1000 and len(valid & train) < 0.15 * len(valid)


def test_what_text_validation_has_is_left_out_of_training_whatever_it_is_called(tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    for k in range(4):
        (tmp_path / "text" / f"{k}.txt").write_text(lines(k, 50))
    held = tmp_path / "held.txt"
    held.write_text(lines(2, 50))
    copies: list[str] = []
    text = Files(path=str(tmp_path / "text"), validation=str(held), tokenizer="bytes")
    train = [each.text for each in documents(text, copies) if not each.held_out]
    assert copies == [str(tmp_path / "text" / "2.txt")] and lines(2, 50) not in train and len(train) == 3
    said = shards.prepare(text, tmp_path / "data", say=lambda words: None).notes
    assert said == [f"{copies[0]} has text that text.validation has too; it was left out of the training text"]


# ------------------------------------------------------------------ said
def test_the_share_is_kept_and_said(tmp_path: Path) -> None:
    shared = lines(9, 30)
    (tmp_path / "train.txt").write_text(lines(1, 400) + shared)
    (tmp_path / "valid.txt").write_text(lines(2, 90) + shared)
    text = Files(path=str(tmp_path / "train.txt"), validation=str(tmp_path / "valid.txt"), tokenizer="bytes")
    corpus = shards.prepare(text, tmp_path / "data", say=lambda words: None)
    assert corpus.repeated(64, 0) == pytest.approx(0.25, abs=0.02) and corpus.repeated(64, 640) == 0
    again = shards.prepare(text, tmp_path / "data", say=lambda words: None)
    assert again.repeated(64, 0) == corpus.repeated(64, 0)
    (corpus.folder / shards.SEEN).unlink()
    assert shards.prepare(text, tmp_path / "data", say=lambda words: None).repeated(64, 0) is None


def test_a_run_that_goes_on_finds_the_text_that_an_older_version_prepared(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(lines(1, 4000))
    text = Files(path=str(tmp_path / "a.txt"), tokenizer="bytes")
    new = shards.prepare(text, tmp_path / "data", say=lambda words: None)
    older = tmp_path / "data" / shards.key_of({**shards.recipe_of(text), "format": 1})
    new.folder.rename(older)
    head, *_ = (older / "train.bin").read_bytes().partition(b"}")
    assert json.loads(head[len(shards.MAGIC) :] + b"}")["tokens"] == len(new.train)
    said: list[str] = []
    assert shards.prepare(text, tmp_path / "data", say=said.append, wanted=new.data_hash).folder == older and not said
    assert shards.prepare(text, tmp_path / "data", say=said.append, wanted="0" * 64).folder != older and said
