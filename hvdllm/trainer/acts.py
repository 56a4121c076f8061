"""The acts of a run: audit, evaluate, sample and save.

Which acts are due depends on committed tokens and asks alone, so every rank does the same ones in the same order. Acts
change no weights. A milestone is crossed when `tokens // every` changes, so a cadence needs no state and may change on
resume. The mark that meets the budget evaluates, samples and saves. A stop only saves.

With an anchored exchange (exchange/base.py) the weights to keep include all tokens only once it has settled. The last
evaluation and sample are then made after settling.
"""

from __future__ import annotations

from pathlib import Path

import torch

from hvdllm import pulse, registry
from hvdllm.checkpoint import write
from hvdllm.checkpoint.read import alike
from hvdllm.device import wait_for_stream
from hvdllm.errors import RunError
from hvdllm.exchange.base import Batch, Commit, Settled
from hvdllm.online.changes import Changes
from hvdllm.online.log import Log
from hvdllm.online.rounds import Rounds
from hvdllm.online.stream import LogStream
from hvdllm.plain import Json
from hvdllm.trainer import buffers
from hvdllm.trainer.audit import audit, spread
from hvdllm.trainer.evaluate import Evaluation, evaluate_run, told
from hvdllm.trainer.run import Run
from hvdllm.world.base import Asks


class Acts:
    """Does at each mark what is due, and counts what has been committed.

    Args:
        run: the run.
        grace_s: seconds that the launcher leaves a rank between Ctrl-C and SIGKILL, or None if there is no limit.
    """

    def __init__(self, run: Run, grace_s: float | None) -> None:
        self.run, self.grace_s = run, grace_s
        self.tokens = self.step = self._tokens_loaded = 0
        self.last_sample = ""
        self.last_eval: Evaluation | None = None
        self.settled = Settled(None)  # what settling has committed after the last mark, and what it has dropped
        self.finished = False
        self._save_s = 0.0
        run.ledger.prequential.drifted = self.drifted
        self._first_steps: list[float] = []
        self._changes: Changes | None = None  # on rank 0, made at the first mark, when a checkpoint is loaded

    @property
    def tokens_here(self) -> int:
        """Tokens that were committed since this process started, without earlier lives of the run."""
        return self.tokens - self._tokens_loaded

    # ------------------------------------------------------------------ the loop's two calls
    def act(self, commit: Commit) -> None:
        """Books a commit and does what is due at its mark. Collective."""
        config, ledger, before = self.run.config, self.run.ledger, self.tokens
        self.tokens, self.step = commit.tokens, commit.step
        pulse.stepped(commit.step)
        pulse.enter("acts")
        ledger.book(commit.before)
        met = commit.tokens >= config.budget_tokens
        stop = commit.asks.stop and not met

        def crossed(every: int) -> bool:
            return bool(every) and commit.tokens // every != before // every

        def due(every: int) -> bool:
            return not stop and (crossed(every) or (met and bool(every)))

        ledger.window.count(commit)
        ends = stop and commit.tokens > before  # else its record is open already
        if config.log_every and (met or ends or crossed(config.log_every)):
            ledger.open(commit, not crossed(config.log_every), self.run.stream.standing())
        self._tell_changes()
        self._progress()
        settle_first = met and self.run.parts.exchange.anchored
        evaluate, sample = (due(every) and not settle_first for every in (config.eval_every, config.sample_every))
        audit, save = due(config.audit_every), due(config.save_every) or commit.asks.save or stop
        publish = due(config.publish_every) and not settle_first
        if evaluate or sample or save or audit or publish:
            seconds = self.run.clock.seconds()
            with self.run.clock.act():
                # Acts read from the GPU, and such a read would not notice a lost peer.
                wait_for_stream(self.run.device)
                if evaluate or sample or save or publish:
                    buffers.average(self.run.model, self.run.world, self.run.loss.computed)
                if audit:  # first, so that nothing is reported or kept of replicas that differ
                    self.audit(seconds)
                if evaluate:
                    self.evaluate(seconds)
                    if self.last_eval is not None and crossed(config.eval_every):  # also of a run that goes on here
                        self.run.stream.evaluated(self.last_eval.metrics)
                if sample:
                    self.sample(seconds)
                if publish:
                    self.publish(seconds)
                if save:
                    self.save(seconds)
        self.finished = met

    def saw(self, batch: Batch, loss: torch.Tensor) -> None:
        """Counts the loss of text that a stream has brought for the first time, before it is learnt."""
        self.run.ledger.prequential.saw(batch.fresh, batch.tokens, loss)

    def paused(self, asks: Asks) -> None:
        """Saves, because a rank was asked to while all ranks wait for data. Collective."""
        seconds = self.run.clock.seconds()
        with self.run.clock.act():
            wait_for_stream(self.run.device)
            buffers.average(self.run.model, self.run.world, self.run.loss.computed)
            self.save(seconds)

    @pulse.during("save")
    def finish(self, settled: Settled) -> None:
        """Completes the record of the last commit after settling, and writes the weights to keep."""
        run, config = self.run, self.run.config
        run.ledger.book(settled.report)
        run.ledger.write_held()
        self.settled = settled
        if self.finished:
            buffers.average(run.model, run.world, run.loss.computed)
        late = self.finished and run.parts.exchange.anchored
        if late and (config.eval_every or config.sample_every or config.publish_every):
            seconds = run.clock.seconds()
            with run.clock.act():
                if config.eval_every:
                    self.evaluate(seconds)
                if config.sample_every:
                    self.sample(seconds)
                if config.publish_every:
                    self.publish(seconds)
        if self.finished and config.save_every:
            with run.parts.exchange.consensus(), run.parts.update.weights():
                if run.folder is not None:
                    beside = buffers.tensors(run.model, optimizer=False)
                    write.write_final(run.folder.path, run.parts.flat, run.parts.flat.x, beside)

    # ------------------------------------------------------------------ acts
    @pulse.during("evaluation")
    def evaluate(self, seconds: float) -> None:
        """Evaluates the weights to keep, and records and shows the result. Collective."""
        with self.run.parts.exchange.consensus() as of, self.run.parts.update.weights():
            result = evaluate_run(self.run.config, self.run.model, self.run.data, self.run.device, self.run.world)
        if result is None:
            return
        self.last_eval = result
        tokens = self.tokens + self.settled.tokens
        older = of is not None and of != tokens
        values = {**result.metrics, "wall_s": self.run.clock.wall_s()}
        task = self.run.data.task
        said = told(task, result)
        self.run.ledger.record("eval", tokens, seconds, {**values, "weights_tokens": of} if older else values)
        self.run.show.say(
            f"{tokens:,} {task.unit}: validation loss {result.loss:.4f}{', ' * bool(said)}{said}"
            + (f" (weights of {of:,} {task.unit})" if older else "")
        )

    @pulse.during("audit")
    def audit(self, seconds: float) -> None:
        """Compares the ranks' weights. It looks at the replicas as they are, since within consensus() they are equal.

        Raises RunError if the exchange promises identical replicas and they differ. If it does not promise that, the
        distance between the replicas is recorded.
        """
        world, flat, ledger = self.run.world, self.run.parts.flat, self.run.ledger
        if world.size == 1:
            return
        if not registry.of("exchange", self.run.config.exchange).facts.identical:
            ledger.record("audit", self.tokens, seconds, {"spread": spread(flat, world)})
            return
        found = audit(flat, world)
        ledger.record("audit", self.tokens, seconds, {"replicas_agree": found is None})
        if found is not None:
            raise RunError(
                f"step {self.step}: the replicas differ in {found}, although this exchange keeps replicas "
                "identical: look at the memory and network of its host, then resume from the last checkpoint",
                everywhere=True,
            )

    @pulse.during("sample")
    def sample(self, seconds: float) -> None:
        """Samples text from the weights to keep, on rank 0, and adds it to samples.txt. Collective."""
        run = self.run
        with run.parts.exchange.consensus(), run.parts.update.weights():
            text = run.data.task.sample(run.model, self.tokens) if run.world.rank == 0 else ""
        self.last_sample = text
        if run.folder is not None:
            run.folder.append("samples.txt", f"--- {self.tokens} tokens\n{text}\n\n")
        run.ledger.record("sample", self.tokens, seconds, {"text": text})

    @pulse.during("publish")
    def publish(self, seconds: float) -> None:
        """Writes the weights to keep for whoever serves them. Collective. Raises RunError if the disk refuses."""
        run, tokens = self.run, self.tokens + self.settled.tokens
        with run.parts.exchange.consensus() as of, run.parts.update.weights():
            if run.folder is not None:
                run.folder.check()
                beside = buffers.tensors(run.model, optimizer=False)
                path = write.publish(run.folder.path, tokens, run.parts.flat, run.parts.flat.x, beside)
                older = {"weights_tokens": of} if of is not None and of != tokens else {}
                run.ledger.record("publish", tokens, seconds, {"path": str(path), **older})

    def drifted(self, tokens: int) -> str:
        """Re-warms the learning rate where the stream has changed, if the schedule does so. Returns that in words."""
        config = self.run.config
        ahead = 2 * config.batch_tokens * config.exchange.batches_a_commit  # ACCO has estimated the next update already
        return "; the learning rate is re-warmed" if self.run.rate.rewarm(tokens + ahead) else ""

    def _tell_changes(self) -> None:
        """Records on rank 0 where training has come to the next of the texts that a stream plays."""
        run, stream = self.run, self.run.stream
        if run.folder is None or not isinstance(stream, LogStream):
            return
        if self._changes is None:
            log, layout = stream.items.log, stream.decider.layout
            rounds = Rounds(stream.decider.rounds.path.parent)
            self._changes = Changes(Log(log.folder, log.dtype), rounds, layout, layout.context, self._tokens_loaded)
        for text, tokens in self._changes.passed(self.tokens):
            what = f"text {text + 1} of the stream begins after {tokens:,} tokens"
            run.show.say(what)
            values = {"what": what, "change": text, "change_tokens": tokens}
            run.ledger.record("event", self.tokens, run.clock.seconds(), values)

    @pulse.during("save")
    def save(self, seconds: float) -> None:
        """Writes a checkpoint. Collective. Raises RunError if a disk refuses, or if the folder was removed."""
        run, folder = self.run, self.run.folder
        if folder is not None:
            folder.check()  # or a folder that was removed would be made anew, with nothing but a checkpoint
        begin, state = run.clock.wall_s(), run.parts.exchange.state()
        values = {
            "seconds": seconds, "stream": run.stream.state(), "due": self.state(), "horizon": run.origin.horizon,
            "data_hash": run.data.data_hash, "kinds": list(state.sharded),
        }  # fmt: skip
        state.tensors |= buffers.tensors(run.model)
        path = write.write(
            folder.path if folder is not None else Path(), run.parts.flat, state, values, run.world, run.config.keep,
            mine={"lanes": run.stream.lanes()},
        )  # fmt: skip
        self._save_s = run.clock.wall_s() - begin
        if path is not None:
            run.ledger.record("save", self.tokens, seconds, {"step": self.step, "path": str(path)}, sync=True)
        run.stream.saved()  # the checkpoint is whole, or no rank came here

    # ------------------------------------------------------------------ the screen
    def _progress(self) -> None:
        config, ledger, seconds = self.run.config, self.run.ledger, self.run.clock.seconds()
        loss = ledger.loss if config.log_every else ledger.last_loss
        values = {
            "tokens": self.tokens,
            "unit": self.run.data.task.unit,
            "budget": config.budget_tokens,
            "seconds": seconds,
            "loss": loss,
        }
        self.run.show.progress({**values, "blocked": ledger.last_blocked})
        if self.grace_s is not None and len(self._first_steps) < 4:
            self._first_steps.append(seconds)
            if len(self._first_steps) == 4:
                self._warn_of_grace((self._first_steps[3] - self._first_steps[0]) / 3)

    def _warn_of_grace(self, step_s: float) -> None:
        assert self.grace_s is not None
        if 2 * step_s + self._save_s > self.grace_s:
            self.run.show.say(
                f"a step takes {step_s:.1f} s, so two of them and a save do not fit into the {self.grace_s:.0f} s "
                "that the launcher leaves after Ctrl-C: a run that is stopped goes on from its last checkpoint"
            )

    # ------------------------------------------------------------------ checkpoint
    def state(self) -> Json:
        """Plain values for the checkpoint."""
        last_eval = self.last_eval.state() if self.last_eval else None
        ledger = self.run.ledger.state()
        return {
            "tokens": self.tokens,
            "step": self.step,
            "last_eval": last_eval,
            "rewarmed": self.run.rate.rewarmed,
            **ledger,
        }

    def load(self, state: Json) -> None:
        """The inverse of `state`. Raises ValueError if the values do not have the form that `state` gives them."""
        if not alike(self.state(), state):
            raise ValueError("what is due is not said in the form of this version")
        self.run.ledger.load(state)
        self.tokens, self.step = state["tokens"], state["step"]
        self.run.rate.rewarmed = [int(each) for each in state.get("rewarmed", [])]
        self._tokens_loaded = self.tokens
        self.finished = self.tokens >= self.run.config.budget_tokens
        if not self.finished:
            self.run.ledger.go_on()
        self.last_eval = Evaluation.of(state["last_eval"]) if state["last_eval"] else None
