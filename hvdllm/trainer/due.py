"""The acts of a run: log, audit, evaluate, sample, save. Which are due is a function of committed tokens and asks
alone, so every rank does the same ones in the same order. Acts change no weight.

Where the weights to keep are those of a mark only once settled (an anchor), the last evaluation comes then.

A milestone is crossed where `tokens // every` changes, so the cadence needs no state and may change on resume.
The mark that meets the budget evaluates, samples and saves; a stop only saves.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from statistics import fmean
from typing import Any, Protocol

from hvdllm.checkpoint import write
from hvdllm.checkpoint.read import alike
from hvdllm.config.schema import Config
from hvdllm.device import wait_for_stream
from hvdllm.errors import RunError
from hvdllm.exchange.base import Commit, Exchange, Report, Settled, Update
from hvdllm.flat import Flat
from hvdllm.runs import Folder
from hvdllm.trainer.audit import audit, spread
from hvdllm.trainer.clock import Clock
from hvdllm.trainer.evaluate import Evaluation
from hvdllm.trainer.straggler import Straggler, waited_for
from hvdllm.world.base import World


class Show(Protocol):
    """What a person sees (cli/display.py); silent on all ranks but 0."""

    def progress(self, values: dict[str, Any]) -> None:
        """Called at every commit: tokens, budget, seconds; loss of the newest `commit` record (before there is one, of
        what it will hold); blocked (a share) of the commit before."""

    def say(self, text: str) -> None:
        """One line that stays."""

    def header(self, lines: dict[str, str]) -> None:
        """What is trained, how and where; before the first round."""

    def finish(self, end: dict[str, Any], run: str, sample: str) -> None:
        """The summary: the `end` record, where the files are, the last sample."""


@dataclass
class Window:
    """Sums since the last `commit` record; part of the checkpoint."""

    loss_sum: float = 0.0
    loss_tokens: float = 0.0
    compute_s: float = 0.0
    blocked_s: float = 0.0
    blocked_s_max: float = 0.0
    flight_s: float = 0.0
    cpu_s: float = 0.0  # of all ranks
    skew_s: float = 0.0  # compute of the slowest rank less that of the fastest
    micro_batches: list[float] = field(default_factory=list)  # of each rank, as are the next two
    compute_s_by_rank: list[float] = field(default_factory=list)
    blocked_s_by_rank: list[float] = field(default_factory=list)
    updates: int = 0
    stale: float = 0.0  # staleness, summed over updates
    stalest: float = 0.0

    @property
    def loss(self) -> float:
        """Nats a token; not a number where nothing is booked yet."""
        return self.loss_sum / self.loss_tokens if self.loss_tokens else float("nan")

    def add(self, report: Report) -> None:
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
    """Rank by rank; the first ones, or of another world size than before, count alone."""
    return [a + b for a, b in zip(sums, values, strict=True)] if len(sums) == len(values) else list(values)


class Due:
    """budget: tokens. evaluate, sample: called within consensus() and weights(), on every rank.

    folder and show write and say; on ranks other than 0 folder is None and show says nothing.
    """

    def __init__(
        self,
        config: Config,
        *,
        world: World,
        flat: Flat,
        exchange: Exchange,
        update: Update,
        stream: Any,
        clock: Clock,
        evaluate: Callable[[], Evaluation],
        sample: Callable[[int], str],
        extra: dict[str, Any],
        folder: Folder | None,
        show: Show,
        grace_s: float | None,
    ) -> None:
        self.config, self.world, self.flat, self.exchange, self.update = config, world, flat, exchange, update
        self.stream, self.clock, self._evaluate, self._sample = stream, clock, evaluate, sample
        self.extra, self.folder, self.show, self.grace_s = extra, folder, show, grace_s
        self.tokens = self.step = self._tokens_loaded = 0
        self.window = Window()
        self.straggler = Straggler()
        self.pending: dict[str, Any] | None = None  # a `commit` record that waits for its loss
        self.last_record = {"tokens": 0.0, "seconds": 0.0, "bytes": 0.0}
        self.bytes_before = 0.0  # sent in earlier lives of this run
        self.blocked_s = 0.0  # of all commits that are booked, mean over ranks; earlier lives included
        self.last_loss, self.last_blocked, self.last_sample = float("nan"), 0.0, ""
        self.recorded_loss: float | None = None  # of the last `commit` record
        self.last_eval: Evaluation | None = None
        self.settled_tokens = 0  # committed by settling, behind the last mark
        self.dropped_tokens = 0  # of gradients that have no place any more
        self.finished = False
        self._save_s = 0.0
        self._first_steps: list[float] = []

    @property
    def tokens_here(self) -> int:
        """Committed by this process, earlier lives of the run left out."""
        return self.tokens - self._tokens_loaded

    # ------------------------------------------------------------------ the loop's two calls
    def act(self, commit: Commit) -> None:
        config, before = self.config, self.tokens
        self.tokens, self.step = commit.tokens, commit.step
        self._close_record(commit.before)
        met = commit.tokens >= config.budget_tokens
        stop = commit.asks.stop and not met

        def crossed(every: int) -> bool:
            return bool(every) and commit.tokens // every != before // every

        def due(every: int) -> bool:
            return not stop and (crossed(every) or (met and bool(every)))

        self.window.updates += commit.updates
        self.window.stale += commit.staleness * commit.updates
        self.window.stalest = max(self.window.stalest, commit.staleness_max or commit.staleness)
        if config.log_every and (met or stop or crossed(config.log_every)):
            self._open_record(commit, extra=not crossed(config.log_every))
        self._progress()
        settle_first = met and self.exchange.anchored
        evaluate, sample = (due(every) and not settle_first for every in (config.eval_every, config.sample_every))
        audit, save = due(config.audit_every), due(config.save_every) or commit.asks.save or stop
        if evaluate or sample or save or audit:
            seconds = self.clock.seconds()
            with self.clock.act():
                wait_for_stream(self.flat.x.device)  # acts read from the GPU at once, and such a read hears no peer
                if audit:  # first: nothing is said or kept of replicas that have come apart
                    self.audit(seconds)
                if evaluate:
                    self.evaluate(seconds)
                if sample:
                    self.sample(seconds)
                if save:
                    self.save(seconds)
        self.finished = met

    def finish(self, settled: Settled) -> None:
        """After settle: the last commit's record is complete; the weights to keep are written."""
        self._close_record(settled.report)
        self.settled_tokens, self.dropped_tokens = settled.tokens, settled.dropped
        if self.finished and self.exchange.anchored and (self.config.eval_every or self.config.sample_every):
            seconds = self.clock.seconds()
            with self.clock.act():
                if self.config.eval_every:
                    self.evaluate(seconds)
                if self.config.sample_every:
                    self.sample(seconds)
        if self.finished and self.config.save_every:
            with self.exchange.consensus(), self.update.weights():
                if self.folder is not None:
                    write.write_final(self.folder.path, self.flat, self.flat.x)

    # ------------------------------------------------------------------ acts
    def evaluate(self, seconds: float) -> None:
        with self.exchange.consensus() as of, self.update.weights():
            result = self._evaluate()
        self.last_eval = result
        tokens = self.tokens + self.settled_tokens
        older = of is not None and of != tokens
        values = {"loss": result.loss, "bits_per_byte": result.bits_per_byte, "wall_s": self.clock.wall_s()}
        self.record("eval", tokens, seconds, {**values, "weights_tokens": of} if older else values)
        self.show.say(
            f"{tokens:,} tokens: validation loss {result.loss:.4f}, {result.bits_per_byte:.3f} bits per byte"
            + (f" (weights of {of:,} tokens)" if older else "")
        )

    def audit(self, seconds: float) -> None:
        """Where the exchange promises identical replicas a difference is an error; else it is logged how far they are
        apart. Of the replicas as they are: within consensus() they would be the same by construction."""
        if self.world.size == 1:
            return
        if not self.exchange.identical:
            apart = spread(self.flat, self.world)
            self.record("audit", self.tokens, seconds, {"spread": apart})
            return
        found = audit(self.flat, self.world)
        self.record("audit", self.tokens, seconds, {"replicas_agree": found is None})
        if found is not None:
            raise RunError(
                f"step {self.step}: the replicas differ in {found}, although this exchange keeps replicas "
                "identical: look at the memory and network of its host, then resume from the last checkpoint",
                everywhere=True,
            )

    def sample(self, seconds: float) -> None:
        with self.exchange.consensus(), self.update.weights():
            text = self._sample(self.tokens)
        self.last_sample = text
        if self.folder is not None:
            self.folder.append("samples.txt", f"--- {self.tokens} tokens\n{text}\n\n")
        self.record("sample", self.tokens, seconds, {"text": text})

    def save(self, seconds: float) -> None:
        if self.folder is not None:
            self.folder.check()  # else the folder would be made anew, with a checkpoint and nothing else
        begin, state = self.clock.wall_s(), self.exchange.state()
        values = {"seconds": seconds, "stream": self.stream.state(), "due": self.state(), **self.extra}
        values["kinds"] = list(state.sharded)
        path = write.write(
            self.folder.path if self.folder is not None else Path(), self.flat, state, values,
            self.world, self.config.keep, mine={"lanes": self.stream.lanes()},
        )  # fmt: skip
        self._save_s = self.clock.wall_s() - begin
        if path is not None:
            self.record("save", self.tokens, seconds, {"step": self.step, "path": str(path)}, sync=True)

    # ------------------------------------------------------------------ records
    def record(self, kind: str, tokens: int, seconds: float, values: dict[str, Any], sync: bool = False) -> None:
        """With what every record has: how far the run is, in any unit that a curve may be drawn over."""
        if self.folder is not None:
            self.folder.record(kind, {"tokens": tokens, **self.totals(seconds), **values}, sync=sync)

    def totals(self, seconds: float) -> dict[str, float]:
        """Sums over all lives of the run: seconds of the training clock; bytes that rank 0 sent; seconds that ranks
        stood still for the exchange, of the commits that are booked, mean over ranks."""
        sent = round(self.bytes_before + self.world.bytes_sent)  # threads add up in any order
        return {"seconds": seconds, "bytes_total": sent, "blocked_s_total": self.blocked_s}

    def _open_record(self, commit: Commit, extra: bool) -> None:
        """extra: off the cadence, because the run ends here; a run that goes on takes it back."""
        seconds = self.clock.seconds()
        self.pending = {"step": commit.step, "tokens": commit.tokens, "seconds": seconds, "lr": commit.lr}
        self.pending |= {"bytes": self.totals(seconds)["bytes_total"], "extra": extra}

    def _close_record(self, report: Report | None) -> None:
        """Books what is now known of the commit before, and writes its record if it has one."""
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
        values = {
            "step": head["step"],
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
        self.record("commit", head["tokens"], head["seconds"], values)
        if said := self.straggler.note(window.compute_s_by_rank, window.blocked_s_by_rank):
            self.show.say(said)
            self.record("event", head["tokens"], head["seconds"], {"what": said, "straggler": self.straggler.named})
        self.last_record = {key: head[key] for key in ("tokens", "seconds", "bytes")}
        self.window, self.pending = Window(), None

    def _progress(self) -> None:
        seconds = self.clock.seconds()
        loss = self.last_loss
        if self.config.log_every:
            loss = self.window.loss if self.recorded_loss is None else self.recorded_loss
        values = {"tokens": self.tokens, "budget": self.config.budget_tokens, "seconds": seconds, "loss": loss}
        self.show.progress({**values, "blocked": self.last_blocked})
        if self.grace_s is not None and len(self._first_steps) < 4:
            self._first_steps.append(seconds)
            if len(self._first_steps) == 4:
                self._warn_of_grace((self._first_steps[3] - self._first_steps[0]) / 3)

    def _warn_of_grace(self, step_s: float) -> None:
        assert self.grace_s is not None
        if 2 * step_s + self._save_s > self.grace_s:
            self.show.say(
                f"a step takes {step_s:.1f} s, so two of them and a save do not fit into the {self.grace_s:.0f} s "
                "that the launcher leaves after Ctrl-C: a run that is stopped goes on from its last checkpoint"
            )

    # ------------------------------------------------------------------ checkpoint
    def state(self) -> dict[str, Any]:
        last_eval = asdict(self.last_eval) if self.last_eval else None
        return {
            "tokens": self.tokens, "step": self.step, "window": asdict(self.window), "pending": self.pending,
            "last_record": self.last_record, "last_loss": self.last_loss, "last_eval": last_eval,
            "bytes": self.bytes_before + self.world.bytes_sent, "straggler": asdict(self.straggler),
            "ranks": self.world.size, "blocked_s": self.blocked_s, "recorded_loss": self.recorded_loss,
        }  # fmt: skip

    def load(self, state: dict[str, Any]) -> None:
        """Raises ValueError where it is none of state()."""
        pending = state["pending"] or {}
        if not alike(self.state(), state) or not all(isinstance(each, int | float) for each in pending.values()):
            raise ValueError("what is due is not said in the form of this version")
        self.tokens, self.step, self.pending = state["tokens"], state["step"], state["pending"]
        known = {each.name for each in fields(Window)}  # an older version's window had others
        self.window = Window(**{name: value for name, value in state["window"].items() if name in known})
        self.last_record = state["last_record"]
        self.last_loss, self.bytes_before = state["last_loss"], state["bytes"] - self.world.bytes_sent
        if state.get("ranks") == self.world.size:  # else they have other numbers now
            self.straggler = Straggler(**state["straggler"])
        # An older version's state has neither.
        self.blocked_s, self.recorded_loss = state.get("blocked_s", 0.0), state.get("recorded_loss")
        self._tokens_loaded = self.tokens
        self.finished = self.tokens >= self.config.budget_tokens
        if self.pending and self.pending["extra"] and not self.finished:
            self.pending = None  # its line was cut: the window goes on as if the run had never ended
        self.last_eval = Evaluation(**state["last_eval"]) if state["last_eval"] else None
