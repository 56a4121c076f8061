"""From what ranks noted to the figures of a table: pure functions.

One repetition of a case is a Raw: the marks of every rank (bench/rank.py) and its `commit` records, the ones of rank 0
or, where every rank trained alone, of each. Left out are the rounds of warm-up at the beginning and the last one, which
lands what others overlap. Seconds in, milliseconds out; bytes are those that one rank (one interface) sends.

step           between two commits, median
a batch        mean time for as many tokens as a global batch: of whole outer rounds, where a commit is one
compute        gradients, the update and what the exchange computes itself; mean over ranks, median
blocked        compute stood still for the exchange; flight: something travelled
hidden         share of the flight under which compute went on, 1 - blocked / flight, of the sums
communication  the flight of the blocking exchange (allreduce) on the same wire and world, times the bytes sent here
               over those sent there; where it was not measured, the own flight
bound          step / max(compute alone, communication); compute alone is that of a process without Horovod, for as many
               tokens. 1: whatever can be hidden is
sum alone      of all gradients on this wire, its warm-up over, while nothing computes; median
kept           tokens a second over the sum of what the ranks compute alone, each as slow as it is (--slow)
wire           bytes at the interface, less FRAME a packet, less what Horovod says while idle, for the time in which
               nothing travelled (its one thread is silent while a collective runs)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean, median
from typing import Any

from hvdllm.launch.lab import FRAME
from hvdllm.plain import Json


@dataclass(frozen=True)
class Raw:
    """marks: [rank][commit]; records: [rank or 1][commit]. sums: rank 0's of bench/rank.py, None without any."""

    marks: list[list[list[Any]]]
    records: list[list[Json]]
    sums: Json | None = None


@dataclass(frozen=True)
class Repetition:
    """One run of a case: seconds of every measured step, and sums over them."""

    step_s: list[float]
    compute_s: list[float]
    blocked_s: list[float]
    flight_s: list[float]
    seconds: float  # from the first measured step to the last
    tokens: int  # committed in them
    updates: int  # to the tokens that all cases are compared at, warm-up included
    loss: float  # of the commit that reaches them, nats a token
    sent: float  # bytes a rank in the measured steps, as the world counts
    interface: float | None  # bytes less frames an interface in the measured steps
    packet: float | None  # bytes of a mean packet
    cpu_s: float  # of a rank's process
    rank_tokens_per_s: list[float] = field(default_factory=list)  # of processes that train alone: each one's
    sum_s: list[float] = field(default_factory=list)  # of sums alone
    sum_bytes: float | None = None  # that a rank sends in one


@dataclass(frozen=True)
class Figures:
    """Of all repetitions of a case."""

    step_ms: float
    compute_ms: float
    blocked_ms: float
    flight_ms: float
    hidden: float | None
    communication_ms: float | None
    bound: float | None
    sent_mb: float
    wire_mb: float | None
    wire_ratio: float | None
    loss: float
    updates: float
    tokens_per_update: float
    tokens_per_s: float
    cpu_share: float  # CPU seconds of a rank over seconds
    packet_bytes: float | None
    batch_ms: float
    sum_ms: float | None = None
    sum_mb: float | None = None
    kept: float | None = None
    step_ms_of_repetitions: list[float] = field(default_factory=list)


def repetition(raw: Raw, warmup: int, tokens: int) -> Repetition:
    """tokens: committed, at which loss and updates are compared. Raises ValueError, with half a sentence, where too few
    commits were made."""
    commits = min(len(marks) for marks in raw.marks)
    first, last = warmup, commits - 2  # of the measured commits; a step ends with its commit
    if last < first or any(len(records) < commits - 1 for records in raw.records):
        raise ValueError(f"made {commits} commits, too few for {warmup} of warm-up and one at the end: raise --steps")

    def grown(column: int) -> list[float]:
        return [marks[last][column] - marks[first - 1][column] for marks in raw.marks]

    def booked(name: str) -> list[float]:
        return [fmean(records[k][name] for records in raw.records) for k in range(first, last + 1)]

    speeds = [(m[last][1] - m[first - 1][1]) / (m[last][0] - m[first - 1][0]) for m in raw.marks]
    steps = [fmean(marks[k][0] - marks[k - 1][0] for marks in raw.marks) for k in range(first, last + 1)]
    reached = [next((r for r in records if r["tokens"] >= tokens), records[-1]) for records in raw.records]
    interface = packet = None
    if all(marks[last][3] is not None for marks in raw.marks):
        octets, packets = fmean(grown(3)), fmean(grown(4))
        interface, packet = octets - FRAME * packets, octets / max(packets, 1.0)
    return Repetition(
        steps, booked("compute_s"), booked("blocked_s"), booked("flight_s"),
        seconds=fmean(grown(0)), tokens=round(fmean(grown(1))),
        updates=1 + sum(record["tokens"] < tokens for record in raw.records[0][:-1]),
        loss=fmean(record["loss"] for record in reached), sent=fmean(grown(2)), interface=interface,
        packet=packet, cpu_s=fmean(grown(5)), rank_tokens_per_s=speeds if len(raw.records) == len(raw.marks) else [],
        sum_s=raw.sums["seconds"] if raw.sums else [], sum_bytes=raw.sums["bytes"] if raw.sums else None,
    )  # fmt: skip


def idle_rate(repetitions: Sequence[Repetition]) -> float:
    """Bytes a second, less frames, that an interface sends while ranks compute and Horovod has nothing to do."""
    rates = [rep.interface / rep.seconds for rep in repetitions if rep.interface is not None]
    return median(rates) if rates else 0.0


def rank_speeds(repetitions: Sequence[Repetition]) -> list[float]:
    """Tokens a second of each rank that computes alone; medians over repetitions."""
    return [median(each) for each in zip(*(rep.rank_tokens_per_s for rep in repetitions), strict=True)]


def pooled(repetitions: Sequence[Repetition], name: str) -> float:
    """Median over all steps of all repetitions, in milliseconds."""
    return 1e3 * float(median(value for rep in repetitions for value in getattr(rep, name)))


def sent_a_step(repetitions: Sequence[Repetition]) -> float:
    return sum(rep.sent for rep in repetitions) / sum(len(rep.step_s) for rep in repetitions)


def figures(
    repetitions: Sequence[Repetition],
    *,
    alone: Sequence[Repetition] = (),
    blocking: Sequence[Repetition] = (),
    batch_tokens: int = 1,
    idle: float = 0.0,
    own_interface: bool = True,
    speeds: Sequence[float] = (),
) -> Figures:
    """alone: compute without Horovod, of a rank's share of batch_tokens. blocking: the all-reduce on the same wire and
    world. idle: bytes a second.

    speeds: tokens a second of each rank alone, as slow as it is.
    own_interface: does each rank have one of its own? Else what it sends to its neighbours is not in the counters.
    """
    steps = sum(len(rep.step_s) for rep in repetitions)
    seconds = sum(rep.seconds for rep in repetitions)
    tokens = sum(rep.tokens for rep in repetitions)
    flight, blocked = (sum(sum(getattr(rep, name)) for rep in repetitions) for name in ("flight_s", "blocked_s"))
    step_ms, sent = pooled(repetitions, "step_s"), sent_a_step(repetitions)
    communication = bound = None
    if flight:
        own = pooled(repetitions, "flight_s")
        whole = sent_a_step(blocking) if blocking else 0.0
        communication = pooled(blocking, "flight_s") * sent / whole if whole else own
        if alone:
            compute = pooled(alone, "step_s") * tokens / steps / batch_tokens
            bound = step_ms / max(compute, communication)
    counted = [rep for rep in repetitions if rep.interface is not None]
    wire = None
    if counted and own_interface:
        quiet = max(0.0, seconds - flight)
        wire = max(0.0, sum(rep.interface or 0.0 for rep in counted) - idle * quiet) / steps
    wire_mb, wire_ratio = (wire / 1e6, wire / sent if sent else None) if wire is not None else (None, None)
    return Figures(
        step_ms=step_ms, compute_ms=pooled(repetitions, "compute_s"), blocked_ms=pooled(repetitions, "blocked_s"),
        flight_ms=pooled(repetitions, "flight_s"), hidden=1 - blocked / flight if flight else None,
        communication_ms=communication, bound=bound, sent_mb=sent / 1e6, wire_mb=wire_mb,
        wire_ratio=wire_ratio, loss=median(rep.loss for rep in repetitions),
        updates=median(rep.updates for rep in repetitions), tokens_per_update=tokens / steps,
        tokens_per_s=tokens / seconds, cpu_share=sum(rep.cpu_s for rep in repetitions) / seconds,
        sum_ms=pooled(repetitions, "sum_s") if all(rep.sum_s for rep in repetitions) else None,
        sum_mb=sums[0] / 1e6 if (sums := [rep.sum_bytes for rep in repetitions if rep.sum_bytes is not None]) else None,
        packet_bytes=median(rep.packet or 0.0 for rep in counted) if counted else None,
        batch_ms=1e3 * seconds * batch_tokens / tokens,
        kept=tokens / seconds / sum(speeds) if speeds else None,
        step_ms_of_repetitions=[1e3 * median(rep.step_s) for rep in repetitions],
    )  # fmt: skip
