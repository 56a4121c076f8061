"""No control character of somebody else's text reaches a terminal, or a file that is looked at on one."""

import io
import json
import re
import sys
from pathlib import Path

import pytest

from hvdllm import runs, screen
from hvdllm.cli import main
from hvdllm.cli.display import make_show

ROOT = Path(__file__).resolve().parents[2] / "hvdllm"
EVIL = "a\x1b]0;owned\x07b\x9b31mc\rd\u202ee\x00\x7f\ud800f"
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\ud800-\udfff]")


def test_text_is_shown_as_it_is_written_in_python() -> None:
    assert screen.clean("\x1b[31m ü 東 \U0001f600 a\tb\n") == "\\x1b[31m ü 東 \U0001f600 a\tb\n"
    assert screen.clean(EVIL).encode().isascii() and not CONTROL.search(screen.clean(EVIL))
    assert screen.one_line("a\nb\tc") == "a\\nb\\tc"


def test_whatever_is_printed_is_cleaned(capsys: pytest.CaptureFixture[str]) -> None:
    before = sys.stdout
    with screen.guarded(), screen.guarded():
        print(EVIL)
        print(EVIL, file=sys.stderr)
        sys.stdout.writelines([EVIL, "\n"])
    assert sys.stdout is before
    assert not any(CONTROL.search(part) for part in capsys.readouterr())


NAME = EVIL.replace("\x00", "").replace("\ud800", "")  # what a file can be called


@pytest.mark.parametrize(
    "command",
    [
        [NAME],
        ["train", NAME],
        ["train", f"name='{NAME}'"],
        ["train", f"exchange={NAME}"],
        ["train", f"--{NAME}"],
        ["train", f"resume={NAME}"],
        ["sample", NAME],
        ["sample", EVIL],
        ["evaluate", NAME],
        ["report", NAME],
        ["report", ".", "--out", f"{NAME}/x.md"],
        ["track", "sync", NAME],
        ["bench", NAME],
    ],
)
def test_errors_of_commands(
    command: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        code = main.main(command)
    except SystemExit as ended:  # argparse
        code = int(ended.code or 0)
    out, err = capsys.readouterr()
    assert code == 2 and err and not CONTROL.search(out + err)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_our_own_sequences_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Colours and movements of rich stay; those of a sample, a path or a sentence are text."""
    terminal = Terminal()
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setattr(sys, "stdout", terminal)
    (tmp_path / "evil\x1b[2J").mkdir()
    path = f"{tmp_path}/evil\x1b[2J"
    with screen.guarded(), make_show(0, True) as show:
        show.header({"run": path, "text": "x\x1b[2Jy"})
        show.progress({"tokens": 1, "unit": "tokens", "budget": 10, "seconds": 1.0, "loss": 1.0, "blocked": 0.0})
        show.say("one\x1b[2J\ntwo")
        end = {"reason": "budget", "tokens": 10, "seconds": 1.0, "loss": 1.0, "eval_loss": None, "mfu": None}
        end |= {
            "data_waited_s": 0.0,
            "peak_memory_bytes": 1,
            "unit": "tokens",
            "told": "",
            "each": "",
            "next": ["sample", "evaluate"],
        }
        show.finish(end, path, "sample\x1b[2J\x1b]52;c;aGk=\x07")
    said = terminal.getvalue()
    assert "\x1b[1m" in said and "\\x1b[2J" in said  # a heading of ours is bold
    assert "\x1b[2J" not in said and "\x1b]" not in said and "\x07" not in said
    log = (Path(path) / "log.txt").read_text()
    assert not CONTROL.search(log) and len([line for line in log.splitlines() if "one" in line or "two" in line]) == 1


def test_samples_and_logs_of_a_folder_can_be_looked_at(tmp_path: Path) -> None:
    folder = runs.Folder(tmp_path)
    folder.append("samples.txt", EVIL)
    folder.record("sample", {"text": EVIL})
    folder.close()
    assert not CONTROL.search((tmp_path / "samples.txt").read_text())
    assert CONTROL.search((tmp_path / "metrics.jsonl").read_text()) is None
    assert next(runs.records(tmp_path))["text"] == EVIL  # exact, for who reads it as JSON
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["text"] == EVIL


def test_nobody_draws_past_it() -> None:
    """One place makes consoles; live displays are given one of these; nobody writes bytes to standard output."""
    for path in ROOT.rglob("*.py"):
        text = path.read_text()
        if path.name != "screen.py":
            assert "rich.console import" not in text and "stdout.buffer" not in text, path
        for name in ("Live(", "Progress("):
            for call in text.split(name)[1:]:
                assert "console=" in call[:300], path
