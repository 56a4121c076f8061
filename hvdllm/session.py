"""The exchanges as a library: trains a model of your own, on data of your own, in a script of your own.

    session = hvdllm.Session(model, loss=loss, data=data, exchange="acco", wire="int8", batch=64, budget=100_000)
    for commit in session:
        print(commit.step, commit.tokens)

Started alone it trains as one rank; under horovodrun, mpirun, srun or torchrun as one of several. Records, checkpoints,
resume and `hvdllm report` are those of `hvdllm train`. The names and arguments of this module follow semantic
versioning: what works with one minor version works with the next.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import default_collate

from hvdllm import registry
from hvdllm.checkpoint import read
from hvdllm.cli.display import make_show
from hvdllm.cli.main import ended
from hvdllm.cli.train import open_world, set_threads
from hvdllm.config import compose
from hvdllm.config.check import check
from hvdllm.config.words import of
from hvdllm.errors import UserError
from hvdllm.exchange.base import Commit
from hvdllm.flat import Flat
from hvdllm.plain import Tree
from hvdllm.task.own import Data, Held, Loss, OwnItems, OwnKind, OwnTask
from hvdllm.trainer import buffers, heartbeat, life
from hvdllm.trainer.resume import asked, folder_of
from hvdllm.world import signals
from hvdllm.world.base import World, from_first
from hvdllm.world.detect import place

__all__ = ["Session"]


class Session:
    """One run of a model of your own. Iterating over it trains, and yields a commit for each update.

    Every rank must make the session with the same arguments. The model's weights become those of rank 0.

    Args:
        model: any torch module. Its parameters are trained in place.
        loss: maps (model, batch) to the SUM of the losses of the batch's units, a scalar. A batch is what `collate`
          makes of some items, on the model's device.
        data: the items to train on: anything with `len()` and items by number. Items must not depend on the order in
          which they are asked for.
        validation: such items to evaluate on, or None.
        metrics: by name, what maps (model, batch) to a sum over the batch's units, such as how many are right;
          evaluations divide it by the units.
        count: how many units an item counts, if not 1: the loss of a batch is a sum over so many. Gradients are divided
          by the units of all ranks, so ranks with fewer of them weigh less.
        units: the mean of `count` over all items.
        unit: what is counted, in the plural, for the screen.
        collate: makes one batch of a list of items; by default torch's default_collate.
        exchange, wire, optim: names of parts, as on the command line.
        batch: units of an update, over all ranks.
        budget: units to train on.
        settings: words as `hvdllm train` takes them, such as `optim.lr=1e-3`, `name=mine` or `save_every=10000`.
        identity: names the data. A run is resumed only with data of the same name and length.

    Attributes:
        model: the model, which has the trained weights when the iteration is over.
        config: all settings.
        world: the ranks, of which this process is number world.rank among world.size.
        stopped: whether `stop` or a signal has ended the run, so that the same script goes on with it.

    Raises UserError if the settings cannot work.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        loss: Loss,
        data: Data,
        validation: Data | None = None,
        metrics: Mapping[str, Loss] | None = None,
        count: Callable[[Tree], int] | None = None,
        units: float = 1.0,
        unit: str = "items",
        collate: Callable[[list[Tree]], Tree] = default_collate,
        exchange: str = "allreduce",
        wire: str = "fp32",
        optim: str = "adamw",
        batch: int = 64,
        budget: int = 100_000,
        settings: Sequence[str] = (),
        identity: str = "",
    ) -> None:
        self.model, self.place, self.stopped = model, place(), False
        held: Data = validation if validation is not None else []
        given = {
            "exchange": exchange, "wire": wire, "optim": optim, "batch_tokens": batch, "budget_tokens": budget,
            "task.size": len(data), "task.each": float(units),
        }  # fmt: skip
        words = ["task=own", "model=own", "sample_every=0", *["eval_every=0"] * (validation is None)]
        words += [*(of(key, str(value)) for key, value in given.items()), *settings]
        with self._all_end():
            if not any(p.requires_grad for p in model.parameters()):
                raise UserError("Session: the model has no parameters that require a gradient")
            registry.load(compose.plugins(settings))
            self.config, self.words = asked(words, lambda text: None)
            check(self.config, self.place)
            if self.config.world.kind == "virtual":
                raise UserError("Session trains as one rank: start several with torchrun or horovodrun")
            set_threads(self.config, self.place)
            self.world: World = open_world(self.config, self.place)
        signals.listen(self.world.asks, alone=self.world.size == 1)
        if self.place.launcher != "none":
            signals.watch_launcher(self.world.asks)
        task = OwnTask(self.config, model, loss, unit, metrics or {})
        self._kind = OwnKind(task, OwnItems(data, count, units, collate), Held(held, count, units, collate), identity)

    def __iter__(self) -> Iterator[Commit]:
        """Trains until the budget is met, or until `stop` or a signal ends it. Collective.

        A run with the same name goes on from its last checkpoint, as under `hvdllm train`. Whoever leaves the loop
        early ends the run without another checkpoint; `stop` makes one.

        Raises RunError if training fails. As one of several ranks the process says why and ends at once instead,
        because the others would wait for a rank that lingers.
        """
        launcher = list(signals.up_to_launcher()) if self.place.launcher in ("horovodrun", "mpirun") else []
        with self._all_end():
            self._share_weights()
            with make_show(self.world.rank, self.place.launcher == "none", launcher) as show:
                commits = life.commits(self.config, self.words, self.place, self.world, show, self._kind)
                with contextlib.closing(commits):
                    first = next(commits, None)
                    if first is not None:
                        yield first
                        self.stopped = (yield from commits) is not None
            if first is None:  # an earlier life of the run has met its budget
                self._take_weights()
            self.world.close()
            heartbeat.leave()

    @contextlib.contextmanager
    def _all_end(self) -> Iterator[None]:
        """A context in which an error ends this process at once if it is one of several ranks."""
        try:
            yield
        except (Exception, KeyboardInterrupt) as error:
            if self.place.size > 1:
                ended(error)
            raise

    def stop(self) -> None:
        """Ends the run at the next update, with a checkpoint. It is enough if one rank calls it."""
        self.world.asks.stop = True

    def _take_weights(self) -> None:
        """Loads the weights of a run that had met its budget, from its newest checkpoint or final/. Collective."""
        folder = folder_of(self.config)
        path = Path(from_first(self.world, lambda: str(read.newest(folder, print) or folder / "final"), "session.path"))
        flat = Flat(self.model, self.world.size, math.inf)
        flat.x.copy_(read.share_vector(path, "model" if path.name != "final" else "", flat, self.world))
        buffers.load(self.model, read.share_tensors(path, self.world), str(path))

    @torch.no_grad()
    def _share_weights(self) -> None:
        """Gives all ranks the weights and buffers of rank 0. Collective."""
        tensors = [*self.model.parameters(), *self.model.buffers()]
        for index, tensor in enumerate(tensors if self.world.size > 1 else []):
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            tensor.copy_(self.world.broadcast(flat, f"session.{index}").land().view(tensor.shape))
