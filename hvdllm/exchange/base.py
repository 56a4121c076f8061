"""The exchange protocol, and each of its words defined once.

round        what all ranks finish together: for a synchronous exchange, one global batch
mark         a point that all ranks share, and the only place where a Commit is made
commit       one optimizer step with the gradients of all ranks; the committed tokens are the same number everywhere
flight       one thing that travels. It is launched; it has landed when it has arrived; `land` waits for it and
             applies nothing
sum          a sum over tokens and ranks, never a mean: the update divides once, by the tokens of all ranks
meta         the exact numbers of a round (tokens, loss, asks, seconds) in one float64 vector that travels on its own
post, hear   a rank posts what it has to tell the others, and hears what all of them have told
pieces       a rank's slice of every bucket of the flat vector; where replicas are whole, all of it

The loop knows nothing else of an exchange. A new one therefore adds a file here and an entry in parts.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import nn

from hvdllm.device import Later, Mark
from hvdllm.flat import Flat, Span
from hvdllm.plain import Json, Tree
from hvdllm.tables import RowSums
from hvdllm.world.base import Asks, Flight, World

Values = Json  # plain values by name, as JSON has them
Watch = Callable[[int, str, Mark, Mark], None]  # is told of an interval: number of the step, lane, begin, end
Total = Callable[[torch.Tensor], torch.Tensor]  # sums a small vector over the ranks that own the pieces
Spanned = tuple[list[Span], torch.Tensor]  # spans of the flat vector, and their elements one after the other


# ------------------------------------------------------------------ where the text comes from
class Batch(Protocol):
    """A micro-batch.

    inputs, targets: what the loss is of, such as token ids of shape [B, T]; None where this rank has no share
    tokens: the units that its loss is a sum over; where they are 0, no graph is run
    last: it is the last one of this rank's share of the round
    round, index: the round it belongs to, and its number in this rank's share of that round
    fresh: bytes of text that its targets stand for, if a stream has brought them for the first time; else 0
    """

    inputs: Tree
    targets: Tree
    tokens: int
    last: bool
    round: int
    index: int
    fresh: int


@dataclass
class Nothing:
    """An empty micro-batch, for a rank that has nothing to compute and still walks the loop."""

    inputs: Tree = None
    targets: Tree = None
    tokens: int = 0
    last: bool = True
    round: int = 0
    index: int = 0
    fresh: int = 0


class Dealer(Protocol):
    """Deals any round of a stream again, as often as asked."""

    def share(self, round: int, parts: int = 1) -> Sequence[Batch]:
        """This rank's share of one round, or of one of its `parts`. It depends on nothing that was dealt before."""


class Rounded(Dealer, Protocol):
    """Deals micro-batches in rounds."""

    def rounds(self, parts: int = 1) -> Iterator[Sequence[Batch]]:
        """This rank's share of each global batch, dealt by count in `parts` equal parts; yields one part at a time."""


class Stream(Rounded, Protocol):
    """Where micro-batches come from: a pure function of seed and position.

    ends_rounds: `last` of the micro-batches of a lane says where the walker's share of a round ends
    """

    ends_rounds: bool

    def lane(self, index: int, of: int, most: int) -> Iterator[Batch]:
        """Endless micro-batches of at most `most` tokens, for walker `index` among `of`; the exchange sets `last`."""

    def group(self, index: int, of: int, rank: int, size: int) -> Rounded:
        """The text of group `index` among `of`, which trains on its own. A round is the group's share of a global
        batch, dealt to the group's ranks, of which this is rank `rank` among `size`."""

    def clients(self, count: int, alpha: float | None) -> Federation:
        """The text dealt to `count` clients by whole documents. alpha: parameter of the Dirichlet distribution that
        their shares are drawn from; None: equal shares."""


class Federation(Protocol):
    """Text that belongs to clients. tokens: how many each client has, 0 where it has none."""

    tokens: list[int]

    def sample(self, round: int, count: int | None) -> list[int]:
        """The clients of a round, in order and the same on every rank: `count` of those that have text, or all of
        them where count is None."""

    def walk(self, plan: Iterator[tuple[int, int]], of: int, rank: int, size: int) -> Rounded:
        """The steps that `plan` lists, each as a client and the number of its step. A step has one in `of` of a global
        batch and is dealt to the `size` ranks that train a client together."""


# ------------------------------------------------------------------ what the loop is told
@dataclass(frozen=True)
class Report:
    """What is known of a commit only one commit later, when the meta that carries it has landed.

    loss_sum, loss_tokens: the sum of all ranks' token losses in nats, and how many tokens these are
    grad_norm: norm of the mean gradient before clipping
    noise_scale: the gradient noise scale so far, in tokens (noise.py); None where it is not known

    The rest has one number a rank, over the rounds of this commit:
    compute_s, blocked_s: seconds that it computed, and that it stood still for the exchange
    flight_s: seconds that something travelled
    cpu_s: seconds of CPU time of the whole process
    micro_batches: how many it computed
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
        """The same report in a world of another size, where the numbers of single ranks have no place."""
        none = [0.0] * size
        return replace(self, compute_s=none, blocked_s=none, flight_s=none, cpu_s=none, micro_batches=none)


@dataclass(frozen=True)
class Commit:
    """One optimizer step with the gradients of all ranks.

    tokens, step: committed by all ranks, this commit included
    lr: the learning rate of this step
    staleness: how many steps its gradients are late, in the mean
    before: the report of the commit before this one; None for the first
    asks: what a person asked of any rank; the same on all ranks
    staleness_max: staleness of the latest gradient, where gradients differ in it
    updates: steps of the optimizer since the commit before. Where ranks train on their own it is one a mark, however
      many each of them has made
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
    """What is known once nothing travels any more.

    report: that of the last commit
    tokens: committed only by settling, after the last mark; they enter no comparison
    dropped: tokens that were computed and will never be committed
    """

    report: Report | None
    tokens: int = 0
    dropped: int = 0


@dataclass(frozen=True)
class Milestones:
    """Where a run wants marks. Only an exchange whose marks are not the ends of rounds reads them.

    acts: intervals, in tokens, of what all ranks do together
    logs: intervals, in tokens, of what nobody has to wait for
    budget: tokens of the last mark; 0: there is none
    """

    acts: tuple[int, ...] = ()
    logs: tuple[int, ...] = ()
    budget: int = 0


@dataclass
class State:
    """What a checkpoint holds of an exchange, its update and its wire.

    shared: plain values that are equal on all ranks
    spans: the elements of the flat vector that this rank writes; none where another rank writes the same ones
    sharded: vectors over those elements, by name
    mine: plain values of this rank alone
    local: vectors of this rank alone, such as its own weights. They are Spanned when saved, and vectors over the whole
      flat vector when loaded; at another world size there are none
    summed: vectors of this rank alone of which only the sum over ranks counts (residuals). They are Spanned when saved,
      and vectors over the whole flat vector when loaded
    tensors: tensors of any shape that are equal on all ranks

    When a state is loaded, all its vectors lie on the CPU, and those of `sharded` and `summed` cover the whole flat
    vector. At the same world size each rank gets its own `summed`; at another one rank 0 gets the sum over all ranks
    that saved, and the others get zeros.
    """

    shared: Values
    spans: list[Span]
    sharded: dict[str, torch.Tensor]
    mine: Values
    summed: Values = field(default_factory=dict)
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    local: Values = field(default_factory=dict)


# ------------------------------------------------------------------ the parts of an exchange
@dataclass
class Divisor:
    """What an update has to know of a summed gradient.

    tokens: what the sum is divided by
    committed: tokens of all ranks that are committed with this update; the learning rate is looked up there
    """

    tokens: float
    committed: int


class Update(Protocol):
    """What happens with a summed gradient (optim/update.py). Vectors are lists of slices, one for each piece."""

    def attach(self, flat: Flat, pieces: list[Span]) -> None:
        """pieces: the spans that this rank updates."""

    def rate(self, committed: int) -> float:
        """The learning rate of an update after which so many tokens are committed."""

    def step(
        self, pieces: list[torch.Tensor], grad: list[torch.Tensor], meta: Divisor, total: Total, share: float = 1.0,
        rows: Sequence[RowSums] = (),
    ) -> tuple[float, Later]:  # fmt: skip
        """One step in place, on rows of tables too, which only exchanges with whole replicas have. Returns the learning
        rate and the norm of the mean gradient, which is read later."""

    def fresh(self) -> None:
        """Forgets its moments; a mask for a bad gradient stays."""

    def peek(
        self, pieces: list[torch.Tensor], grad: list[torch.Tensor], meta: Divisor, total: Total
    ) -> list[torch.Tensor]:
        """The pieces after such a step; nothing is changed."""

    def weights(self) -> AbstractContextManager[None]:
        """Within it the model has the weights to evaluate with."""

    def state(self) -> tuple[Values, dict[str, torch.Tensor]]:
        """Plain values that are equal on all ranks, and vectors over this rank's pieces."""

    def load(self, shared: Values, vectors: dict[str, torch.Tensor]) -> None:
        """The inverse of `state`."""


class Wire(Protocol):
    """How a sum travels (exchange/wire/). A wire is made as Kind(world, settings, flat, nominal), where nominal is the
    number of tokens of a global batch.

    key: the fixed name of one stream of sums, `grad.<bucket>`
    x: the elements of that bucket in a gradient vector
    rough: what arrives in one round is only similar to the sum, and later rounds make up for the difference
    """

    rough: bool

    def begin(self, committed: int, weight: float) -> None:
        """Is called before the launches of a round.

        committed: tokens that all ranks have committed up to here
        weight: by how much one unit of the decoded sum will move a weight under plain descent, which is the rate
          divided by the nominal tokens. A residual is multiplied by the old weight over the new one, so that it moves
          the weights as far as it would have done before
        """

    def sum(self, x: torch.Tensor, key: str) -> Flight:
        """Works in place: when it has landed, x is the decoded sum, bit-equal on all ranks."""

    def scatter(self, x: torch.Tensor, key: str) -> Flight:
        """Lands this rank's equal share of the decoded sum. The share may be a view of x, which is spent."""

    def spread(self, piece: torch.Tensor, key: str) -> Flight:
        """Lands the pieces of all ranks, joined in rank order. Weights travel here, exactly on every wire."""

    def state(self) -> tuple[Values, dict[str, Spanned], dict[str, torch.Tensor]]:
        """Shared values, summed vectors (residuals) and tensors, as in State. Nothing is in flight."""

    def load(self, shared: Values, summed: dict[str, torch.Tensor], tensors: dict[str, torch.Tensor]) -> None:
        """The inverse of `state`, from any world size. summed: vectors over the whole flat vector, as State says."""


class Exchange(Protocol):
    """Says when a round ends, at which weights gradients are taken, and who waits for whom. common.py has the defaults.

    Facts:
    anchored: the weights to keep are older than a mark, and are those of all its tokens only once it has settled; the
      last evaluation then comes after settling
    marks_on_ask: an ask makes a mark at once, however far the next milestone is
    resized: what a person should know when a checkpoint of another world size was loaded, as the end of a sentence;
      "": training goes on as if nothing had happened

    What a run tells it before `attach`; an exchange that has no use for one of them ignores it:
    unlike: the ranks compute on several models of processor
    milestones: where the run wants marks

    After `attach`:
    watch: is told of every interval of compute, blocked and flight; it may be set at any time
    update: what was attached
    """

    anchored: bool
    marks_on_ask: bool
    resized: str
    unlike: bool
    milestones: Milestones
    watch: Watch | None
    update: Update

    def between(self, world: World) -> World:
        """The ranks that its wire joins. Collective; it is called once, before `attach`."""

    def attach(self, model: nn.Module, flat: Flat, update: Update, wire: Wire, world: World) -> nn.Module:
        """Installs hooks that only enqueue; returns the module to call."""

    def start(self, model: torch.Tensor, moments: dict[str, torch.Tensor], steps: int) -> None:
        """Begins with the weights of another run, attached and not yet trained.

        model, moments: vectors over the flat vector; the moments of the optimizer may be none
        steps: how many steps that optimizer has made
        """

    def feed(self, stream: Stream) -> Iterator[Batch]:
        """Endless micro-batches; hooks are armed before each forward. Raises NotFinite in the round after a bad one."""

    def advance(self, batch: Batch, loss: torch.Tensor) -> Commit | None:
        """Is called after a backward: launches, lands and applies. It returns a Commit only at a mark."""

    def consensus(self) -> AbstractContextManager[int | None]:
        """Within it the model has the weights that a user would keep, afterwards this rank's own again. It yields the
        number of tokens that those weights are of, None where it is all committed ones. Collective. Raises NotFinite.
        """

    def settle(self) -> Settled:
        """Lands and applies what is in flight. Collective."""

    def disarm(self) -> None:
        """From here on no hook launches anything: a round is about to be computed again without exchange."""

    def state(self) -> State:
        """The replica as it is; it is never called inside `consensus`. Raises NotFinite."""

    def load(self, state: State, mine: list[Values]) -> None:
        """From a checkpoint of any world size. mine: what each rank of that world had of its own."""


class NotFinite(Exception):
    """A summed gradient is not finite, and every rank has masked the update.

    step, norm: the step of the update, and the norm of its mean gradient
    rounds, parts: the rounds of the stream that these gradients were taken on; each is one of `parts` of a batch
    left: the weights have moved on since these gradients were taken
    stream: what deals those rounds again, where that is not the stream of the run
    again: whether any rank can deal them again; by default, where `rounds` are given
    """

    def __init__(
        self, step: int, rounds: list[int], norm: float, parts: int = 1, left: bool = False, *,
        stream: Dealer | None = None, again: bool | None = None,
    ) -> None:  # fmt: skip
        super().__init__(f"step {step}: gradient norm {norm}")
        self.step, self.rounds, self.norm, self.parts, self.left = step, rounds, norm, parts, left
        self.stream, self.again = stream, bool(rounds) if again is None else again
