"""The records of a run, and the sums that the next record will hold.

What a commit has cost and achieved is known only one commit later (exchange/base.py, Report). A `commit` record is
therefore opened at its mark and written at the next one.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from statistics import fmean

from hvdllm.exchange.base import Commit, Report
from hvdllm.online.drift import Drift
from hvdllm.plain import Json
from hvdllm.runs import Folder
from hvdllm.trainer.clock import Clock
from hvdllm.trainer.prequential import Prequential
from hvdllm.trainer.show import Show
from hvdllm.trainer.straggler import Straggler, waited_for
from hvdllm.world.base import World


@dataclass
class Window:
    """Sums since the last `commit` record, which are part of the checkpoint. Seconds are means over ranks unless said
    otherwise."""

    loss_sum: float = 0.0
    loss_tokens: float = 0.0
    compute_s: float = 0.0
    blocked_s: float = 0.0
    blocked_s_max: float = 0.0
    flight_s: float = 0.0
    cpu_s: float = 0.0  # of all ranks
    skew_s: float = 0.0  # compute of the slowest rank minus that of the fastest
    micro_batches: list[float] = field(default_factory=list)  # of each rank, like the next two
    compute_s_by_rank: list[float] = field(default_factory=list)
    blocked_s_by_rank: list[float] = field(default_factory=list)
    updates: int = 0
    stale: float = 0.0  # staleness, summed over updates
    stalest: float = 0.0

    @property
    def loss(self) -> float:
        """Mean loss in nats per token, or NaN if nothing has been added yet."""
        return self.loss_sum / self.loss_tokens if self.loss_tokens else float("nan")

    def count(self, commit: Commit) -> None:
        """Adds what is known of a commit at its own mark."""
        self.updates += commit.updates
        self.stale += commit.staleness * commit.updates
        self.stalest = max(self.stalest, commit.staleness_max or commit.staleness)

    def add(self, report: Report) -> None:
        """Adds the report of a commit, which arrives at the next mark."""
        self.loss_sum += report.loss_sum
        self.loss_tokens += report.loss_tokens
        self.compute_s += fmean(report.compute_s)
        self.blocked_s += fmean(report.blocked_s)
        self.blocked_s_max += max(report.blocked_s)
        self.flight_s += fmean(report.flight_s)
        self.cpu_s += sum(report.cpu_s)
        self.skew_s += max(report.compute_s) - min(report.compute_s)
        self.micro_batches = _added(self.micro_batches, report.micro_batches)
        self.compute_s_by_rank = _added(self.compute_s_by_rank, report.compute_s)
        self.blocked_s_by_rank = _added(self.blocked_s_by_rank, report.blocked_s)


def _added(sums: list[float], values: list[float]) -> list[float]:
    """The sums rank by rank. If the number of ranks has changed, or at first, only the new values count."""
    return [a + b for a, b in zip(sums, values, strict=True)] if len(sums) == len(values) else list(values)


class Ledger:
    """Keeps the sums of a run and writes its records.

    Args:
        folder: of the run, or None on ranks other than 0, which write nothing.
        world: the ranks.
        clock: the training clock.
        show: what tells the user of a straggler.
        window: tokens over which the prequential loss of a stream is averaged, or 0 if the run trains on none.
    """

    def __init__(self, folder: Folder | None, world: World, clock: Clock, show: Show, window: int = 0) -> None:
        self.folder, self.world, self.clock, self.show = folder, world, clock, show
        self.prequential = Prequential(world, window)
        self.held: Json | None = None  # a whole `commit` record that waits for its prequential loss
        self.window = Window()
        self.straggler = Straggler()
        self.pending: Json | None = None  # a `commit` record that waits for its loss
        self.last_record = {"tokens": 0.0, "seconds": 0.0, "bytes": 0.0}
        self.bytes_before = 0.0  # sent in earlier lives of this run
        self.blocked_s = 0.0  # over all booked commits, mean over ranks, earlier lives included
        self.last_loss = float("nan")  # of the last booked commit
        self.last_blocked = 0.0  # the share of its time in which ranks waited for the exchange
        self.recorded_loss: float | None = None  # of the last `commit` record

    @property
    def loss(self) -> float:
        """The loss of the newest `commit` record. Before there is one, the loss that the first would hold now."""
        return self.window.loss if self.recorded_loss is None else self.recorded_loss

    def record(self, kind: str, tokens: int, seconds: float, values: Json, sync: bool = False) -> None:
        """Writes a record on rank 0, with the values that every record has: tokens, seconds, bytes and blocked seconds.

        Args:
            kind: of record.
            tokens: committed so far.
            seconds: of the training clock.
            values: what else the record holds.
            sync: whether to wait until the record is on the disk.
        """
        if self.folder is not None:
            self.folder.record(kind, {"tokens": tokens, **self.totals(seconds), **values}, sync=sync)

    def totals(self, seconds: float) -> dict[str, float]:
        """Sums over all lives of the run.

        They are the seconds of the training clock, the bytes that rank 0 has sent, and the seconds that ranks waited
        for the exchange in all booked commits, as a mean over ranks.
        """
        sent = round(self.bytes_before + self.world.bytes_sent)  # rounded, since threads add to it in any order
        return {"seconds": seconds, "bytes_total": sent, "blocked_s_total": self.blocked_s}

    def open(self, commit: Commit, extra: bool, standing: dict[str, float]) -> None:
        """Opens a `commit` record.

        Args:
            commit: the commit at this mark.
            extra: the record is off the cadence, because the run ends here. A run that goes on takes it back.
            standing: what the record says of data that arrives.
        """
        self.write_held()
        if not extra:  # or the averages, and places of drift, would differ from those of a run that never ended
            self._look_for_drift(commit.tokens)
            self.prequential.post()
        seconds = self.clock.seconds()
        self.pending = {"step": commit.step, "tokens": commit.tokens, "seconds": seconds, "lr": commit.lr}
        self.pending |= {"bytes": self.totals(seconds)["bytes_total"], "extra": extra, **standing}

    def book(self, report: Report | None) -> None:
        """Adds the report of the commit before, and writes that commit's record if one is open."""
        self.prequential.send()
        if report is None:
            return
        self.window.add(report)
        self.blocked_s += fmean(report.blocked_s)
        self.last_loss = report.loss_sum / max(report.loss_tokens, 1.0)
        blocked = sum(report.blocked_s)
        self.last_blocked = blocked / max(blocked + sum(report.compute_s), 1e-9)
        if self.pending is None:
            return
        window, head, last = self.window, self.pending, self.last_record
        passed = head["seconds"] - last["seconds"]
        values: Json = {
            "step": head["step"],
            **{name: head[name] for name in ("arrived", "waiting_tokens") if name in head},
            "bytes_total": head["bytes"],
            "loss": window.loss,
            "lr": head["lr"],
            "grad_norm": report.grad_norm,
            "compute_s": window.compute_s,
            "blocked_s": window.blocked_s,
            "blocked_s_max": window.blocked_s_max,
            "flight_s": window.flight_s,
            "hidden": 1 - window.blocked_s / window.flight_s if window.flight_s else None,
            "skew_s": window.skew_s,
            "cpu_s_per_token": window.cpu_s / max(window.loss_tokens, 1.0),
            "bytes_sent": head["bytes"] - last["bytes"],
            "staleness_mean": window.stale / max(window.updates, 1),
            "staleness_max": window.stalest,
            "micro_batches": sum(window.micro_batches),
            "micro_batches_by_rank": window.micro_batches,
            "compute_s_by_rank": window.compute_s_by_rank,
            "blocked_s_by_rank": window.blocked_s_by_rank,
            "micro_batches_per_s_by_rank": [
                count / seconds if seconds else 0.0
                for count, seconds in zip(window.micro_batches, window.compute_s_by_rank, strict=True)
            ],
            "waited_for": waited_for(window.compute_s_by_rank, window.blocked_s_by_rank),
            "updates": window.updates,
            "tokens_per_update": (head["tokens"] - last["tokens"]) / max(window.updates, 1),
            "noise_scale": report.noise_scale,
            "tokens_per_s": (head["tokens"] - last["tokens"]) / passed if passed > 0 else 0.0,
        }
        self.recorded_loss = values["loss"]
        if self.prequential.window:
            self.held = {"head": head, "values": values}
        else:
            self.record("commit", head["tokens"], head["seconds"], values)
        if said := self.straggler.note(window.compute_s_by_rank, window.blocked_s_by_rank):
            self.show.say(said)
            self.record("event", head["tokens"], head["seconds"], {"what": said, "straggler": self.straggler.named})
        self.last_record = {key: head[key] for key in ("tokens", "seconds", "bytes")}
        self.window, self.pending = Window(), None

    def write_held(self) -> None:
        """Writes the record that waits for its prequential loss. Every rank calls it at the same marks."""
        self.prequential.land()
        if self.held is not None:
            head, values = self.held["head"], self.held["values"]
            self.held = None
            self.record("commit", head["tokens"], head["seconds"], {**values, **self.prequential.values()})
            self.prequential.untested = None if head["extra"] else self.prequential.last.nats

    def _look_for_drift(self, tokens: int) -> None:
        """Tests the loss of the record before. All ranks know it, so they act on a drift at the same mark."""
        loss, self.prequential.untested = self.prequential.untested, None
        if loss is not None and self.prequential.drift.note(loss):
            seconds = self.clock.seconds()
            what = f"the stream has changed: the prequential loss is {loss:.4f}{self.prequential.drifted(tokens)}"
            self.show.say(what)
            self.record("event", tokens, seconds, {"what": what, "drift": self.prequential.drift.found})

    # ------------------------------------------------------------------ checkpoint
    def state(self) -> Json:
        """Plain values for the checkpoint. Collective if the run trains on a stream."""
        self.write_held()  # a record is written before the checkpoint after it, or it would be written twice
        return {
            "prequential": self.prequential.state(),
            "drift": self.prequential.drift.state(), "untested": self.prequential.untested,
            "window": asdict(self.window), "pending": self.pending, "last_record": self.last_record,
            "last_loss": self.last_loss, "bytes": self.bytes_before + self.world.bytes_sent,
            "straggler": asdict(self.straggler), "ranks": self.world.size, "blocked_s": self.blocked_s,
            "recorded_loss": self.recorded_loss,
        }  # fmt: skip

    def load(self, state: Json) -> None:
        """The inverse of `state`. Raises ValueError if the open record holds anything but numbers."""
        pending = state["pending"] or {}
        if not all(isinstance(each, int | float) for each in (*pending.values(), state.get("untested") or 0.0)):
            raise ValueError("what is due is not said in the form of this version")
        known = {each.name for each in fields(Window)}  # an older version's window had other fields
        self.window = Window(**{name: value for name, value in state["window"].items() if name in known})
        self.pending, self.last_record, self.last_loss = state["pending"], state["last_record"], state["last_loss"]
        self.bytes_before = state["bytes"] - self.world.bytes_sent
        if state.get("ranks") == self.world.size:  # otherwise ranks are numbered differently now
            self.straggler = Straggler(**state["straggler"])
        self.prequential.load(state.get("prequential", {}))
        self.prequential.drift, self.prequential.untested = Drift.of(state.get("drift", {})), state.get("untested")
        # The state of an older version has neither of these.
        self.blocked_s, self.recorded_loss = state.get("blocked_s", 0.0), state.get("recorded_loss")

    def go_on(self) -> None:
        """Takes back an open record that is off the cadence. The window goes on as if the run had never ended."""
        if self.pending and self.pending["extra"]:
            self.pending = None
