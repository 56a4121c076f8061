"""The whole training loop. Every exchange runs in it unchanged; exchange/base.py explains the words."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from hvdllm.exchange.base import Commit, Exchange, Stream
from hvdllm.trainer.acts import Acts
from hvdllm.trainer.backward import backward


def train(stream: Stream, model: nn.Module, exchange: Exchange, due: Acts, budget: int) -> Iterator[Commit]:
    """Trains until all ranks together have committed `budget` units, or a rank asks for a stop. Yields the commits."""
    for batch in exchange.feed(stream):  # arms the hooks BEFORE the forward; batch.last closes this rank's share
        loss = backward(model, batch)  # SUM of the losses; gradients add up in place
        due.saw(batch, loss)  # of a stream: tested before it is learnt
        commit = exchange.advance(batch, loss)  # launch, land, apply; a Commit only at a mark, else None
        if commit is None:
            continue
        due.act(commit)  # log, evaluate, sample, save: the same list on every rank, in order
        yield commit  # to whoever iterates over the run (hvdllm.Session)
        if commit.tokens >= budget or commit.asks.stop:
            break
    due.finish(exchange.settle())  # nothing travels any more
