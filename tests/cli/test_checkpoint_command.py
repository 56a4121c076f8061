"""`hvdllm checkpoint`: what a run goes on from, and what is damaged."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from hvdllm.cli.main import main

WORDS = (
    "text=files", "text.tokenizer=bytes", "model.layers=1", "model.width=16", "model.heads=2", "model.context=16",
    "batch_tokens=64", "budget_tokens=256", "save_every=64", "keep=3", "eval_every=0", "sample_every=0", "device=cpu",
)  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "a.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 200)
    where = [f"text.path={tmp_path / 'a.txt'}", f"runs_dir={tmp_path}", f"data_dir={tmp_path / 'data'}", "name=a"]
    assert main(["train", *WORDS, *where]) == 0
    return tmp_path / "a"


def test_which_can_be_gone_on_from_and_which_are_damaged(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["checkpoint", "list", str(run)]) == 0
    listed = capsys.readouterr().out
    assert all(word in listed for word in ("step", "tokens", "256", "checkpoints/4", "final/model.safetensors"))
    assert main(["checkpoint", "verify", str(run)]) == 0
    said = capsys.readouterr().out
    assert said.count("whole") == 4 and f"begins from {run / 'checkpoints' / '4'}" in said
    os.truncate(run / "checkpoints" / "4" / "rank-00000.safetensors", 100)
    (run / "checkpoints" / "2" / "manifest.json").unlink()
    with (run / "final" / "model.safetensors").open("r+b") as file:
        file.write(b"\x01")
    assert main(["checkpoint", "verify", str(run)]) == 1
    said = " ".join(capsys.readouterr().out.split())
    assert f"begins from {run / 'checkpoints' / '3'}" in said and "manifest.json is missing" in said
    assert (
        "rank-00000.safetensors is not what was written" in said and "model.safetensors is not what was written" in said
    )
    assert main(["checkpoint", "verify", str(run), "--step", "3", "--json"]) == 0
    (row,) = map(json.loads, capsys.readouterr().out.splitlines())
    assert (row["step"], row["tokens"], row["ranks"], row["broken"]) == (3, 192, 1, None)


def test_a_folder_without_checkpoints_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in ([str(tmp_path)], [str(tmp_path / "none")], [str(tmp_path), "--step", "3"]):
        assert main(["checkpoint", "list", *words]) == 2
        assert capsys.readouterr().err.count("\n") == 1
