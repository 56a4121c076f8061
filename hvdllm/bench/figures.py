"""From what the ranks noted to the figures of a table. All functions are pure.

One repetition of a case is a Raw. It has the marks of every rank (bench/rank.py) and `commit` records: those of rank 0,
or, if every rank trained alone, those of each rank. The warm-up rounds at the beginning are left out, and so is the
last round, which lands what the others overlap. Seconds come in and milliseconds go out. Bytes are those that one rank
(one interface) sends.

step           time between two commits, median
a batch        mean time for as many tokens as a global batch has; if a commit is an outer round, over whole rounds
compute        time of gradients, the update and what the exchange computes itself; mean over ranks, median
blocked        time in which compute stood still for the exchange
flight         time in which something travelled
hidden         share of the flight under which compute went on: 1 - blocked / flight, of the sums
communication  the flight of the blocking exchange (allreduce) on the same wire and world, times the bytes sent here
               over those sent there; if that was not measured, the case's own flight
bound          step / max(compute alone, communication), where compute alone is that of a process without Horovod for as
               many tokens; at 1 everything is hidden that can be
sum alone      time of a sum of all gradients on this wire, after its warm-up, while nothing computes; median
kept           tokens a second, over the sum of what the ranks compute alone, each as slow as it is (--slow)
wire           bytes at the interface, minus FRAME for each packet, minus what Horovod sends while idle for the time in
               which nothing travelled (its one thread is silent while a collective runs)
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
    """What the ranks noted in one repetition.

    Attributes:
        marks: [rank][commit], see bench/rank.py.
        records: [rank, or only rank 0][commit].
        sums: what sums_alone of bench/rank.py returned on rank 0; None if it was not called.
    """

    marks: list[list[list[Any]]]
    records: list[list[Json]]
    sums: Json | None = None


@dataclass(frozen=True)
class Repetition:
    """One run of a case: the seconds of every measured step, and sums over these steps."""

    step_s: list[float]
    compute_s: list[float]
    blocked_s: list[float]
    flight_s: list[float]
    seconds: float  # from the first measured step to the last
    tokens: int  # committed in them
    updates: int  # up to the tokens at which all cases are compared, with the warm-up
    loss: float  # at the commit that reaches these tokens, in nats a token
    sent: float  # bytes of a rank in the measured steps, as the world counts them
    interface: float | None  # bytes of an interface in the measured steps, without frames
    packet: float | None  # bytes of a mean packet
    cpu_s: float  # of a rank's process
    rank_tokens_per_s: list[float] = field(default_factory=list)  # of each process, if they train alone
    sum_s: list[float] = field(default_factory=list)  # of sums alone
    sum_bytes: float | None = None  # that a rank sends in one


@dataclass(frozen=True)
class Measured:
    """The figures of a case, over all of its repetitions."""

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
    """The sums over the measured steps of one repetition.

    Args:
        raw: what the ranks noted.
        warmup: how many commits at the beginning are left out.
        tokens: the committed tokens at which the loss and the updates are compared.

    Raises ValueError, with half a sentence, if too few commits were made.
    """
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
    """Bytes a second, without frames, that an interface sends while the ranks compute and Horovod is idle."""
    rates = [rep.interface / rep.seconds for rep in repetitions if rep.interface is not None]
    return median(rates) if rates else 0.0


def rank_speeds(repetitions: Sequence[Repetition]) -> list[float]:
    """Tokens a second of each rank that computes alone, as medians over the repetitions."""
    return [median(each) for each in zip(*(rep.rank_tokens_per_s for rep in repetitions), strict=True)]


def pooled(repetitions: Sequence[Repetition], name: str) -> float:
    """The median over all steps of all repetitions, in milliseconds."""
    return 1e3 * float(median(value for rep in repetitions for value in getattr(rep, name)))


def sent_a_step(repetitions: Sequence[Repetition]) -> float:
    """The bytes that a rank sends in a mean step."""
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
) -> Measured:
    """The figures of a case.

    Args:
        repetitions: of the case.
        alone: repetitions that compute without Horovod, each on a rank's share of batch_tokens.
        blocking: repetitions of the all-reduce on the same wire and world.
        batch_tokens: tokens of a global batch.
        idle: bytes a second that Horovod sends while idle.
        own_interface: whether each rank has an interface of its own; if not, the counters miss what it sends to ranks
            on the same host.
        speeds: tokens a second of each rank alone, as slow as it is.
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
    return Measured(
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
