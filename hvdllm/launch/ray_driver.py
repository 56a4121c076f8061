"""Runs a command as ranks on a Ray cluster. This is the only file that imports Ray.

    python -m hvdllm.launch.ray_driver SETTINGS                                  prints how many runs find room
    python -m hvdllm.launch.ray_driver SETTINGS RUNS_DIR NAME PYTHON -P -m ...   is one of them

A run gets a placement group, with an actor for each rank (ray_node.py). Ranks are processes of their own under the
actors, so a rank that crashes is an exit code. They meet over Horovod's key-value server, which this process runs on
one interface and with a secret (launch/meeting.py); torch.distributed meets there as well. This process is no rank.

  SIGTERM                       the ranks save and stop
  a rank has failed             the others are asked to, and ended if they do not
  a node or an actor is gone    the same; then the run goes on from its last checkpoint where there is room

Ray's own retries are off, since a rank alone cannot be started again. The run is started again as a whole, at most
lives.MOST_IDLE times in a row without getting further.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from hvdllm import runs, screen
from hvdllm.errors import RunError, UserError
from hvdllm.interpreter import found
from hvdllm.launch import group, meeting, network, ray_node
from hvdllm.launch.lives import MOST_IDLE, Lives
from hvdllm.launch.parts import Ray
from hvdllm.lock import STALE_S, held
from hvdllm.settings import made

CONNECT_S = 5.0  # the longest that the head may take to accept a connection
LOOK_S = 120.0  # the longest that an actor may take to start
NEWS_S = 10.0  # how long an actor waits for news before it says that there are none
POLL_S = 0.2
HEAR_S = 1.0  # between the first rank that fails and the end of the others: the one that caused it may be heard second
OF_A_NODE = ("RAY_", "CUDA_VISIBLE_DEVICES", "HOSTNAME", "TMPDIR", "XDG_RUNTIME_DIR", "SSH_", *group.FOREIGN)


# ------------------------------------------------------------------ the cluster
@dataclass(frozen=True)
class Node:
    """A living node of the cluster.

    Attributes:
        key: Ray's number of it.
        name: what the user knows it by: its name if it has one, and its address.
        address: its IP address.
        cpus, gpus: what it has.
    """

    key: str
    name: str
    address: str
    cpus: int
    gpus: int

    def ranks(self, settings: Ray) -> int:
        """How many ranks find room on it."""
        by_cpus = self.cpus // settings.cpus_per_rank
        return min(by_cpus, self.gpus // settings.gpus_per_rank) if settings.gpus_per_rank else by_cpus


def connect(address: str) -> None:
    """Connects this process to the cluster. Raises UserError if it cannot."""
    where = os.environ.get("RAY_ADDRESS", address) if address == "auto" else address
    host, _, port = where.rpartition(":")
    try:
        if host and port.isdecimal():
            socket.create_connection((host, int(port)), CONNECT_S).close()
    except OSError as error:
        raise UserError(
            f"launch.address={where}: no Ray cluster answers there ({error.strerror or error}): give the address that "
            "`ray start --head` printed"
        ) from None
    try:
        ray.init(address=where, log_to_driver=False, logging_level="ERROR")
    except (Exception, SystemExit) as error:
        raise UserError(refused(where, str(error))) from None


def refused(address: str, error: str) -> str:
    """The sentence for a cluster that Ray does not connect to. error: what Ray says, perhaps in several lines."""
    if "Could not find any running Ray instance" in error:
        return (
            f"launch.address={address}: this machine is no node of a Ray cluster: make it one with `ray start`, or "
            "start hvdllm on one"
        )
    lines = [line.strip() for line in error.splitlines() if line.strip()]
    if lines and lines[0].startswith("Version mismatch"):
        return f"launch=ray: {' '.join(lines)}: use the cluster's versions of Python and Ray here"
    why = " ".join(lines)[:300]
    return (
        f"launch.address={address}: Ray does not connect ({why}): is this machine a node of that cluster, and is "
        "RAY_AUTH_MODE set as there?"
    )


def nodes() -> list[Node]:
    """The living nodes of the cluster, by name."""
    living = []
    for node in ray.nodes():
        if node["Alive"]:
            address, name, has = node["NodeManagerAddress"], node.get("NodeName") or "", node["Resources"]
            shown = f"{name} ({address})" if name not in ("", address) else address
            living.append(Node(node["NodeID"], shown, address, int(has.get("CPU", 0)), int(has.get("GPU", 0))))
    return sorted(living, key=lambda node: (node.name, node.key))


def room(settings: Ray, living: Sequence[Node]) -> int:
    """How many runs find room at once, by all that the nodes have."""
    each = [node.ranks(settings) for node in living]
    if settings.nodes is None:
        return sum(each) // settings.np
    share, most = settings.np // settings.nodes, 0
    while sum(min(most + 1, count // share) for count in each) >= (most + 1) * settings.nodes:
        most += 1
    return most


def too_small(settings: Ray, living: Sequence[Node]) -> str:
    """The sentence for a cluster that has no room for a run."""
    asked = f"launch.np={settings.np}" + (f" launch.nodes={settings.nodes}" if settings.nodes else "")
    has = ", ".join(f"{node.name}: {node.cpus} CPUs, {node.gpus} GPUs" for node in living)
    return (
        f"{asked}: the Ray cluster has no room for so many ranks of {settings.cpus_per_rank} CPUs and "
        f"{settings.gpus_per_rank} GPUs ({has}): ask for fewer ranks, CPUs or GPUs, or add nodes"
    )


# ------------------------------------------------------------------ a life of a run
@dataclass
class Rank:
    """A rank that was placed.

    Attributes:
        node: on which it stands.
        place: the handle of its actor.
        code: its exit code, once it has ended.
        said: its last line that begins with `hvdllm:`, or "".
        lost: whether its actor is gone.
    """

    node: Node
    place: object
    code: int | None = None
    said: str = ""
    lost: bool = False


@dataclass
class Run:
    """A run and its lives.

    Args:
        settings: of the launcher.
        runs_dir, name: where its folder is.
        words: what each rank runs, the interpreter first.
        stop: set when the run is to save and end.
    """

    settings: Ray
    runs_dir: str
    name: str
    words: Sequence[str]
    stop: threading.Event = field(default_factory=threading.Event)

    @property
    def folder(self) -> Path:
        return Path(self.runs_dir, self.name)

    def live(self) -> int:
        """Runs it to its end, in as many lives as it takes, and returns its exit code."""
        lives = Lives(saved(self.folder))
        while True:
            with self.placed() as ranks:
                code = self.life(ranks)
                lost = [rank for rank in ranks if rank.lost]
            if not lost or self.stop.is_set() or code == 0:
                return code
            if not lives.ended(saved(self.folder)):
                raise RunError(
                    f"{MOST_IDLE} lives of this run came no further than {lives.tokens:,} tokens, so it is not started "
                    "again: give it a smaller save_every, or steadier nodes"
                )
            self.until_free()
            if self.stop.is_set():
                return code
            say(f"the run goes on from {lives.tokens:,} tokens")

    def until_free(self) -> None:
        """Waits until the run's folder is free. The lock of a rank on a lost node is stale after STALE_S seconds."""
        end = time.monotonic() + 2 * STALE_S
        while held(self.folder) and time.monotonic() < end and not self.stop.is_set():
            self.stop.wait(POLL_S)

    @contextlib.contextmanager
    def placed(self) -> Iterator[list[Rank]]:
        """A context with the ranks' actors, in the order of ranks. There are none if the run is to stop already.

        Raises UserError if a node cannot run them.
        """
        settings = self.settings
        count, share = (settings.nodes, settings.np // settings.nodes) if settings.nodes else (settings.np, 1)
        each = {"CPU": float(settings.cpus_per_rank)}
        if settings.gpus_per_rank:
            each["GPU"] = float(settings.gpus_per_rank)
        bundle = {what: share * number for what, number in each.items()}
        made = placement_group([bundle] * count, strategy="STRICT_SPREAD" if settings.nodes else "PACK")
        try:
            yield self._placed(made, count, share)
        finally:
            with contextlib.suppress(Exception):  # the cluster may be gone
                remove_placement_group(made)

    def _placed(self, made: PlacementGroup, count: int, share: int) -> list[Rank]:
        if not self.until_room(made):
            return []
        at = placement_group_table(made)["bundles_to_node_id"]
        living = {node.key: node for node in nodes()}
        here = ray.get_runtime_context().get_node_id()
        order = sorted(set(at.values()), key=lambda key: (key != here, min(k for k, v in at.items() if v == key)))
        actor = ray.remote(max_restarts=0, max_task_retries=0, max_concurrency=4)(ray_node.Place)
        ranks = []
        for index in sorted(range(count), key=lambda index: (order.index(at[index]), index)):
            where = PlacementGroupSchedulingStrategy(made, placement_group_bundle_index=index)
            for _ in range(share):
                place = actor.options(
                    num_cpus=self.settings.cpus_per_rank,
                    num_gpus=self.settings.gpus_per_rank,
                    scheduling_strategy=where,
                ).remote()
                node = living.get(at[index]) or Node(at[index], at[index][:8], "", 0, 0)
                ranks.append(Rank(node, place))
        return ranks

    def until_room(self, group: PlacementGroup) -> bool:
        """Waits until a placement group has room. Returns False if the run is to stop before.

        Raises RunError if the nodes of the cluster had no room for wait_s seconds, even if nobody else used them.
        """
        lacking: float | None = None  # since when
        told = ""
        while not group.wait(1):
            if self.stop.is_set():
                return False
            limit = self.settings.wait_s
            if room(self.settings, nodes()):
                lacking, now = None, "waiting for others to leave the Ray cluster"
            else:
                lacking, now = lacking or time.monotonic(), f"waiting up to {limit:.0f} s for a node (launch.wait_s)"
                if time.monotonic() > lacking + limit:
                    raise RunError(
                        f"no node came within {limit:.0f} s (launch.wait_s): the same command goes on once there is one"
                    )
            if now != told:
                say(now)
                told = now
        return True

    def life(self, ranks: list[Rank]) -> int:
        """Starts the ranks, and waits for their end. Returns the exit code: 0 if all returned 0, else that of the rank
        that failed, or 1 if its actor was gone."""
        if not ranks:
            return 128 + signal.SIGTERM
        with self.token() as (path, token):
            looks = answers(ranks, [call(rank.place, "look", os.getcwd(), str(path)) for rank in ranks])
        if any(rank.lost for rank in ranks):
            return 1
        for rank, facts in zip(ranks, looks, strict=True):
            if why := unfit(facts, token, self.runs_dir):
                raise UserError(f"node {rank.node.name} {why}")
        hosts = [rank.node.key for rank in ranks]
        counts = [hosts.count(key) for key in dict.fromkeys(hosts)]
        gpus = {key: [looks[k]["gpus"] for k, at in enumerate(hosts) if at == key] for key in hosts}
        plan = meeting.plan(counts)
        address = self.address(ranks)
        point = meeting.MeetingPoint(address, plan)
        try:
            shared = {**ours(), **network.variables(self.settings.interface), **point.variables(address)}
            starts = []
            for k, (rank, place) in enumerate(zip(ranks, meeting.places(plan), strict=True)):
                env = {**shared, **place}
                if self.settings.gpus_per_rank:  # all of a node's, of which a rank takes the one of its local rank
                    env["CUDA_VISIBLE_DEVICES"] = ",".join(gpus[hosts[k]])
                starts.append(call(rank.place, "start", list(self.words[3:]), env, os.getcwd(), address))
            answers(ranks, starts)
            return self.watch(ranks)
        finally:
            point.close()

    def watch(self, ranks: list[Rank]) -> int:
        """Passes on what the ranks print until all have ended, and returns the exit code, as life() says. If one fails,
        the others are asked to save and end."""
        waiting = {call(rank.place, "news", NEWS_S): k for k, rank in enumerate(ranks) if rank.code is None}
        failures = [k for k, rank in enumerate(ranks) if rank.lost]  # before the others were asked to end
        due: float | None = None  # when ranks are to be asked next
        asked = False
        while waiting:
            done, _ = ray.wait(list(waiting), num_returns=1, timeout=POLL_S)
            for reference in done:
                k = waiting.pop(reference)
                if not self.hear(k, ranks[k], reference):
                    waiting[call(ranks[k].place, "news", NEWS_S)] = k
                elif ranks[k].code and not asked and not self.stop.is_set():
                    failures.append(k)
            now = time.monotonic()
            if due is None and (self.stop.is_set() or failures):
                due = now if self.stop.is_set() else now + HEAR_S
            if due is not None and now >= due:
                tell(ranks)
                asked, due = True, now + ray_node.SAVE_S if failures else math.inf  # a user's stop has no limit
        if not failures:
            return next((rank.code for rank in ranks if rank.code), 0)
        if any(rank.lost for rank in ranks):
            return 1
        first = max(failures, key=lambda k: ((ranks[k].code or 0) > 128, bool(ranks[k].said)))
        failed(first, ranks[first])
        return ranks[first].code or 1

    def hear(self, number: int, rank: Rank, reference: object) -> bool:
        """Prints what a rank has printed. Returns whether it has ended, or is lost."""
        try:
            lines, rank.code = ray.get(reference)
        except RayError as error:
            lost(number, rank, error)
            return True
        for line in lines:
            emit(f"[{number}]<stdout>:{line}")
            rank.said = line if line.startswith("hvdllm: ") else rank.said
        return rank.code is not None

    def address(self, ranks: Sequence[Rank]) -> str:
        """Where ranks find this process: on the interface that is named, else on the loopback if all are here, else
        where Ray reaches it."""
        if self.settings.interface:
            return network.address_of(self.settings.interface)
        own: str = ray.util.get_node_ip_address()
        return "127.0.0.1" if all(rank.node.address == own for rank in ranks) else own

    @contextlib.contextmanager
    def token(self) -> Iterator[tuple[Path, str]]:
        """A context with a file in runs_dir that holds a token, by which a node shows that it sees the same folder."""
        token = secrets.token_hex(16)
        path = Path(self.runs_dir).absolute() / f".hvdllm-{token[:8]}"
        try:
            runs.write_whole(path, token)
            yield path, token
        except OSError as error:
            raise UserError(f"cannot write {path} ({error.strerror or error}): choose another runs_dir") from None
        finally:
            path.unlink(missing_ok=True)


def unfit(facts: Mapping[str, str], token: str, runs_dir: str) -> str | None:
    """Why a node cannot run a rank, as the rest of a sentence, or None.

    Args:
        facts: what it says of itself (ray_node.Place.look).
        token: what it should have read.
        runs_dir: in which the token is.
    """
    for name, own in ray_node.versions().items():
        if facts[name] != own:
            return f"has {name} {facts[name]}, and this process {own}: install the same there"
    if facts["token"] != token:
        return f"does not see runs_dir={runs_dir} of this machine: give a folder that all nodes share"
    if not facts["cwd"]:
        return f"has no folder {os.getcwd()}: start hvdllm in a folder that all nodes share"
    return None


def saved(folder: Path) -> int:
    """The tokens of the run's last checkpoint."""
    return max((int(record["tokens"]) for record in runs.records(folder) if record.get("kind") == "save"), default=0)


def ours() -> dict[str, str]:
    """The variables of this process that its ranks have, too: none that say something of this host alone."""
    return {key: value for key, value in os.environ.items() if not key.startswith(OF_A_NODE)} | found()


# ------------------------------------------------------------------ actors
def call(place: object, method: str, *arguments: object) -> object:
    """Calls a method of an actor, and returns Ray's reference to the result."""
    return getattr(place, method).remote(*arguments)


def answers(ranks: Sequence[Rank], references: Sequence[object]) -> list[dict[str, str]]:
    """What each actor answers to a call. Those that are gone are lost. Raises UserError if one cannot do it."""
    found = []
    for number, (rank, reference) in enumerate(zip(ranks, references, strict=True)):
        try:
            found.append(ray.get(reference, timeout=LOOK_S))
        except RayError as error:
            text = str(error)
            if "creation task" in text or isinstance(error, RayTaskError):
                raise UserError(
                    f"node {rank.node.name} cannot start a rank ({last_line(text)}): install hvdllm there as it is here"
                ) from None
            lost(number, rank, error)
    return found


def last_line(text: str) -> str:
    """The last line of a text that is not empty."""
    return next((line.strip()[:200] for line in reversed(text.splitlines()) if line.strip()), "")


def tell(ranks: Sequence[Rank]) -> None:
    """Asks all ranks that live to save and end."""
    for rank in ranks:
        if rank.code is None:
            with contextlib.suppress(RayError):
                call(rank.place, "ask")


def lost(number: int, rank: Rank, error: RayError) -> None:
    """Says that the actor of a rank is gone, or its node."""
    rank.lost, rank.code = True, 1
    with contextlib.suppress(Exception):  # it may be alive and only out of reach
        ray.kill(rank.place)
    say(f"rank {number} on node {rank.node.name} is gone ({type(error).__name__}): its node or its actor has died")


def failed(number: int, rank: Rank) -> None:
    """Says that a rank has failed. If the rank has said why itself, that stays the last sentence of hvdllm."""
    code = rank.code or 0
    how = f"was killed by {signal.Signals(code - 128).name}" if code > 128 else f"ended with code {code}"
    text = f"rank {number} on node {rank.node.name} {how}"
    if rank.said:
        emit(text)
    else:
        say(text)


def say(text: str) -> None:
    """Prints a sentence of hvdllm."""
    emit(f"hvdllm: {screen.one_line(text)}")


def emit(line: str) -> None:
    """Prints a line. sys.stdout is left to Ray, which prints pages about a dead worker; they are in its logs, too."""
    print(line, end="" if line.endswith("\n") else "\n", file=sys.__stdout__, flush=True)


# ------------------------------------------------------------------ the program
def main(argv: list[str]) -> int:
    """Runs this module as a program, and returns its exit code."""
    settings: Ray = made(Ray, json.loads(argv[0]), "launch.")
    connect(settings.address)
    try:
        if not (runs_at_once := room(settings, living := nodes())):
            raise UserError(too_small(settings, living))
        if len(argv) == 1:
            emit(str(runs_at_once))
            return 0
        run = Run(settings, argv[1], argv[2], argv[3:])

        def hear(number: int, frame: FrameType | None) -> None:
            run.stop.set()

        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, hear)  # after ray.init, which has handlers of its own
        return run.live()
    finally:
        ray.shutdown()


if __name__ == "__main__":
    with open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing):
        try:
            sys.exit(main(sys.argv[1:]))
        except (UserError, RunError) as error:
            say(str(error))
            sys.exit(2 if isinstance(error, UserError) else 1)
