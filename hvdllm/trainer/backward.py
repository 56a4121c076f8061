"""The forward and backward pass of one micro-batch, and the search for a gradient that was not finite."""

from __future__ import annotations

import json
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from torch import nn

from hvdllm import pulse
from hvdllm.errors import RunError
from hvdllm.exchange.base import Batch, NotFinite, Stream
from hvdllm.flat import Flat
from hvdllm.plain import Json, Tree
from hvdllm.task.base import Task
from hvdllm.world.base import World

NOTHING = torch.zeros((), dtype=torch.float64)


def autocast(precision: str, device: torch.device) -> AbstractContextManager[object]:
    """The autocast context of a precision. With bf16, matrix products run in bfloat16; weights and sums stay fp32."""
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()


class Loss(nn.Module):
    """A module that maps inputs and targets to the SUM of the losses of their units, in nats.

    Dropout is seeded for each micro-batch from (seed, round, rank, micro-batch), so that a resumed run draws the same
    masks.

    Args:
        task: defines the loss.
        model: what is trained.
        precision: fp32, bf16 or fp64, see `autocast`.
        device: where the model lies.
        seed: of the run.
        rank: this rank.
        dropout: whether the model has any dropout.
    """

    def __init__(
        self, task: Task, model: nn.Module, *, precision: str, device: torch.device, seed: int, rank: int, dropout: bool
    ) -> None:  # fmt: skip
        super().__init__()
        self.task, self.model, self.precision, self.device = task, model, precision, device
        self.seed, self.rank, self.dropout = seed, rank, dropout
        self.computed = False  # whether this rank has computed anything

    def forward(self, inputs: Tree, targets: Tree, place: tuple[int, int]) -> torch.Tensor:
        """The summed loss. place: the round, and the number of this micro-batch in it, which seed the dropout."""
        self.computed = True
        if self.dropout:
            round_, index = place
            torch.manual_seed(int(np.random.SeedSequence([self.seed, round_, self.rank, index]).generate_state(1)[0]))
        with autocast(self.precision, self.device):
            return self.task.loss(self.model, inputs, targets)


def backward(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Adds the gradient of the SUM of the losses of the batch in place.

    The backward pass starts from 1 + 0 x loss. A loss that is not finite therefore makes its gradients not finite, and
    so the sum over ranks, which every rank sees. The number is a factor of the loss, not an argument of `backward`,
    because torch would import its symbolic shapes to check the argument, which takes a second.

    Returns the summed loss, a detached scalar on the device; nothing is computed for an empty batch.
    """
    pulse.enter("forward")
    value = NOTHING
    if batch.tokens:
        loss = model(batch.inputs, batch.targets, (batch.round, batch.index))
        value = loss.detach()
        (loss * (1 + 0 * value)).backward()
    pulse.enter("exchange")
    return value


def explain(error: NotFinite, stream: Stream, model: nn.Module, flat: Flat, world: World) -> RunError:
    """Finds where a gradient that is not finite came from. Collective.

    Every rank computes the bad round again without exchange. That is possible since a batch is a function of its
    position, and the weights are still those before the round, unless the error says otherwise.

    Args:
        error: what the exchange raised.
        stream: deals the batches again, unless the error brings its own stream.
        model: the module that computes the loss.
        flat: the map; its gradients are overwritten.
        world: the ranks.

    Returns the error to raise, which is the same on every rank.
    """
    found: Json = {}
    source = error.stream or stream
    batches = [batch for number in error.rounds for batch in source.share(number, error.parts)]
    for batch in batches:
        flat.g.zero_()
        for name, p in flat.parameters.items():  # a library may have moved the gradient elsewhere
            p.grad = flat.view(name, flat.g)
        loss = backward(model, batch).item()
        if batch.tokens and (odd := _not_finite(flat)) is not None:
            found = {"tensor": odd, "loss": loss, "batch": batch.index + 1, "of": len(batches)}
            break
    says = [json.loads(text) for text in world.texts(json.dumps(found), "act.explain")]
    rank = next((rank for rank, said in enumerate(says) if said), None)
    if not error.again:
        sentence = (
            f"step {error.step}: the sum of gradients is not finite (norm {error.norm}); a timed round cannot be "
            "replayed to say where; nothing was updated: lower optim.lr, or run exchange.timed=false to see the tensor"
        )
    elif rank is None and error.left:
        sentence = (
            f"step {error.step}: the sum of gradients is not finite (norm {error.norm}); it was taken at weights that "
            "this exchange has left, and at today's its text gives finite ones; nothing was updated: lower optim.lr, "
            "or run exchange=allreduce to see the tensor"
        )
    elif rank is None:
        sentence = (
            f"step {error.step}: the sum of gradients is not finite (norm {error.norm}) although each rank's own is: "
            "it overflowed; nothing was updated: lower optim.lr, or take a wire of a larger range (bf16 for fp16)"
        )
    else:
        said = says[rank]
        sentence = (
            f"step {error.step}: the gradient of `{said['tensor']}` is not finite on rank {rank} (micro-batch "
            f"{said['batch']} of {said['of']}, loss {said['loss']:g}); nothing was updated: lower optim.lr, or look at "
            "the text of this batch"
        )
    return RunError(sentence, everywhere=True)


def _not_finite(flat: Flat) -> str | None:
    """The parameter or table whose gradient is not finite; None if all are.

    The gradient of the last registered tensor is complete first. (The order of flat.at is another one.)
    """
    gradients = {name: [flat.view(name, flat.g)] for name in flat.parameters}
    gradients |= {name: [values for _, values in table.gradients()] for name, table in flat.tables.items()}
    return next((n for n in reversed(gradients) if not all(bool(x.isfinite().all()) for x in gradients[n])), None)
