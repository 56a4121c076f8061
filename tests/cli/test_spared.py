"""The screen may lose what is written to it, never the work. Seen to catch: a reader that goes away ends a run, a
closed output is a traceback, letters between colons become a picture, a path that is not quoted."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from hvdllm.cli import spared as screen
from hvdllm.cli.display import Screen
from hvdllm.cli.spared import Spared

END = {"reason": "budget", "tokens": 10, "seconds": 1.0, "loss": 1.0, "eval_loss": None, "mfu": None}
END |= {
    "data_waited_s": 0.0,
    "peak_memory_bytes": 0,
    "unit": "tokens",
    "told": "",
    "each": "",
    "next": ["sample", "evaluate"],
}


class Broken(io.StringIO):
    """A reader that is gone, or a disk that is full."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    def write(self, text: str) -> int:
        raise self.error

    def flush(self) -> None:
        raise self.error


@pytest.mark.parametrize("error", [BrokenPipeError(), OSError(28, "No space left"), OSError(5, "hangup"), ValueError()])
def test_nothing_that_is_said_raises(error: Exception, tmp_path: Path) -> None:
    out = Spared(Broken(error))
    with Screen(alone=True, out=out) as show:
        show.header({"run": str(tmp_path)})
        show.say("a sentence")
        show.progress({"tokens": 1, "unit": "tokens", "budget": 10, "seconds": 1.0, "loss": 1.0, "blocked": 0.0})
        show.finish(END, str(tmp_path), "a sample")
    assert out.lost and "a sentence" in (tmp_path / "log.txt").read_text(), "the run's own log has it"


def command(code: str, **how: Any) -> subprocess.CompletedProcess[str]:
    start = f"import sys; from hvdllm.cli import main as cli, prepare, train\n{code}"
    env = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    return subprocess.run([sys.executable, "-c", start], stderr=subprocess.PIPE, text=True, env=env, **how)


SAYS = "{0}.run = lambda words: print('x' * 100_000) or {1}; sys.exit(cli.main(['{0}']))"


@pytest.mark.parametrize(
    ("name", "code", "expected"), [("train", 0, 0), ("train", 75, 75), ("prepare", 0, 1), ("prepare", 2, 2)]
)
def test_a_reader_that_is_gone_fails_what_was_made_to_be_read_and_no_run(name: str, code: int, expected: int) -> None:
    ends = os.pipe()
    os.close(ends[0])
    done = command(SAYS.format(name, code), stdout=ends[1])
    os.close(ends[1])
    assert (done.stderr, done.returncode) == ("", expected)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_behind_the_output_fails_no_run() -> None:
    with open("/dev/full", "w") as full:
        assert (done := command(SAYS.format("train", 0), stdout=full)).returncode == 0, done.stderr


@pytest.mark.parametrize("closed", [(1,), (1, 2), (0, 1, 2)])
def test_closed_outputs_are_no_error_and_no_file_takes_their_place(closed: tuple[int, ...], tmp_path: Path) -> None:
    """As some schedulers and services start their jobs: the next file that is opened would be number 1."""
    file = tmp_path / "file"
    code = (
        f"def run(words):\n    file = open({str(file)!r}, 'w')\n    print('to the screen')\n"
        "    print('x', file=sys.stderr)\n"
        "    file.write('in the file')\n    return 0\ntrain.run = run\nsys.exit(cli.main(['train']))"
    )
    start = [sys.executable, "-c", f"import sys; from hvdllm.cli import main as cli, train\n{code}"]
    done = subprocess.run(start, preexec_fn=lambda: [os.close(number) for number in closed] and None)
    assert done.returncode == 0 and file.read_text() == "in the file"


def test_letters_that_a_terminal_does_not_know_are_replaced() -> None:
    env = os.environ | {"PYTHONIOENCODING": "ascii"}
    code = (
        "from hvdllm.cli import main as cli, train; train.run = lambda words: print('a · é') or 0; cli.main(['train'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert (done.stdout, done.stderr) == ("a ? ?\n", "")


def test_texts_are_shown_as_they_are_and_commands_can_be_copied(tmp_path: Path) -> None:
    out = io.StringIO()
    show = Screen(alone=True, out=out)
    where = f"{tmp_path}/d:x: [b]/exchange=acco,seed=1 (2)"
    show.say("run :key: [red]x[/red] [/]")
    show.finish(END, where, "a :smile: [bold]b[/bold]")
    show.finish({**END, "reason": "stop"}, where, "")
    said = out.getvalue()
    assert "run :key: [red]x[/red] [/]" in said and "a :smile: [bold]b[/bold]" in said
    assert f"hvdllm sample '{where}' " in said and f"hvdllm train 'resume={where}'" in said


def test_under_horovodrun_a_terminal_or_a_pipe_gets_lines_without_a_prefix(tmp_path: Path) -> None:
    """Of the launcher, found by its number; of a file nobody knows where its end is."""
    for target, found in (("pty", True), ("pipe", True), ("file", False)):
        ours, theirs = os.openpty() if target == "pty" else os.pipe()
        out = theirs if target != "file" else os.open(tmp_path / "log", os.O_WRONLY | os.O_CREAT)
        program = tmp_path / "horovodrun"
        program.write_text("input()")
        with subprocess.Popen([sys.executable, str(program)], stdin=subprocess.PIPE, stdout=out) as launcher:
            while not screen._is_launcher(launcher.pid):  # the kernel may be loading it still
                time.sleep(0.01)
            assert screen.of_launcher([os.getppid()]) is None, "no launcher that we know"
            stream = screen.of_launcher([launcher.pid, os.getppid()])
            assert (stream is not None) == found, target
            if stream is not None:
                assert Screen(alone=False, out=stream).live == (target == "pty")
                stream.write("a line\n")
                stream.flush()
                assert os.read(ours, 100).strip() == b"a line"
                stream.close()
            launcher.communicate(b"\n")
        for number in {ours, theirs, out}:
            os.close(number)
    assert screen.of_launcher([]) is None and screen.of_launcher([2**22 + 1]) is None


@pytest.mark.parametrize(
    ("word", "hint"), [("trian", "train"), ("reprot", "report"), ("eval", "evaluate"), ("xyz", None)]
)
def test_near_commands_get_a_hint(word: str, hint: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    from hvdllm.cli import main as cli

    assert cli.main([word]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and ((f"did you mean {hint}?" in said) if hint else "did you mean" not in said)


def test_what_the_system_refuses_is_a_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from hvdllm.cli import main as cli
    from hvdllm.cli import prepare

    def fail(words: list[str]) -> int:
        raise PermissionError(13, "Permission denied", "/a/file")

    monkeypatch.setattr(prepare, "run", fail)
    assert cli.main(["prepare"]) == 1
    assert capsys.readouterr().err == "hvdllm: /a/file: Permission denied\n"
