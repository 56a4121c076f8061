"""Faults on purpose: `debug.fault` breaks one rank at one place, to see what a run does then."""

from __future__ import annotations

import os
import resource
import signal
import sys
from dataclasses import dataclass, fields

from hvdllm.errors import UserError

PHASES = ("start", "data", "forward", "exchange", "update", "evaluation", "save", "shutdown")
AFTER = ("evaluation", "save")  # phases of acts, which come after the update that the step counts
ONCE = ("start", "shutdown")  # phases that belong to no step
MODES = ("exception", "kill", "stop", "hang", "exit", "memory", "disk")
ROOM = 4096  # bytes that a file may have once the disk is full: what is rewritten in place still fits
FORM = f"rank=1,step=20,phase=exchange,mode=stop, with a phase of {', '.join(PHASES)} and a mode of {', '.join(MODES)}"


class Injected(Exception):
    """The exception of mode=exception."""


@dataclass(frozen=True)
class Fault:
    """What breaks, and where.

    Attributes:
        rank: the rank that breaks.
        step: the update that is then being made, or the one after which an evaluation or a save comes.
        phase: one of PHASES.
        mode: one of MODES.
    """

    rank: int
    step: int
    phase: str
    mode: str

    def due(self, phase: str, done: int) -> bool:
        """Whether it is time, as a rank enters a phase after `done` updates. An act that is rarer than a step breaks at
        its first occasion from that step on."""
        if phase != self.phase:
            return False
        return phase in ONCE or done + (phase not in AFTER) >= self.step


def parsed(text: str) -> Fault:
    """The fault that a text such as `rank=1,step=20,phase=exchange,mode=stop` describes. `step` may be left out for a
    phase that belongs to no step. Raises UserError for anything else."""
    pairs = [part.strip().partition("=") for part in text.split(",")]
    given = {key: value for key, _, value in pairs}
    twice = len(given) < len(pairs)
    if given.get("phase") in ONCE:
        given.setdefault("step", "1")
    numbers = (given.get("rank", ""), given.get("step", ""))
    if (
        twice
        or given.keys() != {field.name for field in fields(Fault)}
        or not all(number.isascii() and number.isdecimal() and len(number) < 10 for number in numbers)
        or given["phase"] not in PHASES
        or given["mode"] not in MODES
    ):
        raise UserError(f"debug.fault={text}: give {FORM}")
    return Fault(int(given["rank"]), int(given["step"]), given["phase"], given["mode"])


def commit(fault: Fault) -> None:
    """Breaks this process in the way that `fault.mode` says.

    exception  raises Injected, as a bug would
    kill       SIGKILL, as from the kernel when memory is short
    stop       SIGSTOP: the process is there and does nothing, as on a host that is paused
    hang       an endless loop in this thread
    exit       ends with exit code 0, without Python's or Horovod's own end
    memory     asks for more memory than there can be, which raises MemoryError
    disk       from here on no file of this process can grow beyond 4 KiB, and a write beyond fails, as on a full disk
    """
    print(f"hvdllm: rank {fault.rank}: debug.fault, {fault.mode} in phase {fault.phase}", file=sys.stderr, flush=True)
    if fault.mode == "exception":
        raise Injected(f"debug.fault raised this in phase {fault.phase}")
    if fault.mode == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault.mode == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    while fault.mode == "hang":
        pass
    if fault.mode == "exit":
        os._exit(0)
    if fault.mode == "memory":
        bytearray(2**62)
    if fault.mode == "disk":
        # A write beyond raises OSError, since Python ignores SIGXFSZ.
        resource.setrlimit(resource.RLIMIT_FSIZE, (ROOM, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
