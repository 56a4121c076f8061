"""How commands end when ranks are many: who speaks, and with which code. One process here, told that it is a rank."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import hvdllm
from hvdllm.cli import main as cli
from hvdllm.cli import prepare
from hvdllm.errors import PeerError
from hvdllm.world import signals


@pytest.fixture(autouse=True)
def not_terminated() -> Iterator[None]:
    """Tests of signals in this process may have left it set: the process would end without a word."""
    signals.TERMINATED.clear()
    yield
    signals.TERMINATED.clear()


def run(code: str, *, rank: int | None = None) -> subprocess.CompletedProcess[str]:
    """`code` with cli.main imported and nobody waited for; rank: of two, as horovodrun would say."""
    place = {"RANK": rank, "SIZE": 2, "LOCAL_RANK": rank, "LOCAL_SIZE": 2} if rank is not None else {}
    env = os.environ | {f"HOROVOD_{name}": str(value) for name, value in place.items()}
    start = "import sys; from hvdllm.cli import main as cli, prepare; from hvdllm.errors import *; cli.WAIT_S = 0.0\n"
    return subprocess.run([sys.executable, "-c", start + code], capture_output=True, text=True, env=env)


def raising(error: str) -> str:
    lines = ["def fail(words):", "    import atexit; atexit.register(print, 'exit handlers ran')", f"    raise {error}"]
    return "\n".join([*lines, "prepare.run = fail", "sys.exit(cli.main(['prepare']))"])


@pytest.mark.parametrize(
    ("error", "rank", "says", "code"),
    [
        ("UserError('no')", 0, "hvdllm: no\n", 2),
        ("RunError('no')", 1, "hvdllm: rank 1: no\n", 1),
        ("PeerError('gone')", 0, "hvdllm: rank 0: gone\n", 1),
    ],
)
def test_a_rank_ends_past_horovods_own_end(error: str, rank: int, says: str, code: int) -> None:
    done = run(raising(error), rank=rank)
    assert (done.stderr, done.returncode, done.stdout) == (says, code, "")


def test_alone_a_command_ends_in_good_order() -> None:
    done = run(raising("RunError('no')"))
    assert (done.stderr, done.returncode, done.stdout) == ("hvdllm: no\n", 1, "exit handlers ran\n")


def test_a_place_that_cannot_be_is_said_too() -> None:
    done = run("import os; os.environ |= {'TORCHELASTIC_RUN_ID': 'x', 'RANK': '0'}; sys.exit(cli.main(['train']))")
    assert done.returncode == 2 and "environment of torchrun" in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize(("rank", "quiet", "waits"), [(0, False, []), (1, False, [7.0]), (0, True, [7.0])])
def test_who_lets_another_speak_first(
    rank: int, quiet: bool, waits: list[float], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"RANK": rank, "SIZE": 2, "LOCAL_RANK": rank, "LOCAL_SIZE": 2}.items():
        monkeypatch.setenv(f"HOROVOD_{name}", str(value))
    slept: list[float] = []
    codes: list[int] = []
    monkeypatch.setattr(cli, "WAIT_S", 7.0)
    monkeypatch.setattr("time.sleep", slept.append)
    monkeypatch.setattr("os._exit", codes.append)
    monkeypatch.setattr("hvdllm.world.signals.deafen", lambda: None)
    cli._end("no", 2, once=not quiet, quiet=quiet)
    assert slept == waits and codes == [2]


def test_a_rank_that_the_launcher_is_ending_does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": 1, "SIZE": 2, "LOCAL_RANK": 1, "LOCAL_SIZE": 2}.items():
        monkeypatch.setenv(f"HOROVOD_{name}", str(value))

    class Ended(BaseException):
        pass

    def end(code: int) -> None:
        raise Ended(code)

    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail("it waits"))
    monkeypatch.setattr("os._exit", end)
    monkeypatch.setattr("hvdllm.world.signals.deafen", lambda: None)
    signals.TERMINATED.set()
    with pytest.raises(Ended, match="2"):
        cli._end("no", 2, once=True)


def test_alone_a_peer_error_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def gone(words: list[str]) -> int:
        raise PeerError("gone")

    monkeypatch.setattr(prepare, "run", gone)
    monkeypatch.setattr(cli, "WAIT_S", 0.0)
    monkeypatch.setattr("hvdllm.world.signals.deafen", lambda: None)
    assert cli.main(["prepare"]) == 1 and capsys.readouterr().err == "hvdllm: gone\n"


def test_hvdllm_alone_says_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    said = capsys.readouterr().out
    assert all(f"  {name} " in said for name in cli.COMMANDS)
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"hvdllm {hvdllm.__version__}\n"
    assert cli.main(["trian"]) == 2


def test_a_command_gets_its_words(monkeypatch: pytest.MonkeyPatch) -> None:
    got: list[list[str]] = []
    monkeypatch.setattr(prepare, "run", lambda words: got.append(words) or 5)
    assert cli.main(["prepare", "--help", "a=1", "--", "-x"]) == 5 and got == [["--help", "a=1", "--", "-x"]]


def test_every_command_has_its_file() -> None:
    folder = Path(cli.__file__).parent
    files = {path.stem for path in folder.glob("*.py")} - {"__init__", "main", "flags", "display", "spared"}
    assert files == {*cli.COMMANDS}


def test_a_reader_that_goes_away_is_no_bug() -> None:
    ends = os.pipe()
    os.close(ends[0])
    code = "prepare.run = lambda words: print('x') or 0; sys.exit(cli.main(['prepare']))"
    command = [sys.executable, "-c", f"import sys; from hvdllm.cli import main as cli, prepare; {code}"]
    env = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run(command, stdout=ends[1], stderr=subprocess.PIPE, text=True, env=env)
    os.close(ends[1])
    assert (done.stderr, done.returncode) == ("", 1)
