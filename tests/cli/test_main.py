"""One sentence and an exit code."""

import subprocess
import sys
from pathlib import Path

import pytest

import hvdllm
from hvdllm.cli import bench, prepare
from hvdllm.cli import main as cli
from hvdllm.errors import RunError, UserError


@pytest.mark.parametrize(("error", "code"), [(UserError("no"), 2), (RunError("no"), 1), (KeyboardInterrupt(), 130)])
def test_exit_codes(
    error: BaseException, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def raises(words: list[str]) -> int:
        raise error

    monkeypatch.setattr(prepare, "run", raises)
    monkeypatch.setattr("hvdllm.world.signals.deafen", lambda: None)
    assert cli.main(["prepare"]) == code
    assert capsys.readouterr().err.count("\n") == 1


def test_a_bug_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(prepare, "run", lambda words: 1 / 0)
    monkeypatch.setattr("hvdllm.world.signals.deafen", lambda: None)
    assert cli.main(["prepare"]) == 1
    assert "ZeroDivisionError" in (said := capsys.readouterr().err) and "bug in hvdllm" in said


def test_python_m_and_version() -> None:
    done = subprocess.run([sys.executable, "-m", "hvdllm", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"hvdllm {hvdllm.__version__}\n"


def test_unknown_command() -> None:
    done = subprocess.run([sys.executable, "-m", "hvdllm", "trian"], capture_output=True, text=True)
    assert done.returncode == 2 and "trian" in done.stderr


def test_settings_of_a_benchmark_stand_on_both_sides_of_its_flags(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[list[str]] = []
    monkeypatch.setattr(bench, "bench_exchange", lambda given: seen.append(given.settings) or {})
    out = str(tmp_path / "x.json")
    assert cli.main(["bench", "exchange", "a=1", "--ranks", "2", "b=2", "--json", out, "c=3"]) == 0
    assert seen == [["a=1", "b=2", "c=3"]]
    with pytest.raises(SystemExit):
        cli.main(["bench", "exchange", "a=1", "--ranks", "2", "nonsense"])
    assert "unrecognized arguments: nonsense" in capsys.readouterr().err
