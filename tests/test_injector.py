"""Faults on purpose: what `debug.fault` may say, when it is due, and that nothing else breaks a run."""

from __future__ import annotations

import subprocess
import sys

import pytest

from hvdllm import faults
from hvdllm.config.check import check
from hvdllm.config.compose import compose
from hvdllm.errors import UserError
from hvdllm.faults import Fault, parsed
from hvdllm.world.detect import Place

GOOD = "rank=1,step=20,phase=exchange,mode=stop"
TWO = Place("horovodrun", 0, 2, 0, 2)


def test_a_fault_is_read_in_any_order() -> None:
    assert parsed(GOOD) == parsed("mode=stop, phase=exchange,step=20,rank=1") == Fault(1, 20, "exchange", "stop")
    assert parsed("rank=0,phase=start,mode=kill").phase == "start"


@pytest.mark.parametrize(
    "text",
    [
        "", "rank=1", f"{GOOD},", f"{GOOD},rank=1", f"{GOOD},x=1", GOOD.replace("20", "-1"), GOOD.replace("20", "1e3"),
        GOOD.replace("20", "٢"), GOOD.replace("20", "9" * 30), GOOD.replace("stop", "STOP"),
        GOOD.replace("exchange", "lunch"), "rank=1,phase=data,mode=stop", GOOD.replace("=", ":"),
    ],
)  # fmt: skip
def test_anything_else_is_refused_in_one_sentence(text: str) -> None:
    with pytest.raises(UserError, match=r"^debug\.fault=.*: give rank=1,step=20") as error:
        parsed(text)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("phase", "entered", "done", "due"),
    [
        ("exchange", "exchange", 18, False), ("exchange", "exchange", 19, True), ("exchange", "forward", 19, False),
        ("exchange", "exchange", 25, True), ("save", "save", 19, False), ("save", "save", 20, True),
        ("start", "start", 0, True), ("shutdown", "shutdown", 7, True),
    ],
)  # fmt: skip
def test_the_step_is_the_update_that_is_being_made(phase: str, entered: str, done: int, due: bool) -> None:
    assert Fault(1, 20, phase, "kill").due(entered, done) is due


@pytest.mark.parametrize(
    ("words", "place", "says"),
    [
        ([], TWO, "without debug=faults"),
        (["debug=faults"], Place("horovodrun", 0, 1, 0, 1), "there is no rank 1, the last one is 0"),
        (["debug=faults", "world=virtual"], Place(), "logical ranks share one"),
    ],
)
def test_what_cannot_break_is_refused(words: list[str], place: Place, says: str) -> None:
    with pytest.raises(UserError, match=says):
        check(compose([*words, f'debug.fault="{GOOD}"']), place)
    check(compose(["debug=faults", f'debug.fault="{GOOD}"']), TWO)


@pytest.mark.parametrize(
    ("mode", "code", "says"),
    [
        ("exception", 1, "Injected: debug.fault raised this in phase data"), ("memory", 1, "MemoryError"),
        ("kill", -9, ""), ("exit", 0, ""), ("disk", 1, "OSError: [Errno 27] File too large"),
    ],
)  # fmt: skip
def test_each_mode_breaks_a_process(mode: str, code: int, says: str) -> None:
    """stop and hang need another process, which ends this one: tests/faults/test_fault_matrix.py."""
    program = (
        "import sys, tempfile; from hvdllm import faults; faults.commit(faults.Fault(0, 1, 'data', sys.argv[1]))\n"
        "file = tempfile.TemporaryFile(buffering=0); file.write(bytes(4096)); file.write(b'x')"
    )
    done = subprocess.run([sys.executable, "-c", program, mode], capture_output=True, text=True)
    assert done.returncode == code and says in done.stderr
    assert f"hvdllm: rank 0: debug.fault, {mode} in phase data" in done.stderr


def test_a_disk_is_full_for_every_thread() -> None:
    """ACCO makes its update in the thread of its driver, and the fault comes there."""
    program = (
        "import tempfile, threading; from hvdllm import faults\n"
        "fault = faults.Fault(0, 1, 'update', 'disk'); thread = threading.Thread(target=faults.commit, args=[fault])\n"
        "thread.start(); thread.join(); file = tempfile.TemporaryFile(buffering=0)\n"
        "file.write(bytes(4096)); file.write(b'x')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.endswith("OSError: [Errno 27] File too large\n")
    assert done.stderr.count("Traceback") == 1


def test_every_phase_and_mode_is_documented() -> None:
    doc = compose([]).debug.__dataclass_fields__["fault"].metadata["doc"]
    assert all(word in doc for word in (*faults.PHASES, *faults.MODES))
