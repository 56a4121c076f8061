"""Heartbeats of the ranks on a side channel (channel.py): who stands still, who is gone, and why.

Each rank looks after the lock of the rank before it, and some ranks judge by the beats of all (judge.py). Whoever finds
something writes it down as a verdict, on which all ranks act: they write their stacks if a rank stands still, one of
them tells the user, and the job ends.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import faulthandler
import json
import os
import shutil
import signal
import socket
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from hvdllm import faults, pulse, screen, untrusted
from hvdllm.errors import UserError
from hvdllm.plain import Json
from hvdllm.pulse import PAGE, Place, Pulse
from hvdllm.settings import Config
from hvdllm.trainer.channel import Channel, Peer, Verdict, opened, page_of, where
from hvdllm.trainer.judge import Beat, Hang, Judge
from hvdllm.world import epilogue, signals
from hvdllm.world.base import World, from_first
from hvdllm.world.detect import place, started

BEAT_S = 0.5
RANKS_A_SECOND = 64  # of which a judge reads the beats; it looks more rarely where there are more
GRACE_S = 3.0  # seconds that ranks leave each other to write stacks, and to speak
Say = Callable[[str], None]


class Heartbeat:
    """The thread of a rank that beats, looks after the other ranks, and acts on what is found.

    Args:
        channel: where.
        peers: the processes of all ranks.
        pulse: where this rank is.
        run: the run's folder.
        ends: whether a rank that stands still ends the job; otherwise it is only told.
        judge: how this rank judges by beats; None: other ranks do, or nobody.
    """

    def __init__(
        self, channel: Channel, peers: list[Peer], pulse: Pulse, run: Path, ends: bool, judge: Judge | None
    ) -> None:
        self.channel, self.peers, self.pulse, self.run = channel, peers, pulse, run
        self.ends, self.judge = ends, judge
        self.beat = Beat()
        self.failing = ""  # why this rank is about to end; another one has caused it unless `speaks`
        self.speaks = False  # this rank tells the user
        self._number = 0  # of verdicts so far
        self._ending = False  # the launcher has asked for the end while all ranks were there
        self._thread = threading.Thread(target=self._run, name="hvdllm-heartbeat", daemon=True)
        self._telling = threading.Lock()
        self._wake = threading.Event()
        # Opened now, since a page stays as it is after its rank is gone, but can then no longer be opened.
        self._pages = {rank: page for rank, peer in enumerate(peers) if (page := opened(peer)) is not None}

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def leave(self) -> None:
        """This rank has ended in good order."""
        self._tell(left=True)
        self._wake.set()
        self._thread.join()
        for page in (*self._pages.values(), self.peers[self.channel.rank].page):
            if page >= 0:
                os.close(page)
        self.channel.close()
        if self.channel.rank == 0:
            shutil.rmtree(self.channel.folder, ignore_errors=True)

    def fail(self, sentence: str, failed: str) -> str:
        """This process is about to end, see pulse.ends."""
        self.failing, self.speaks = sentence, failed != pulse.ANOTHER
        self._wake.set()
        self._tell(words=sentence)
        if self.speaks and not self.beat.left:
            me, number = self.channel.rank, self._number
            self.channel.claim(f"said-{number + 1}", "")  # this rank prints its sentence itself
            who = f"{self._who(me)} failed {_at(self.pulse.place())}: " * (failed == pulse.SELF)
            if self._pronounce(me, False, f"{who}{sentence}") and (verdict := self.channel.verdict(number)) is not None:
                self._say_last(verdict)
                return verdict.text * (failed == pulse.SELF)
        return ""

    # ------------------------------------------------------------------ the thread
    def _run(self) -> None:
        looks = True
        while not self.beat.left:
            hurried = signals.TERMINATED.is_set() or bool(self.failing)  # the launcher leaves little time
            if hurried:
                time.sleep(BEAT_S / 10)
            else:
                self._wake.wait(BEAT_S)
            self._tell()
            try:
                if looks and not self.beat.left:
                    self._look(hurried)
                    self._ending = hurried and signals.TERMINATED.is_set()
            except OSError:
                continue  # the disk may answer again
            except Exception as error:  # this rank beats on, or the others would take it for one that was stopped
                traceback.print_exception(error)
                looks = False

    def _tell(self, *, left: bool = False, words: str = "", stacks: int = 0) -> None:
        with self._telling, contextlib.suppress(OSError):
            last = self.beat
            self.beat = Beat(
                last.count + 1, self.pulse.place(), left or last.left, words or last.words, stacks or last.stacks
            )  # fmt: skip
            self.channel.tell(self.beat)

    def _look(self, all_locks: bool) -> None:
        if (verdict := self.channel.verdict(self._number)) is None:
            size, me = len(self.peers), self.channel.rank
            near = [rank for rank in range(size) if rank != me] if all_locks else [(me - 1) % size]
            for rank in near:
                if self.peers[rank].locks and self.channel.gone(rank):
                    beat = self.channel.heard(rank)
                    if beat is not None and not beat.left:
                        self._pronounce(rank, False, self._death(rank, beat))
            now = time.monotonic()
            if self.judge is not None and self.judge.due(now):
                self.judge.look(self._heard(), now)
                if (hang := self.judge.hang(now)) is not None:
                    self._pronounce(hang.rank, True, self._standstill(hang))
            verdict = self.channel.verdict(self._number)
        if verdict is not None:
            self._number += 1
            self._act(verdict, mine=self.channel.claim(f"said-{self._number}", ""))

    def _pronounce(self, rank: int, hang: bool, text: str) -> bool:
        """Makes the next verdict. False if another rank has made it."""
        advice = "" if "checkpoint" in text else f"; {self._advice(hang)}"  # what failed may have said it already
        verdict = Verdict(rank, hang, screen.one_line(f"hvdllm: {text}{advice}"))
        return self.channel.claim(f"verdict-{self._number}", json.dumps(dataclasses.asdict(verdict)))

    def _act(self, verdict: Verdict, mine: bool) -> None:
        """Does what follows from a verdict. mine: this rank is the one that tells the user."""
        if verdict.hang and self.judge is not None:
            self.judge.told(verdict.rank)
        if verdict.hang:
            self._write_stacks()
        if self.speaks:
            return  # this rank has said why, and ends by itself
        if mine:
            self._await_others(verdict)
            for line in filter(None, (self._own_line(), verdict.text)):
                print(line, file=sys.stderr, flush=True)
            with contextlib.suppress(OSError, untrusted.Unfit), untrusted.appended(self.run / "log.txt") as file:
                file.write(screen.clean(verdict.text) + "\n")
        if verdict.hang and not self.ends:
            return
        self._say_last(verdict)
        if not mine:
            signals.TERMINATED.wait(GRACE_S)
            if place().launcher == "srun" and self.channel.claim("last", ""):  # below what MPI has printed meanwhile
                print(verdict.text, file=sys.stderr, flush=True)
        self._end_stopped(verdict)
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
        os._exit(1)

    def _await_others(self, verdict: Verdict) -> None:
        """Waits until all ranks that live have written their stacks, or until this rank's loop has noticed what is
        wrong."""
        begin, before = time.monotonic(), self._heard()
        limit = GRACE_S if verdict.hang else 1.0
        while (waited := time.monotonic() - begin) < limit and not signals.TERMINATED.is_set():
            beats = self._heard().items()
            silent = {rank for rank, beat in beats if beat == before.get(rank)} if waited > 3 * BEAT_S else set()
            if verdict.hang and all(rank in silent or beat.stacks >= self._number for rank, beat in beats):
                return
            if not verdict.hang and self.failing:
                return
            time.sleep(BEAT_S / 5)
            self._tell()

    def _heard(self) -> dict[int, Beat]:
        """The beats of all ranks of which one can be read."""
        heard = {rank: self.channel.heard(rank) for rank in range(len(self.peers))}
        return {rank: beat for rank, beat in heard.items() if beat is not None}

    def _own_line(self) -> str:
        """What the loop of this rank has noticed of a rank that is gone."""
        return f"hvdllm: rank {self.channel.rank}: {screen.one_line(self.failing)}" if self.failing else ""

    def _say_last(self, verdict: Verdict) -> None:
        """Has the verdict printed once more, below what the launcher prints, by one rank on the launcher's host."""
        launcher = epilogue.launcher(signals.up_to_launcher())
        if launcher is not None and self.channel.claim("last", ""):
            epilogue.start(screen.one_line(verdict.text), *launcher)  # it was read from the run's folder

    def _end_stopped(self, verdict: Verdict) -> None:
        """Kills a rank on this host that was stopped, which no launcher's signal but SIGKILL would end."""
        peer = self.peers[verdict.rank]
        if verdict.hang and verdict.rank != self.channel.rank and peer.here and started(peer.pid) == peer.started != "":
            with contextlib.suppress(OSError):
                os.kill(peer.pid, signal.SIGKILL)

    def _write_stacks(self) -> None:
        """Writes where all threads of this rank are into the run's folder."""
        path = self.run / f"stacks-rank-{self.channel.rank}.txt"
        with contextlib.suppress(OSError, untrusted.Unfit), untrusted.appended(path) as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')}, rank {self.channel.rank}, {_at(self.pulse.place())}\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
            file.write("\n")
        self._tell(stacks=self._number)

    # ------------------------------------------------------------------ sentences
    def _who(self, rank: int) -> str:
        return f"rank {rank} on host {self.peers[rank].host}"

    def _place(self, rank: int, beat: Beat) -> Place:
        """Where a rank is or was: on this host exactly, elsewhere as of its last beat."""
        if rank not in self._pages:
            return beat.place
        step, *said = PAGE.unpack(os.pread(self._pages[rank], PAGE.size, 0))
        phase, waits = (each.rstrip(b"\0").decode(errors="replace") for each in said)
        return Place(phase, step, beat.place.moves, waits or None)

    def _standstill(self, hang: Hang) -> str:
        assert self.judge is not None
        place = self._place(hang.rank, self.judge.seen[hang.rank].beat)
        how = "it lives and does not go on"
        if hang.silent:
            how = "it no longer answers, because it was stopped or its host is out of reach"
        first = [f"rank {rank} for {what}" for rank, what in list(hang.waiting.items())[:4]]
        more = f" and {len(hang.waiting) - 4} more" if len(hang.waiting) > 4 else ""
        return (
            f"{self._who(hang.rank)} has stood still for {hang.seconds:.0f} s {_at(place)}: {how}, and others wait "
            f"({', '.join(first)}{more}); the stacks of the ranks that live are in {self.run}/stacks-rank-*.txt"
        )

    def _death(self, rank: int, beat: Beat) -> str:
        who, at = self._who(rank), _at(self._place(rank, beat))
        if beat.words:
            return f"{who} failed {at}: {beat.words}"
        if fatal := self.channel.fatal(rank).strip():
            path = self.run / f"stacks-rank-{rank}.txt"
            with contextlib.suppress(OSError, untrusted.Unfit), untrusted.appended(path) as file:
                file.write(f"{screen.clean(fatal)}\n\n")
            return f"{who} crashed {at} ({fatal.splitlines()[0]}); its stack is in {path}"
        if self._ending:
            return f"{who} was ended {at} by what had asked the ranks to end, before the run could save"
        return (
            f"{who} ended {at} without a word: it was killed (SIGKILL, which the kernel also sends when memory runs "
            "out, see dmesg), or its process was left early"
        )

    def _advice(self, hang: bool) -> str:
        if hang and not self.ends:
            return "the job waits on (on_hang=wait)"
        again = f"the same command with name={self.run.name} goes on from the last checkpoint"
        return f"the job ends (on_hang=wait would wait on), and {again}" if hang else again


def _at(place: Place) -> str:
    when = f"after step {place.step}" if place.phase in pulse.ACTS else f"in step {place.step + 1}"
    return f"{when}, phase {place.phase}{f' (waiting for {place.waits})' * (place.waits is not None)}"


# ------------------------------------------------------------------ of this process
_beating: Heartbeat | None = None


@contextlib.contextmanager
def beating(config: Config, world: World, run: Path, say: Say) -> Iterator[None]:
    """A context in which this rank is looked after by the others. Collective on entering it.

    It goes on after the context has ended, until `leave` is called, for the world is still to be closed; but not if
    the run was refused (UserError), or if whoever takes the commits wants no more of them.

    Args:
        config: the settings.
        world: the ranks.
        run: the folder of the run.
        say: gets a sentence if this is not possible.
    """
    global _beating
    leave()
    fault = faults.parsed(config.debug.fault) if config.debug.fault is not None else None
    fault = fault if fault is not None and fault.rank == world.rank else None
    logical = config.world.kind == "virtual"
    if logical or (world.size == 1 and fault is None):
        yield
        return
    rhythm = Pulse(config.hang_after or config.world.timeout_s, config.world.timeout_s, fault)
    pulse.begin(rhythm)
    if world.size > 1 and (folder := from_first(world, lambda: _made(run, say), "start.beats")) is not None:
        _beating = _joined(config, world, run, Path(folder), rhythm)
        pulse.at_the_end(_beating.fail)
        _beating.start()
    pulse.enter("start")
    try:
        yield
    except (UserError, GeneratorExit):
        leave()
        raise


def leave() -> None:
    """This rank has ended in good order, its world is closed."""
    global _beating
    pulse.begin(None)
    pulse.at_the_end(None)
    if _beating is not None:
        _beating.leave()
        _beating = None


@atexit.register
def _at_exit() -> None:
    """Python ends. Only after a run was over is that in good order."""
    if _beating is None or _beating.failing:
        return
    if _beating.pulse.phase == "shutdown":
        leave()
    else:
        _beating.fail("its Python ended before the run was over", pulse.SELF)


def _made(run: Path, say: Say) -> str | None:
    """On rank 0: makes the folder of this life, and removes those of lives that were killed."""
    for old in run.glob("beats-*"):
        shutil.rmtree(old, ignore_errors=True)  # it follows no links
    folder = run / f"beats-{uuid.uuid4().hex[:12]}"
    try:
        folder.mkdir(mode=0o700)
    except OSError as error:
        say(f"{folder} cannot be made ({error.strerror}): a rank that stands still or is gone will not be named")
        return None
    return str(folder)


def _joined(config: Config, world: World, run: Path, folder: Path, rhythm: Pulse) -> Heartbeat:
    """Makes this rank's heartbeat, and introduces all ranks to each other. Collective."""
    channel = Channel(folder, world.rank)
    own = Peer(socket.gethostname(), where(), os.getpid(), started(os.getpid()), channel.locks, page_of(rhythm))
    with contextlib.suppress(OSError):
        channel.tell(Beat())
    said: list[Json] = [json.loads(text) for text in world.texts(json.dumps(dataclasses.asdict(own)), "start.peers")]
    peers = [Peer(**each) for each in said]
    judge = None
    if config.hang_after is not None and world.rank in (0, 1, world.size // 2, world.size - 1):
        rest = max(BEAT_S, world.size / RANKS_A_SECOND)
        judge = Judge(config.hang_after, rest, max(config.hang_after / 2, 4 * rest))
    return Heartbeat(channel, peers, rhythm, run, config.on_hang == "end", judge)
