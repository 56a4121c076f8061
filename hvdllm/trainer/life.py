"""The life of a run, from opening its folder to writing its last record. Every rank calls `run`."""

from __future__ import annotations

import os
from collections.abc import Generator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import cast

from hvdllm import pulse, registry
from hvdllm.checkpoint import read
from hvdllm.config.check import parse_steps
from hvdllm.errors import RunError, UserError
from hvdllm.exchange.base import Commit, NotFinite, State
from hvdllm.online.opened import read_into
from hvdllm.online.stream import LogStream
from hvdllm.settings import Config
from hvdllm.task.base import Kind
from hvdllm.track import mirror
from hvdllm.track.mirror import Mirror
from hvdllm.trainer import buffers, frozen, heartbeat
from hvdllm.trainer.acts import Acts
from hvdllm.trainer.agree import agreed_start, clients_without_text
from hvdllm.trainer.backward import explain
from hvdllm.trainer.loop import train
from hvdllm.trainer.run import Run, Saved, make
from hvdllm.trainer.show import Show
from hvdllm.trainer.slow import paced
from hvdllm.trainer.trace import Trace
from hvdllm.trainer.words import end_record, header, run_record
from hvdllm.world.base import World, from_first, peers
from hvdllm.world.detect import Place


def run(config: Config, overrides: list[str], place: Place, world: World, show: Show) -> int | None:
    """Starts or resumes a run and trains until it ends. Collective. See `commits`."""
    kind: Kind = registry.built(registry.of("task", config.task))
    life = commits(config, overrides, place, world, show, kind)
    while True:
        try:
            next(life)
        except StopIteration as end:
            return cast(int | None, end.value)


def commits(
    config: Config, overrides: list[str], place: Place, world: World, show: Show, kind: Kind
) -> Generator[Commit, None, int | None]:
    """Starts or resumes a run and trains until it ends. Yields its commits, once what is due there is done. Collective.

    Args:
        config: the checked settings.
        overrides: the words of the command line, for the `run` record.
        place: which launcher started this process.
        world: the ranks.
        show: what the user sees.
        kind: the functions of the task.

    Returns the number of tokens at which the run was stopped, or None if its budget is met.

    Raises UserError before training, and RunError during training.
    """
    with ExitStack() as held:
        start, lock = agreed_start(config, world, show, held)
        if start.finished:
            show.say(f"{start.finished}; a larger budget_tokens goes on")
            return None
        held.enter_context(heartbeat.beating(config, world, Path(start.folder), show.say))
        made = make(config, world, show, start, lock, kind)
        # If an ask makes a mark at once, no step can be too long for the grace period.
        acts = Acts(made, None if made.parts.exchange.marks_on_ask else grace(place))
        begin_records(made, acts, overrides)
        return (yield from live(made, acts))


def begin_records(run: Run, acts: Acts, overrides: list[str]) -> None:
    """Loads the checkpoint if there is one, opens the folder, writes the first records and tells the user of them.

    Collective. Raises UserError if the checkpoint does not fit, and RunError if the disk refuses.
    """
    config, start, resumed, folder = run.config, run.start, run.origin.resumed, run.folder
    notes = [*run.data.notes, *clients_without_text(config, run.stream)]
    if resumed is not None:
        checkpoint = Path(str(start.checkpoint))
        with read.fitting(checkpoint):
            notes += load(checkpoint, run, resumed)
            acts.load(resumed["due"])
        pulse.stepped(acts.step)
    if folder is not None:
        folder.check()
        folder.create(config, run.data.task.files | frozen.keep(folder.path, run.model))
        events = folder.truncate(*written_until(resumed)) if start.again else []
        run.data.task.keep(folder.path)
        folder.record("run", run_record(run, overrides), sync=True)
        if start.again:
            how = f"resumed from {start.checkpoint}" if resumed else "started again: no checkpoint was written before"
            events.append(how)
        for what in events:
            run.ledger.record("event", acts.tokens, run.clock.earlier, {"what": what})
    run.show.header(header(run))
    for note in notes:
        run.show.say(note)


def written_until(resumed: Saved | None) -> tuple[int | None, bool]:
    """The tokens of a checkpoint, and whether a commit record was pending there."""
    if resumed is None:
        return None, False
    return resumed["shared"]["tokens"], resumed["due"]["pending"] is not None


def live(run: Run, acts: Acts) -> Generator[Commit, None, int | None]:
    """Trains from the first round to the last record. Yields and returns what `commits` does."""
    config, world, show, exchange = run.config, run.world, run.show, run.parts.exchange
    tracker = start_tracker(config, Path(run.start.folder), world, show)
    trace = Trace(parse_steps(config.trace_steps) if config.trace_steps else None, world, run.device)
    exchange.watch = trace.note if config.trace_steps else None
    if isinstance(run.stream, LogStream):
        run.stream.waiting.paused = acts.paused
    module = paced(config, run.parts.module, run.loss, run.hosts, run.device, world)
    reason = "failed"
    run.clock.start()
    try:
        with closing(run.stream), peers(world):
            if isinstance(run.stream, LogStream):
                read_into(run.stream, config, Path(run.start.folder), world, show.say)
            if acts.finished:  # an earlier life met the budget, and was killed after its last checkpoint
                acts.finish(exchange.settle())
            else:
                yield from train(run.stream, module, exchange, acts, config.budget_tokens)
        pulse.enter("shutdown")
        reason = "budget" if acts.finished else "stop"
        noted, path = trace.write(Path(run.start.folder) / "trace.json"), f"{run.start.folder}/trace.json"
        if config.trace_steps:
            show.say(f"trace in {path}" if noted else f"no trace: steps {config.trace_steps} were not trained here")
    except GeneratorExit:  # whoever takes the commits wants no more of them
        reason = "stop"
        raise
    except NotFinite as error:
        exchange.disarm()
        raise explain(error, run.stream, run.loss, run.parts.flat, world) from None
    finally:
        if run.folder is not None:
            end = end_record(run, acts, reason)
            try:
                run.folder.record("end", end, sync=True)
            except RunError:
                if reason != "failed":
                    raise
            finally:
                run.folder.close()
                if tracker is not None:
                    tracker.close(patient=reason == "budget")
    if run.folder is not None:
        show.finish(end, run.start.folder, acts.last_sample)
    return None if acts.finished else acts.tokens


def load(checkpoint: Path, run: Run, resumed: Saved) -> list[str]:
    """Loads a checkpoint into the exchange and the stream. Collective.

    Args:
        checkpoint: its folder.
        run: the run, which has not trained yet.
        resumed: the plain values of the checkpoint.

    Returns sentences for the user about what a change of the world size means.
    """
    flat, world, exchange = run.parts.flat, run.world, run.parts.exchange
    vectors = {kind: read.share_vector(checkpoint, kind, flat, world) for kind in resumed["kinds"]}
    ranks = read.saved_ranks(resumed)
    summed = read.load_summed(checkpoint, flat, world, ranks)
    tensors = buffers.load(run.model, read.share_tensors(checkpoint, world), str(checkpoint))
    local = read.load_local(checkpoint, flat, world, ranks)
    exchange.load(State(resumed["shared"], [], vectors, {}, summed, tensors, local), resumed["mine"])
    run.stream.load(resumed["stream"], [mine.get("lanes", {}) for mine in resumed["mine"]])
    notes = []
    if summed and ranks != world.size:
        notes.append(
            f"the wire's residuals of {ranks} ranks were added up on rank 0, the other ranks begin with none: "
            "nothing is lost, but the curve is not that of an unchanged world"
        )
    if exchange.resized and ranks != world.size:
        notes.append(f"{ranks} ranks saved it, {world.size} go on: {exchange.resized}")
    return notes


def grace(place: Place) -> float | None:
    """Seconds that the launcher leaves a rank between Ctrl-C and SIGKILL, or None if there is no limit."""
    if place.launcher == "none":
        return None
    lengthened = float(os.environ.get("OMPI_MCA_odls_base_sigkill_timeout", 1))  # noqa: SIM112 - MPI's spelling
    return {"horovodrun": 5.0, "mpirun": lengthened, "srun": 30.0, "torchrun": 30.0}[place.launcher]


def start_tracker(config: Config, folder: Path, world: World, show: Show) -> Mirror | None:
    """Starts the tracker on rank 0 if the settings name one. Collective for a tracker that must be online.

    Raises UserError on every rank if such a tracker cannot be reached.
    """
    tracker = mirror.start(config, folder, show.say) if world.rank == 0 else None

    def refuse() -> None:
        if tracker is not None and (problem := tracker.refusal(config.track.start_s + mirror.SLACK_S)):
            tracker.close(patient=False)
            raise UserError(problem)

    if getattr(config.track, "mode", "") == "online":
        from_first(world, refuse, "start.track")
    return tracker
