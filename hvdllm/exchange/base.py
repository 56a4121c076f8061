"""The exchange protocol, and each of its words defined once.

round       what closes together on all ranks: for a synchronous exchange one global batch
mark        a point that all ranks share; the only place of a Commit
commit      one optimizer step with everybody's gradients; `tokens` committed is the same number everywhere
flight      one thing travelling: launched, landed (arrived), land (wait for it; applies nothing)
sum         over tokens and ranks, never a mean: the update divides once, by the tokens of all ranks
meta        the exact numbers of a round (tokens, loss, asks, seconds), one float64 vector of its own
pieces      a rank's slice of every bucket of the one map; where replicas are whole, everything
owns        an exchange that leaves gradients in the flat vector says so in `attach`

The loop sees nothing else of an exchange, so a new one adds a file here, a settings class and a line in
trainer/build.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import nn

from hvdllm.world.base import Asks, Flight, World


class Batch(Protocol):
    """A micro-batch, number `index` of this rank's share of `round`. inputs, targets: [B, T], or None where tokens
    is 0: an empty one, no graph is run. last: it closes the share."""

    inputs: torch.Tensor | None
    targets: torch.Tensor | None
    tokens: int
    last: bool
    round: int
    index: int


@dataclass
class Nothing:
    """An empty micro-batch, for a rank that has nothing to compute and still walks the loop."""

    inputs: torch.Tensor | None = None
    targets: torch.Tensor | None = None
    tokens: int = 0
    last: bool = True
    round: int = 0
    index: int = 0


class Rounded(Protocol):
    """What deals micro-batches in rounds."""

    def rounds(self, parts: int = 1) -> Iterator[list[Any]]:
        """This rank's share of each global batch, dealt by count in equal parts; one list a part."""

    def share(self, round: int, parts: int = 1) -> list[Any]:
        """That of one round; pure."""


class Stream(Rounded, Protocol):
    """Where micro-batches come from: a pure function of seed and position."""

    def lane(self, index: int, of: int, most: int) -> Iterator[Any]:
        """Micro-batches of `most` tokens without end, of walker `index` among `of`; the exchange sets `last`."""

    def group(self, index: int, of: int, rank: int, size: int) -> Rounded:
        """The stream of group `index` among `of`, which trains on its own: its lane, each round its share of a global
        batch, dealt to the group's ranks."""

    def clients(self, count: int, alpha: float | None) -> Federation:
        """The text dealt to so many clients, by whole documents; alpha: of Dirichlet's shares, None: equal ones."""


class Federation(Protocol):
    """Text of clients. tokens: of each client's; 0: it has none."""

    tokens: list[int]

    def sample(self, round: int, count: int | None) -> list[int]:
        """The clients of a round, the same on every rank: `count` of those that have text (None: all), in order."""

    def walk(self, plan: Iterator[tuple[int, int]], of: int, rank: int, size: int) -> Rounded:
        """Rounds of clients, by client and number of its step as `plan` says, each step a share of one in `of` of a
        global batch, dealt to the `size` ranks that train a client together."""


@dataclass(frozen=True)
class Report:
    """What is known of a commit only one commit later, when the meta that carries it has landed.

    loss_sum is in nats over loss_tokens tokens of all ranks; grad_norm is that of the mean gradient before clipping;
    noise_scale: of exchange/noise.py up to here, in tokens, or None; the rest is one number a rank, over the rounds of
    this commit: seconds that compute ran, that it stood still for the exchange, that something travelled, of CPU time
    of the whole process, and micro-batches.
    """

    loss_sum: float
    loss_tokens: float
    grad_norm: float
    noise_scale: float | None
    compute_s: list[float]
    blocked_s: list[float]
    flight_s: list[float]
    cpu_s: list[float]
    micro_batches: list[float]

    def elsewhere(self, size: int) -> Report:
        """For a world of another size: what each rank said has no place in it."""
        none = [0.0] * size
        return replace(self, compute_s=none, blocked_s=none, flight_s=none, cpu_s=none, micro_batches=none)


@dataclass(frozen=True)
class Commit:
    """tokens, step: committed by all ranks, this one included. lr: of this step. staleness: of its gradients, in steps,
    the mean of them; staleness_max: of the stalest, where they differ. updates: steps of the optimizer since the commit
    before; of ranks that train on their own one a mark, whatever each has made.

    before: the report of the commit before this one (None for the first). asks: of any rank, the same on all.
    """

    tokens: int
    step: int
    lr: float
    staleness: float
    before: Report | None
    asks: Asks
    staleness_max: float | None = None
    updates: int = 1


@dataclass(frozen=True)
class Settled:
    """What is known once nothing travels any more. report: of the last commit. tokens: committed by settling alone, on
    top of the last mark: they enter no comparison. dropped: computed, and never to be committed."""

    report: Report | None
    tokens: int = 0
    dropped: int = 0


@dataclass(frozen=True)
class Milestones:
    """Where a run wants marks, for an exchange whose marks are not the ends of rounds. acts: tokens between those at
    which everybody has something to do together; logs: between those at which nobody need wait; budget: tokens of the
    last mark, 0 for none."""

    acts: tuple[int, ...] = ()
    logs: tuple[int, ...] = ()
    budget: int = 0


# Spans of the map, and a vector over their elements, one after the other.
Spanned = tuple[list[Any], torch.Tensor]


@dataclass
class State:
    """What a checkpoint holds of an exchange, its update and its wire.

    shared: plain values, equal on all ranks. spans: the elements of the flat vector that this rank hands out
    (none where another rank holds the same); sharded: vectors by name over those elements. mine: plain values
    of this rank alone; local: its vectors, such as its own weights (Spanned when saved, vectors over the map when
    loaded; only at the same world size, else there are none). summed: of this rank alone too, but what counts is the
    sum over ranks (residuals). tensors: of any shape, equal on all ranks.

    On load all vectors lie on the CPU; `sharded` and `summed` cover the whole map; at the same world size `summed` is
    this rank's own, else rank 0 gets the sum over all ranks there were and the others zeros.
    """

    shared: dict[str, Any]
    spans: list[Any]
    sharded: dict[str, torch.Tensor]
    mine: dict[str, Any]
    summed: dict[str, Any] = field(default_factory=dict)  # Spanned when saved, a vector over the map when loaded
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    local: dict[str, Any] = field(default_factory=dict)


class Meta(Protocol):
    """What the update needs of a round: its tokens (all ranks), and those committed with it."""

    tokens: float
    committed: int


class Update(Protocol):
    """What a summed gradient does (optim/update.py). Vectors are lists of slices, one a piece."""

    def attach(self, flat: Any, pieces: list[Any]) -> None: ...

    def rate(self, committed: int) -> float: ...

    def step(
        self, pieces: list[torch.Tensor], grad: list[torch.Tensor], meta: Meta, total: Any, share: float = 1.0
    ) -> Any: ...

    def fresh(self) -> None: ...

    def peek(self, pieces: list[torch.Tensor], grad: list[torch.Tensor], meta: Meta, total: Any) -> Any: ...

    def weights(self) -> AbstractContextManager[None]: ...

    def state(self) -> tuple[dict[str, Any], dict[str, torch.Tensor]]: ...

    def load(self, shared: dict[str, Any], vectors: dict[str, torch.Tensor]) -> None: ...


class Wire(Protocol):
    """How a sum travels (exchange/wire/). key: fixed name of one stream of sums, `grad.<bucket>`; x: that bucket of a
    gradient vector. A wire is made as Kind(world, settings, flat, nominal), nominal: tokens of a global batch.

    rough: is what arrives in one round only a likeness of the sum, which is made up for later?
    """

    rough: bool

    def begin(self, committed: int, weight: float) -> None:
        """Before the launches of a round. committed: tokens, by all ranks, up to here. weight: what one unit of the
        decoded sum will move a weight by under plain descent, rate / nominal tokens; residuals are kept worth what they
        were (times the old weight, divided by the new)."""

    def sum(self, x: torch.Tensor, key: str) -> Flight:
        """In place: when landed, every rank's x is the decoded sum, bit-equal on all."""

    def scatter(self, x: torch.Tensor, key: str) -> Flight:
        """Lands this rank's equal share of the decoded sum (maybe a view of x, which is spent)."""

    def spread(self, piece: torch.Tensor, key: str) -> Flight:
        """Lands all ranks' pieces joined in rank order. Weights travel here: exact, whatever the wire."""

    def state(self) -> tuple[dict[str, Any], dict[str, Spanned], dict[str, torch.Tensor]]:
        """shared values, summed vectors (residuals) and tensors, as in State. Nothing is in flight."""

    def load(self, shared: dict[str, Any], summed: dict[str, torch.Tensor], tensors: dict[str, torch.Tensor]) -> None:
        """From state() of any world size; summed: vectors over the whole map, as State says."""


class Exchange(Protocol):
    """When a round closes, at which weights gradients are taken, who waits for whom.

    copies: gradient vectors it needs of the map, 2 where one travels while the next is filled. identical: does it
    promise replicas that are bit-equal at every mark? anchored: are the weights to keep older than a mark, and of all
    its tokens only once settled? Then the last evaluation comes after settling. resized: once loaded, what a person
    should know if there were other ranks, as the end of a sentence; "": it goes on as if nothing had happened.
    """

    copies: int
    identical: bool
    anchored: bool
    resized: str
    unlike: bool  # told before `attach`: do the ranks compute on several models of processor?
    marks_on_ask: bool
    milestones: Milestones
    watch: Any

    def between(self, world: World) -> World:
        """The ranks that its wire joins. Collective; called once, before `attach`."""

    def attach(self, model: nn.Module, flat: Any, update: Update, wire: Wire, world: World) -> nn.Module:
        """Installs hooks that only enqueue; returns the module to call."""

    def start(self, model: torch.Tensor, moments: dict[str, torch.Tensor], steps: int) -> None:
        """Begins, attached and not yet trained, with a trunk's weights; where moments are given, with its optimizer,
        which has made so many steps. Vectors over the map."""

    def feed(self, stream: Stream) -> Iterator[Batch]:
        """Micro-batches, hooks armed before each forward; endless. Raises NotFinite in the round after a bad one."""

    def advance(self, batch: Batch, loss: torch.Tensor) -> Commit | None:
        """After a backward: launch, land, apply. A Commit only at a mark."""

    def consensus(self) -> AbstractContextManager[int | None]:
        """Within: the weights a user would keep; after: this rank's own again. Yields the tokens that they are of, None
        where these are all committed ones. Collective. Raises NotFinite."""

    def settle(self) -> Settled:
        """Lands and applies what is in flight. Collective."""

    def disarm(self) -> None:
        """No hook launches anything any more: a round is about to be replayed without exchange."""

    def state(self) -> State:
        """The replica as it is; never inside consensus. Raises NotFinite."""

    def load(self, state: State, mine: list[dict[str, Any]]) -> None:
        """From a checkpoint of any world size; mine: what each rank there was had of its own."""


class NotFinite(Exception):
    """A summed gradient is not finite: the update was masked, on every rank alike.

    rounds: of the stream, in `parts` a batch, whose gradients these were. left: the weights are no longer those that
    they were taken at. stream: another than the run's that deals them. again: can they be dealt again, on any rank?
    """

    def __init__(
        self, step: int, rounds: list[int], norm: float, parts: int = 1, left: bool = False, *,
        stream: Any = None, again: bool | None = None,
    ) -> None:  # fmt: skip
        super().__init__(f"step {step}: gradient norm {norm}")
        self.step, self.rounds, self.norm, self.parts, self.left = step, rounds, norm, parts, left
        self.stream, self.again = stream, bool(rounds) if again is None else again
