"""How the gradients of the ranks meet: the settings of each exchange, and what it asks of the other parts."""

from __future__ import annotations

import importlib.util
import math
import re
from dataclasses import dataclass

from hvdllm.registry import HOROVOD, LETTERS, PIECES, TORCH, ExchangeFacts, name_of, of, part
from hvdllm.settings import Config, Settings, Setup, setting


@dataclass
class Exchange(Settings):
    """What is common to every exchange."""

    bucket_mb: float | None = setting(
        None,
        "MiB of gradients that travel together; smaller starts earlier, larger has less overhead; null: an eighth of "
        "all gradients, between 1 and 25",
        least=0.001,
        most=1e6,
    )

    @property
    def parts(self) -> int:
        """Equal parts, by count, that the ranks compute of each global batch."""
        return 1

    @property
    def gradients(self) -> int:
        """Gradient vectors that a rank holds; 2 if one travels while the next is filled."""
        return 1

    @property
    def batches_a_commit(self) -> int:
        """Global batches from one commit to the next, at least."""
        return 1

    @property
    def dedicated(self) -> int:
        """Ranks that serve and do not train."""
        return 0

    @property
    def groups(self) -> bool:
        """Are there groups of ranks that meet among themselves?"""
        return False


@part("exchange", "allreduce", "hvdllm.exchange.allreduce:AllReduce", ExchangeFacts(sparse=True))
@dataclass
class AllReduce(Exchange):
    """Synchronous: every update waits for the sum of all ranks' gradients. Replicas stay identical."""

    reduction: str = setting(
        "sum",
        "sum, or adasum (Maleki et al., 2020): gradients of equal direction are averaged, orthogonal ones added, "
        "tensor by tensor; a power of two ranks",
        choices=("sum", "adasum"),
    )

    def refusal(self, setup: Setup) -> str | None:
        if self.reduction != "adasum":
            return None
        if getattr(setup.config.task, "sparse", False):
            return "exchange.reduction=adasum works on whole tensors, not on rows: give task.sparse=false"
        if not of("wire", setup.config.wire).facts.exact or setup.config.wire.hierarchical:
            return "exchange.reduction=adasum needs wire=fp32, not hierarchical: it works on whole tensors"
        if setup.ranks & (setup.ranks - 1):
            return f"exchange.reduction=adasum adds up ranks in pairs: {setup.ranks} ranks are no power of two"
        return None


@part("exchange", "sharded", "hvdllm.exchange.sharded:Sharded", ExchangeFacts(carries=PIECES, shares_state=True))
@dataclass
class Sharded(Exchange):
    """Synchronous, ZeRO-1: each rank gets the sum of its own pieces, updates them with 1/N of the optimizer's state,
    and hands out the weights."""


@part("exchange", "delayed", "hvdllm.exchange.delayed:Delayed", ExchangeFacts())
@dataclass
class Delayed(Exchange):
    """One update late: the sum of one round travels while the next is computed. Staleness exactly 1."""

    warmup_tokens: int | None = setting(
        None,
        "committed tokens before which every update is synchronous: a few dozen updates (ZeRO-Offload, section 5.2); "
        "null: 20 global batches",
        least=0,
    )
    compensation: float = setting(
        0.0,
        "lambda of delay compensation (Zheng et al., 2017): the sum G over n tokens becomes G + lambda G*G*(x - "
        "x_then); 1 takes G*G/n for the Hessian of the mean loss; 0: none. Costs a copy of the weights",
        least=0,
    )

    @property
    def gradients(self) -> int:
        """One gradient vector travels while the next is filled."""
        return 2


@part(
    "exchange",
    "acco",
    "hvdllm.exchange.acco:Acco",
    ExchangeFacts(carries=PIECES, shares_state=True, sums_per_update=2),
)
@dataclass
class Acco(Exchange):
    """ACCO (Nabli et al., 2024): two halves an update, each computed while the other travels, the second at an
    estimate of the weights to come; optimizer state 1/N a rank. Nobody waits for the network."""

    timed: bool = setting(
        False,
        "a half ends for a rank when what travels has landed, so fast ranks do more micro-batches; false: by count, "
        "half of batch_tokens, which can be repeated bit for bit. Timed, batch_tokens is the least an update has "
        "(where exchange.most does not end it), and a micro-batch has no more than a rank's share of half of it",
    )
    least: int = setting(
        1, "micro-batches that a rank computes in a half at least, where timed", least=1, most=1_000_000
    )
    most: int | None = setting(
        None,
        "micro-batches in a half at most, where timed: then the rank waits, so that one that stands still does not "
        "make an update of the others' any size; null: no limit",
        least=1,
        most=1_000_000,
    )

    @property
    def gradients(self) -> int:
        """One gradient vector travels while the next is filled."""
        return 2

    @property
    def parts(self) -> int:
        return 1 if self.timed else 2

    def refusal(self, setup: Setup) -> str | None:
        if self.timed and setup.transport == "virtual" and setup.config.world.tokens_per_s is None:
            return (
                "world=virtual with exchange.timed=true: logical ranks have no times to end a half by; give "
                "world.tokens_per_s, which simulates a clock, or take timed=false"
            )
        if (self.most or math.inf) < self.least:
            return f"exchange.most={self.most} is less than exchange.least={self.least}"
        return None


@dataclass
class LocalSteps(Exchange):
    """What is common to exchanges whose ranks, or groups of ranks, train on their own between meetings."""

    local_steps: int = setting(
        50,
        "updates of each group from one meeting to the next (H); its bytes fall by this factor",
        least=1,
        most=1_000_000_000,
    )
    inner: str = setting(
        "none",
        "how the ranks of a group are one replica: none (a group is one rank), allreduce or sharded",
        choices=("none", "allreduce", "sharded"),
    )
    group: int | None = setting(
        None, "ranks of a group where inner is not none; null: those of a host", least=2, most=1_000_000
    )
    inner_wire: str = setting(
        "fp32", "wire inside a group; `wire` is that of the meetings", choices=("fp32", "fp16", "bf16", "int8")
    )
    host_memory: bool = setting(
        False, "the anchor and the outer optimizer's state live in the host's memory; for GPUs that are full"
    )

    @property
    def groups(self) -> bool:
        return self.inner != "none"

    def group_size(self, setup: Setup) -> int:
        """Ranks that are one replica."""
        return int(self.group or setup.local_ranks) if self.groups else 1

    def refusal(self, setup: Setup) -> str | None:
        if not self.groups:
            if self.group is not None:
                return "exchange.group needs exchange.inner=allreduce or sharded: else a group is one rank"
            if self.inner_wire != "fp32":
                return "exchange.inner_wire needs exchange.inner=allreduce or sharded: alone nothing travels"
            return self._meetings()
        size = self.group_size(setup)
        if setup.config.wire.hierarchical:
            return "wire.hierarchical=true with exchange.inner: groups are a hierarchy already, leave one of them out"
        if size < 2 or setup.ranks % size or setup.ranks == size:
            return (
                f"exchange.inner={self.inner} makes groups of {size} of {setup.ranks} ranks: it takes at least two "
                "groups of at least two, all equal; give exchange.group"
            )
        return self._meetings()

    def _meetings(self) -> str | None:
        """Why local steps cannot meet as these settings say."""
        return None


@dataclass
class LocalRounds(LocalSteps):
    """What is common where the whole model meets at once."""

    pulses: int | None = setting(
        None,
        "times a round that tokens, losses and asks of all ranks are told, the meeting included; they change no "
        "weight; null: one every 10 local steps",
        least=1,
        most=1_000_000_000,
    )
    by_speed: bool = setting(
        False, "slower groups make fewer local steps, so that all meet at once; deltas are normalised by them (FedNova)"
    )

    @property
    def batches_a_commit(self) -> int:
        return _between_pulses(self.local_steps, self.pulses)

    def _meetings(self) -> str | None:
        return _too_many_pulses(self.local_steps, self.pulses)


@part("exchange", "local_sgd", "hvdllm.exchange.local_sgd:LocalSGD", ExchangeFacts(identical=False, local=True))
@dataclass
class LocalSGD(LocalRounds):
    """Local SGD: some updates alone, then the mean of the weights. Fewer bytes, no momentum of its own."""

    local_steps: int = setting(
        16, "updates of each rank from one mean to the next; 16 as post-local SGD", least=1, most=1_000_000_000
    )
    warmup_tokens: int | None = setting(
        None,
        "committed tokens before which the mean is taken after every update (post-local SGD); null: 20 global batches",
        least=0,
    )


@part("exchange", "diloco", "hvdllm.exchange.diloco:DiLoCo", ExchangeFacts(identical=False, local=True))
@dataclass
class DiLoCo(LocalRounds):
    """DiLoCo (Douillard et al., 2023): many updates alone, then a step of Nesterov's momentum on their mean."""

    outer_lr: float = setting(0.7, "rate of the outer step; .7 as in the paper", least=0)
    outer_momentum: float = setting(0.9, "momentum of the outer step; .9 as in the paper", least=0)
    overlap: bool = setting(
        False,
        "what a round has made travels during the next and is applied after it; the outer rate must be below .253 at "
        "momentum .9, .562 at .5, 1 at 0",
    )

    @property
    def gradients(self) -> int:
        """With overlap, the deltas of one round travel while the gradients of the next, then its deltas, are made."""
        return 3 if self.overlap else 1

    def _meetings(self) -> str | None:
        return super()._meetings() or unstable(self.outer_lr, self.outer_momentum, self.overlap)


@part(
    "exchange",
    "streaming_diloco",
    "hvdllm.exchange.streaming_diloco:StreamingDiLoCo",
    ExchangeFacts(identical=False, local=True),
)
@dataclass
class StreamingDiLoCo(LocalSteps):
    """Streaming DiLoCo (Douillard et al., 2025): the model meets part by part while training goes on."""

    fragments: int = setting(
        4, "parts of the model, of about equal size; the peak of traffic falls by this factor", least=1, most=10_000
    )
    delay: int = setting(
        1,
        "local steps that a part may take to arrive (tau), fewer than local_steps / fragments",
        least=0,
        most=1_000_000,
    )
    mixing: float = setting(
        0.5, "share of its own weights that a rank keeps at a join (alpha); .5 as the paper", least=0
    )
    outer_lr: float = setting(0.7, "rate of the outer step", least=0)
    outer_momentum: float = setting(0.9, "momentum of the outer step", least=0)

    @property
    def gradients(self) -> int:
        """Deltas travel while gradients are computed."""
        return 2

    @property
    def batches_a_commit(self) -> int:
        return -(-self.local_steps // self.fragments)

    def _meetings(self) -> str | None:
        if (self.delay + 1) * self.fragments > self.local_steps:
            return (
                f"exchange.delay={self.delay} is not less than local_steps / fragments = {self.local_steps} / "
                f"{self.fragments}: one part travels at a time"
            )
        if self.mixing > 1:
            return f"exchange.mixing={self.mixing} must lie between 0 and 1"
        return unstable(self.outer_lr, self.outer_momentum)


@part(
    "exchange",
    "parameter_server",
    "hvdllm.exchange.parameter_server:ParameterServer",
    ExchangeFacts(carries=LETTERS, identical=False, buckets=False),
)
@dataclass
class ParameterServer(Exchange):
    """Parameter servers: pieces of the weights live on servers, each rank pushes gradients and pulls weights when it is
    ready. Needs ranks that MPI started (horovodrun --mpi, mpirun), or logical ones."""

    staleness: int | None = setting(
        None,
        "clocks (a push each, of about batch_tokens / ranks) that a rank may be ahead of the slowest when it begins "
        "one; 0: synchronous, one step with the sum of all ranks; null: asynchronous, nobody waits for anybody",
        least=0,
    )
    servers: str = setting(
        "shared",
        "shared: every rank trains and serves its part; K: so many ranks, the last ones, serve and do not train",
    )
    compensation: float = setting(
        0.0,
        "lambda of delay compensation (Zheng et al., 2017): the sum G over n tokens becomes G + lambda G*G*(x - "
        "x_then), x_then what its rank had pulled; 1 takes G*G/n for the Hessian of the mean loss; 0: none. Costs the "
        "servers a copy of the weights a rank; the paper's numbers belong to its batch",
        least=0,
    )
    staleness_aware: bool = setting(
        False, "the rate of a push is divided by its staleness in pushes (Zhang et al., 2016)"
    )
    lease_s: float = setting(
        300.0,
        "seconds that a rank may be silent before the run ends with a sentence that names it; longer than a push takes "
        "to compute",
        least=0.1,
        most=1e6,
    )

    @property
    def dedicated(self) -> int:
        """Ranks that serve and do not train."""
        return 0 if self.servers == "shared" else int(self.servers)

    def refusal(self, setup: Setup) -> str | None:
        if not re.fullmatch(r"shared|[1-9]\d*", self.servers):
            return (
                f"exchange.servers={self.servers}: give shared, where every rank trains and serves its part, or how "
                "many ranks serve and do not train"
            )
        if self.dedicated >= setup.ranks:
            return (
                f"exchange.servers={self.servers} of {setup.ranks} rank{'s' * (setup.ranks > 1)}: none is left to "
                "train; start more, or give exchange.servers=shared, where every rank trains and serves its part"
            )
        for name in ("compensation", "staleness_aware"):
            if self.staleness == 0 and getattr(self, name):
                return (
                    f"exchange.{name} with exchange.staleness=0: gradients are not late there, leave it out or give "
                    "another staleness"
                )
        if setup.transport == "horovod" and importlib.util.find_spec("mpi4py") is None:
            return "exchange=parameter_server needs mpi4py: run jobs/setup.sh, or pip install mpi4py"
        return None


@part(
    "exchange",
    "fedavg",
    "hvdllm.exchange.fedavg:FedAvg",
    ExchangeFacts(identical=False, local=True, fresh_optimizer=True, clients=True),
)
@dataclass
class FedAvg(LocalSteps):
    """Federated averaging (McMahan et al., 2017): clients with text of their own train from the shared weights, each
    with a fresh optimizer; a server steps on the mean of what they have made, weighted by their text."""

    local_steps: int = setting(
        20, "updates of each client in a round (H), of batch_tokens / sampled each, in whole sequences", least=1,
        most=1_000_000_000,
    )  # fmt: skip
    pulses: int | None = setting(
        None,
        "times a round that tokens, losses and asks of all ranks are told, the meeting included, at most one a local "
        "step; they change no weight; null: one every 10 steps of a rank",
        least=1,
        most=1_000_000_000,
    )
    clients: int = setting(
        8,
        "clients that the documents (files, lines of .jsonl) are dealt to, each wholly to one; those of a round are "
        "dealt to the ranks, which train theirs one after the other: the same clients for any number of ranks",
        least=1,
        most=1_000_000,
    )
    alpha: float | None = setting(
        None, "how alike the clients' shares of the text are (Dirichlet's): 100 nearly equal, .1 a few have most; "
        "null: equal", least=0.05,
    )  # fmt: skip
    sampled: int | None = setting(None, "clients that a round draws; null: all that have text", least=1, most=1_000_000)
    prox: float = setting(
        0.0,
        "mu of FedProx (Li et al., 2018): mu (weights - anchor) is added to each mean gradient, before clipping; .001 "
        "to 1 in the paper",
        least=0,
    )
    server: str = setting(
        "sgd", "what the server does with the mean delta: sgd (momentum as DiLoCo's) or adam (FedAdam)",
        choices=("sgd", "adam"),
    )  # fmt: skip
    outer_lr: float | None = setting(
        None, "rate of the server; null: 1 for sgd, which with outer_momentum=0 is the mean of the weights, and .01 "
        "for adam, about what a weight moves in a round", least=0,
    )  # fmt: skip
    outer_momentum: float = setting(0.0, "momentum (Nesterov's) of server=sgd", least=0)
    beta1: float = setting(0.9, "decay of the mean of deltas, a round, of server=adam", least=0)
    beta2: float = setting(0.99, "decay of the mean of squared deltas, a round, of server=adam", least=0)
    tau: float = setting(
        1e-3, "of server=adam: added to the root of the second moment, which begins at its square; .001 in the paper",
        least=1e-9,
    )  # fmt: skip

    @property
    def gradients(self) -> int:
        """What clients have made adds up in one gradient vector while the next is trained in the other."""
        return 2

    @property
    def rate(self) -> float:
        """outer_lr, where it is left open too."""
        return {"sgd": 1.0, "adam": 0.01}[self.server] if self.outer_lr is None else self.outer_lr

    @property
    def batches_a_commit(self) -> int:
        return _between_pulses(self.local_steps, self.pulses)

    def refusal(self, setup: Setup) -> str | None:
        return super().refusal(setup) or self._clients(setup) or self._server(setup.config)

    def _meetings(self) -> str | None:
        pulses = _too_many_pulses(self.local_steps, self.pulses)
        return pulses or unstable(self.rate if self.server == "sgd" else 0.0, self.outer_momentum)

    def _clients(self, setup: Setup) -> str | None:
        """Why clients cannot be drawn or dealt as asked."""
        drawn, each = self.sampled or self.clients, self.group_size(setup)
        groups, batch = setup.ranks // each, setup.config.batch_tokens
        context, unit = setup.config.task.units(setup.config) or 1, of("task", setup.config.task).facts
        name = "clients" if self.sampled is None else "sampled"
        if drawn > self.clients:
            return f"exchange.sampled={drawn} of exchange.clients={self.clients}: at most all of them"
        if drawn < groups:
            return (
                f"exchange.{name}={drawn} clients a round for {groups} {'ranks' if each == 1 else 'groups of ranks'}: "
                f"some would have nothing to do; at least {groups}, or start fewer ranks"
            )
        if batch // context < drawn * each:
            return (
                f"batch_tokens={batch} is {batch // context} {unit.items} of {context} {unit.unit}, fewer than {drawn} "
                f"clients take in a step{f' on {each} ranks each' * (each > 1)}: at least {drawn * each * context}, or "
                f"a smaller exchange.{name}"
            )
        return None

    def _server(self, config: Config) -> str | None:
        """Why the server cannot step as asked."""
        if self.server == "adam" and self.outer_momentum:
            return "exchange.outer_momentum is that of exchange.server=sgd: leave it at 0, adam has exchange.beta1"
        for key in ("beta1", "beta2", "tau"):
            if self.server == "sgd" and getattr(self, key) != getattr(FedAvg, key):
                return f"exchange.{key} is that of exchange.server=adam: leave it out, or give that server"
            if key != "tau" and getattr(self, key) >= 1:
                return f"exchange.{key}={getattr(self, key)} must be smaller than 1"
        if config.init_optimizer:
            return "init_optimizer=true: each client of exchange=fedavg begins with a fresh optimizer, leave it out"
        if self.prox and self.host_memory:
            return "exchange.prox reads the anchor at every step: leave exchange.host_memory at false"
        return None


@part("exchange", "ddp", "hvdllm.exchange.ddp:Ddp", ExchangeFacts(carries=TORCH))
@dataclass
class Ddp(Exchange):
    """Reference: torch's DistributedDataParallel, with bucket views, no_sync while accumulating, our fused optimizer.
    It runs without Horovod (world=torch)."""

    sync: str = setting(
        "round",
        "when gradients are summed: once a round, with its last micro-batch; or after every micro_batch, as scripts do "
        "that accumulate without no_sync, with the same result and as many times the bytes and waits",
        choices=("round", "micro_batch"),
    )

    def refusal(self, setup: Setup) -> str | None:
        if not of("wire", setup.config.wire).facts.hooked:
            return None
        wire = name_of("wire", setup.config.wire)
        if self.bucket_mb is not None:
            return f"exchange.bucket_mb with exchange=ddp wire={wire}: torch's hook takes one bucket, leave it at null"
        if self.sync == "micro_batch":
            return (
                f"exchange.sync=micro_batch with wire={wire}: torch's hook counts its sums, and its warm-up is so many "
                "rounds; leave exchange.sync at round, or take another wire"
            )
        return None


@part("exchange", "horovod", "hvdllm.exchange.horovod:Horovod", ExchangeFacts(carries=HOROVOD, buckets=False))
@dataclass
class Horovod(Exchange):
    """Reference: Horovod's own DistributedOptimizer, as its documentation uses it."""


def _between_pulses(local_steps: int, pulses: int | None) -> int:
    return -(-local_steps // max(1, (pulses or 1) - 1))


def _too_many_pulses(local_steps: int, pulses: int | None) -> str | None:
    if (pulses or 1) > local_steps:
        return f"exchange.pulses={pulses} in {local_steps} local steps: at most one after each"
    return None


def unstable(lr: float, momentum: float, late: bool = False) -> str | None:
    """Why an outer optimizer of this rate diverges; late: its steps are applied one round after they were made."""
    if momentum >= 1:
        return f"exchange.outer_momentum={momentum} must be smaller than 1"
    bound = outer_rate_below(momentum, late)
    if lr < bound:
        return None
    why = "applied one round late (exchange.overlap) it is" if late else "it is"
    return (
        f"exchange.outer_lr={lr:g} with exchange.outer_momentum={momentum:g} is unstable: {why} stable below "
        f"{bound:.3g} only; lower one of them"
    )


def outer_rate_below(momentum: float, late: bool = False) -> float:
    """The bound on lr x q of torch's Nesterov SGD on mean deltas, on a quadratic where a round of local steps shrinks
    the distance to the optimum by 1 - q, 0 < q <= 1. Late: the delta of one round is applied after the next.

    At once: 2 (1+μ) / (1+2μ). Late, with p(z) = z³ - (1+μ) z² + (μ + a (1+μ)) z - aμ and a = lr q: Jury's last
    condition a²μ² + a (1-μ²) < 1-μ. For μ of 0, .5, .9: 2, 1.5, 1.357 and 1, .562, .253.
    """
    if not late:
        return 2 * (1 + momentum) / (1 + 2 * momentum)
    if momentum == 0:
        return 1.0
    b, c = 1 - momentum**2, 1 - momentum
    return (math.sqrt(b * b + 4 * momentum**2 * c) - b) / (2 * momentum**2)
