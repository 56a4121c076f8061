"""bench prepare: the text that it makes, and what each of its measurements measures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hvdllm.bench import prepare
from hvdllm.cli.bench import run
from hvdllm.errors import RunError, UserError


def test_the_text_is_of_the_size_and_its_documents_differ(tmp_path: Path) -> None:
    size = prepare.write(tmp_path / "a", 600_000)
    files = sorted((tmp_path / "a").rglob("*.*"))
    assert size == sum(file.stat().st_size for file in files) and 600_000 <= size < 900_000
    assert len({file.parent for file in files}) == prepare.PAIRS
    content = [file.read_text() for file in files]
    assert len(set(content)) == len(files)
    prepare.write(tmp_path / "b", 600_000)
    assert [file.read_text() for file in sorted((tmp_path / "b").rglob("*.*"))] == content, "the same each time"


def test_each_measurement_has_its_figures(tmp_path: Path) -> None:
    size = prepare.write(tmp_path / "text", 200_000)
    whole = prepare._measured("whole", tmp_path / "text", tmp_path, 300)
    assert whole["bytes"] == size and whole["train_s"] > 0 and whole["encode_s"] > 0
    for what in ("ours", "theirs"):
        found = prepare._measured(what, tmp_path / "text" / "0", tmp_path, 300)
        assert 0 < found["bytes"] < size and found["encode_s"] > 0 and "train_s" not in found
    with pytest.raises(RunError, match="failed with exit code"):
        prepare._run("theirs", tmp_path / "nowhere", tmp_path / "none", 300)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(what: str, text: Path, folder: Path, vocab: int) -> dict[str, float]:
        seconds = {"whole": 4.0, "ours": 2.0, "theirs": 1.0}[what]
        return {"bytes": 1e6, "train_s": 5.0, "encode_s": seconds, "peak_mib": 100.0}

    monkeypatch.setattr(prepare, "_run", measured)
    assert run(["prepare", "--mb", "1", "--json", str(tmp_path / "f.json")]) == 0
    out = capsys.readouterr().out
    assert "ours / tokenizers alone: 0.500" in out and "0.20" in out and "0.25" in out
    assert json.loads((tmp_path / "f.json").read_text())["ratio"]["pairs"] == prepare.PAIRS
    with pytest.raises(UserError, match="--mb 0 is too small"):
        run(["prepare", "--mb", "0"])
