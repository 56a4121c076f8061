"""hvdllm prepare: the settings of train in, one table out."""

from pathlib import Path

import numpy as np
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


def test_of_tokens_it_looks_at_the_files_and_compares_both_sides(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    document = np.arange(300, dtype=np.uint16) % 256
    np.save(tmp_path / "a.npy", np.concatenate([document, [256], document[::-1], [256], document]).astype(np.uint16))
    words = ["text=tokens", f"text.path={tmp_path}", "text.tokenizer=bytes", f"data_dir={tmp_path / 'data'}"]
    assert run([*words, "text.validation_share=0.4"]) == 0
    out = capsys.readouterr().out
    assert "tokens, 602 in 1 file for training, vocabulary 257" in out
    assert "1 documents of the training text are held out too" in out
    assert list((tmp_path / "data" / "tokens").iterdir())


def test_a_wrong_setting_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere"):
        run(["text=files", "text.path=nowhere", f"data_dir={tmp_path}"])
