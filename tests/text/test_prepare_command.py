"""hvdllm prepare: the settings of train in, one table out."""

from pathlib import Path

import pytest

from hvdllm.cli.prepare import run
from hvdllm.errors import UserError


def test_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for n in range(10):
        (tmp_path / f"{n}.txt").write_text(f"text {n}\n")
    words = ["text=files", f"text.path={tmp_path}", "text.tokenizer=bytes", f"data_dir={tmp_path / 'data'}"]
    assert run(words) == 0
    out, err = capsys.readouterr()
    rows = dict(line.split(maxsplit=1) for line in out.splitlines())
    assert rows["folder"].startswith(str(tmp_path / "data"))
    assert rows["training"].startswith("9 documents, 71 tokens, 0.887 bytes a token")
    assert rows["validation"].startswith("1 documents, 7 tokens, 1.000 bytes a token")
    assert rows["vocabulary"] == "257 tokens"
    assert "preparing" in err
    assert run(words) == 0
    assert "preparing" not in capsys.readouterr().err


def test_a_wrong_setting_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere"):
        run(["text=files", "text.path=nowhere", f"data_dir={tmp_path}"])
