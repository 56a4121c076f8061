"""Every setting of hvdllm: its type, its default, its unit and why the default is what it is.

One dataclass a group; where a group has options with settings of their own (an exchange, an
optimizer), one dataclass an option. conf/ chooses among them and gives presets. `hvdllm train --help`
prints what stands here. What involves two settings, or the machine, is checked in check.py.

Types are what OmegaConf 2.3 can hold: it knows no Literal and no Union, so a choice is a string with
`choices` beside it (checked by compose.py), and a path that may be one or several is Any.

What a run's folder may decide is said here too. `resume=FOLDER`, `hvdllm sample` and the others read a folder that may
be a stranger's, so a setting with `ours=True` is never taken from one: what is started, where, by whom, from and to
which files, with which tracker. What is left shapes numbers alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

LARGEST = 1e15
"""Bound of every number that has no tighter one: beyond it integers overflow somewhere, or a step never ends."""


def setting(
    default: Any,
    doc: str,
    *,
    choices: tuple[str, ...] = (),
    least: float | None = None,
    most: float = LARGEST,
    form: tuple[str, str] | None = None,
    ours: bool = False,
) -> Any:
    """A field with what --help says of it, and what alone can be checked of it: its choices, its bounds, its form (a
    regular expression, and what to give, in words), of each part where it is a list. ours: not a folder's to say."""
    about = {"doc": doc, "choices": choices, "least": least, "most": most, "form": form, "ours": ours}
    return field(default=default, metadata=about)


# What goes into command lines. None begins with a hyphen, holds a blank or means anything to a shell.
WORD = r"[A-Za-z0-9_][A-Za-z0-9_.+-]*"
HOST = rf"({WORD}@)?{WORD}:[0-9]+"
HOSTS = rf"{HOST}(,{HOST})*", "host:slots, several with commas between, in quotes"
INTERFACE = r"[A-Za-z0-9_][A-Za-z0-9_.:-]{0,14}"
INTERFACES = rf"{INTERFACE}(,{INTERFACE})*", "names of network interfaces, such as eth0 or ib0,ib1"
NAME = WORD, "a name of letters, digits and _ . + -"
NAMES = rf"{WORD}(,{WORD})*", "names of letters, digits and _ . + -, several with commas between"
MODULE = rf"{WORD}([/:@]{WORD})*", "environment modules such as openmpi/4.1"
TIME = r"[0-9]+([:-][0-9]+)*|INFINITE|UNLIMITED", "a time as sbatch takes it, such as 2:00:00"
DIGEST = r"[0-9a-f]{64}", "the data hash that `hvdllm prepare` prints"


# ------------------------------------------------------------------ text
@dataclass
class Text:
    """What is common to every source of text."""

    tokenizer: str = setting(
        "bpe",
        "bytes (257 tokens), bpe (byte-level, trained on this corpus) or the path of a tokenizer.json; "
        "bpe, because a small model gets further on 3 bytes a token than on one",
        ours=True,
    )
    vocab: int = setting(2048, "tokens; asked of tokenizer=bpe, the corpus may yield fewer", least=258, most=10_000_000)
    validation: Any = setting(
        None, "path, list or glob of the validation text; null: documents chosen by a hash of their content", ours=True
    )
    prepared: str | None = setting(
        None,
        "data hash of a text that was prepared before (`hvdllm prepare` prints it): the one in data_dir is taken as it "
        "is, and no file of text is read; null: what the other settings name",
        form=DIGEST,
        ours=True,
    )
    validation_share: float = setting(
        0.05,
        "share of documents (of 64 KiB pieces where files are larger) held out where text.validation is null; 0: none, "
        "and where none qualifies the one with the smallest hash; 5 % of 11 MB is 500 kB",
        least=0,
    )


@dataclass
class Stdlib(Text):
    """The source of this machine's Python standard library: about 11 MB on every machine, nothing to download."""


@dataclass
class Files(Text):
    """The user's own files: .txt .md .py, .jsonl with a text column, each also as .gz."""

    path: Any = setting(None, "file, folder or glob, or a list of them; folders are walked in sorted order", ours=True)
    column: str = setting("text", "name of the field that holds the text of a .jsonl line")


# ------------------------------------------------------------------ model
@dataclass
class Model:
    """A decoder-only transformer: GPT-2 or Llama by its settings. The presets in conf/model set them."""

    layers: int = setting(4, "blocks of attention and MLP, one after the other", least=1, most=10_000)
    width: int = setting(128, "features of the residual stream (d_model)", least=1, most=1_000_000)
    heads: int = setting(4, "attention heads; a divisor of the width", least=1, most=100_000)
    kv_heads: int | None = setting(
        None, "heads of keys and values (grouped-query attention); null: as heads", least=1, most=100_000
    )
    mlp_width: int | None = setting(None, "hidden features of the MLP; null: 4 x width", most=10_000_000, least=1)
    context: int = setting(128, "tokens a sequence (window) has", least=1, most=10_000_000)
    positions: str = setting(
        "learned", "how a token knows its place: learned (GPT-2) or rope (Llama)", choices=("learned", "rope")
    )
    norm: str = setting("layernorm", "layernorm (GPT-2) or rmsnorm (Llama)", choices=("layernorm", "rmsnorm"))
    norm_eps: float = setting(1e-5, "added to the variance before its root", most=1.0, least=1e-12)
    mlp: str = setting("gelu", "gelu (GPT-2, tanh form) or swiglu (Llama)", choices=("gelu", "swiglu"))
    bias: bool = setting(True, "biases in linear layers and LayerNorm; true in GPT-2, false in Llama")
    tied: bool = setting(True, "the output layer shares the embedding's weights; spares vocabulary x width")
    rope_theta: float = setting(
        10000.0, "base of the rotary frequencies; read where positions=rope", most=1e12, least=1
    )
    dropout: float = setting(
        0.0,
        "share of activations dropped; 0, because below one epoch it only costs, and worlds agree only at 0",
        least=0,
    )
    compile: bool = setting(False, "torch.compile, block by block; about 10 s at the start, worth it on long runs")
    checkpointing: bool = setting(
        False, "compute each block's activations again in the backward: less memory, about a third more time"
    )


# ------------------------------------------------------------------ exchange
@dataclass
class Exchange:
    """What is common to every exchange."""

    bucket_mb: float | None = setting(
        None,
        "MiB of gradients that travel together; smaller starts earlier, larger has less overhead; null: an eighth of "
        "all gradients, between 1 and 25",
        least=0.001,
        most=1e6,
    )


@dataclass
class AllReduce(Exchange):
    """Synchronous: every update waits for the sum of all ranks' gradients. Replicas stay identical."""

    reduction: str = setting(
        "sum",
        "sum, or adasum (Maleki et al., 2020): gradients of equal direction are averaged, orthogonal ones added, "
        "tensor by tensor; a power of two ranks",
        choices=("sum", "adasum"),
    )


@dataclass
class Sharded(Exchange):
    """Synchronous, ZeRO-1: each rank gets the sum of its own pieces, updates them with 1/N of the optimizer's state,
    and hands out the weights."""


@dataclass
class Delayed(Exchange):
    """One update late: the sum of one round travels while the next is computed. Staleness exactly 1."""

    warmup_tokens: int = setting(
        40_000,
        "committed tokens before which every update is synchronous: a few dozen updates (ZeRO-Offload, section 5.2)",
        least=0,
    )
    compensation: float = setting(
        0.0,
        "lambda of delay compensation (Zheng et al., 2017): the sum G over n tokens becomes G + lambda G*G*(x - "
        "x_then); 1 takes G*G/n for the Hessian of the mean loss; 0: none. Costs a copy of the weights",
        least=0,
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


@dataclass
class LocalSGD(LocalRounds):
    """Local SGD: some updates alone, then the mean of the weights. Fewer bytes, no momentum of its own."""

    local_steps: int = setting(
        16, "updates of each rank from one mean to the next; 16 as post-local SGD", least=1, most=1_000_000_000
    )
    warmup_tokens: int = setting(
        40_000, "committed tokens before which the mean is taken after every update (post-local SGD)", least=0
    )


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
    def rate(self) -> float:
        """outer_lr, where it is left open too."""
        return {"sgd": 1.0, "adam": 0.01}[self.server] if self.outer_lr is None else self.outer_lr


@dataclass
class Ddp(Exchange):
    """Reference: torch's DistributedDataParallel, with bucket views, no_sync while accumulating, our fused optimizer.
    It runs without Horovod (world=torch)."""


@dataclass
class Horovod(Exchange):
    """Reference: Horovod's own DistributedOptimizer, as its documentation uses it."""


# ------------------------------------------------------------------ wire
@dataclass
class Wire:
    """What is common to every wire. What a lossy one leaves out of a sum it keeps for the next (error feedback)."""

    hierarchical: bool = setting(
        False,
        "inside a host in full precision, only one rank's share crosses hosts, and only that hop is coded; needs as "
        "many ranks on each host",
    )


@dataclass
class Fp32(Wire):
    """The gradients as they are (fp64 where precision=fp64): what arrives is the sum."""


@dataclass
class Coded(Wire):
    """What is common to the wires that code a sum by pieces: encoded twice on its way, added in fp32 between."""

    chunk_mb: float = setting(
        1.0,
        "MiB of gradients encoded at a time, while those before travel; larger ones left a shaped link idle half of "
        "the time, smaller ones have more operations (9.8 MB of fp16 at 200 Mbit/s: 218 ms at 1, 300 at 4)",
        least=0.001,
        most=1e5,
    )


@dataclass
class Fp16(Coded):
    """Half the bytes, 11 bits of precision. Sums are scaled to the middle of its range by the tokens of a batch: mean
    gradients from 1e-6 to 16 keep their precision; from 64 on they overflow, which stops the run with a sentence."""


@dataclass
class Bf16(Coded):
    """Half the bytes, 8 bits of precision, the range of fp32: nothing to scale, nothing overflows."""


@dataclass
class Int8(Coded):
    """A quarter of the bytes: each block of elements as 8-bit multiples of its largest / 127."""

    block: int = setting(
        256,
        "elements that share a scale of 4 bytes; 256: 1.6 % more bytes than int8 alone, steps of 1/127",
        least=8,
        most=2**20,
    )


@dataclass
class TopK(Coded):
    """Only the largest elements of each piece travel, the rest adds up until it is large (Deep Gradient Compression,
    Lin et al., 2018). Vectors (biases, norms) travel whole."""

    density: float = setting(
        0.01,
        "share of the elements that travels, 8 bytes each; with N ranks the way back carries up to N times as many, so "
        "few ranks and few elements save most; .001 in the paper, on far longer runs",
        least=1e-6,
    )
    warmup_tokens: int = setting(
        50_000,
        "committed tokens over which the density falls exponentially from 25 %: 4 % of a run of 1.2 million, as the "
        "paper's 4 of 90 epochs",
        least=0,
    )
    momentum: float = setting(
        0.0,
        "momentum correction with factor masking: each rank chooses from its velocity. Give SGD's momentum here "
        "and set optim.momentum=0; 0 with Adam, whose momentum comes after the sum",
        least=0,
    )


@dataclass
class Sign(Coded):
    """One bit an element and a scale of 4 bytes for each 1024, of the gradients' sum (1-bit SGD, Seide et al., 2014).
    Vectors travel whole. With AdamW second moments are frozen as in 1-bit Adam (Tang et al., 2021); but that one sends
    signs of the momentum, which is smoother, where this wire sends those of the gradients and each rank's momentum
    averages them."""

    warmup_tokens: int = setting(
        200_000,
        "committed tokens before which sums are exact: 17 % of a run of 1.2 million; 1-bit Adam takes 15 to 25 %",
        least=0,
    )
    scale: str = setting(
        "l1",
        "l1: mean |u|, which always brings the receiver nearer (a contraction); l2: root mean square as in 1-bit Adam, "
        "which keeps the norm but overshoots where few elements are large",
        choices=("l1", "l2"),
    )


@dataclass
class PowerSGD(Wire):
    """Each matrix as a product of two thin ones, found by one step of the power method from the last one's (Vogels et
    al., 2019). Only where replicas get whole sums (exchange=allreduce, delayed)."""

    rank: int = setting(4, "columns of the thin matrices; 4 as in the paper's language models", least=1, most=65_536)
    warmup_tokens: int = setting(
        100_000,
        "committed tokens before which sums are exact: early gradients change too fast to be followed; some dozen "
        "updates (the paper's code: 100)",
        least=0,
    )
    min_compression: float = setting(
        2.0, "tensors that would shrink by less than this factor travel uncompressed; 2 as in the paper's code", least=0
    )


# ------------------------------------------------------------------ world
@dataclass
class World:
    """Which processes train together, and how they talk."""

    kind: str = setting(
        "auto",
        "auto (what started us, and the exchange, decide), single (this process alone), horovod, torch "
        "(torch.distributed: torchrun, or any launcher) or virtual (logical ranks in one process: for oracles and "
        "convergence, not for speed)",
        choices=("auto", "single", "horovod", "torch", "virtual"),
    )
    size: int = setting(4, "logical ranks of world=virtual; elsewhere the launcher decides", least=1, most=4096)
    hosts: int = setting(
        1, "logical hosts of world=virtual, a divisor of its size; for wire.hierarchical", least=1, most=4096
    )
    slow: Any = setting(
        None,
        "ranks made slower than they are, for experiments: rank:factor such as 1:4, or a list, [1:4,3:2]; by computing "
        "that much more, by sleeping where ranks outnumber cores, on a simulated clock by its time; null: none",
    )
    tokens_per_s: float | None = setting(
        None,
        "tokens a second that a logical rank computes on a simulated clock: then all seconds of the records are "
        "simulated, exchange.timed has times to go by, and runs repeat bit for bit; null: no such clock",
        least=1e-3,
        most=1e15,
    )
    speed_spread: float = setting(
        0.0,
        "on the simulated clock, how unequal ranks are: standard deviation of the logarithm of their speeds, "
        "drawn from the seed (.3: one rank in three is faster than 1.34 or slower than 0.75 times)",
        least=0,
        most=10,
    )
    jitter: float = setting(
        0.0,
        "on the simulated clock, a micro-batch takes 1 + jitter x X times as long, X of mean 1 with a heavy tail "
        "(Pareto of index 2), drawn from the seed",
        least=0,
        most=1e6,
    )
    bandwidth: str | None = setting(
        None,
        "on the simulated clock, rate of each rank's link such as 200mbit; what stays inside one of several "
        "logical hosts takes no time; null: nothing takes time for its size",
    )
    latency_ms: float = setting(0.0, "on the simulated clock, of everything that travels", least=0, most=1e9)
    timeout_s: float = setting(
        1800.0,
        "seconds a rank waits for the others before it gives up with a sentence; longer than any act",
        least=1,
        most=1e6,
    )


# ------------------------------------------------------------------ optim and schedule
@dataclass
class Adam:
    """What is common to Adam's kind. Decays matrices and embeddings only."""

    lr: float = setting(3e-3, "peak learning rate; small models take more than large ones", least=0)
    beta1: float = setting(0.9, "decay of the mean of gradients, a step", least=0)
    beta2: float = setting(
        0.95, "decay of the mean of squared gradients, a step; .95 as usual for language models", least=0
    )
    eps: float = setting(1e-8, "added to the root of the second moment", least=0)
    weight_decay: float = setting(0.1, "decay a step, times the learning rate", least=0)
    clip: float = setting(1.0, "largest global gradient norm; 0: no clipping", least=0)


@dataclass
class AdamW(Adam):
    """Adam with decoupled weight decay (Loshchilov and Hutter, 2019)."""

    freeze_tokens: int | None = setting(
        None,
        "committed tokens after which second moments stay as they are, the second stage of 1-bit Adam (Tang et "
        "al., 2021): for wire=sign; null: never",
        least=1,
    )


@dataclass
class NAdam(Adam):
    """Adam that looks ahead along its momentum, decoupled decay (Dozat, 2016): for exchange=delayed, beta1 of .99 is
    Nesterov's method for delay (Ajanthan et al., 2025)."""

    beta1: float = setting(0.99, "decay of the mean of gradients, a step; .99 as that paper's code", least=0)


@dataclass
class SGD:
    """Stochastic gradient descent with momentum; the decay is added to the gradient, as in torch.optim.SGD."""

    lr: float = setting(0.1, "peak learning rate", least=0)
    momentum: float = setting(0.9, "decay of the velocity, a step; 0: plain descent", least=0)
    nesterov: bool = setting(False, "look ahead along the velocity (Sutskever et al., 2013)")
    weight_decay: float = setting(0.0, "times the weights, added to the gradient of matrices and embeddings", least=0)
    clip: float = setting(1.0, "largest global gradient norm; 0: no clipping", least=0)


@dataclass
class Schedule:
    """What is common to every schedule: the rate is optim.lr times a factor of committed tokens."""

    warmup: float = setting(0.05, "share of the horizon over which the rate rises linearly from 0", least=0)
    horizon: int | None = setting(
        None, "tokens over which the schedule runs; null: budget_tokens of the run's first start", least=1
    )


@dataclass
class Constant(Schedule):
    """The peak rate after the warm-up."""


@dataclass
class Cosine(Schedule):
    """Half a cosine from the peak to the floor at the horizon."""

    floor: float = setting(0.1, "share of the peak rate left at the horizon; 0: left one update behind it", least=0)


@dataclass
class WarmupStableDecay(Schedule):
    """The peak rate, then a linear fall over the last part of the horizon: a run can be extended before it."""

    decay: float = setting(0.2, "share of the horizon over which the rate falls", least=0)
    floor: float = setting(0.0, "share of the peak rate left at the horizon; 0: left one update behind it", least=0)


# ------------------------------------------------------------------ device
@dataclass
class Device:
    """Where the model computes."""

    kind: str = setting(
        "auto",
        "auto (CUDA where there is one), cpu or cuda (one GPU a rank)",
        choices=("auto", "cpu", "cuda"),
    )
    threads: int | None = setting(
        None,
        "CPU threads a rank computes with; null: usable cores // ranks on this host. "
        "Two ranks that both take all cores run 20 times slower",
        least=1,
        most=1024,
    )
    share: bool = setting(
        False, "may several ranks compute on one GPU? They take turns, and many versions of NCCL refuse it themselves"
    )


# ------------------------------------------------------------------ launch and track
@dataclass
class Launch:
    """What is common to every way to start ranks."""

    sweep: str | None = setting(
        None,
        "of train -m: folder of the sweep under runs_dir; null: named after the experiment and what the sweep varies, "
        "so that the same command finds it again",
    )
    parallel: int | None = setting(
        None,
        "points of a sweep at once; null: 1, under launch=slurm all (Slurm has a queue of its own)",
        least=1,
        most=10_000,
    )


@dataclass
class Local(Launch):
    """Here: this process is the run, or a rank of it where a launcher started it; a sweep's points are processes."""


@dataclass
class Horovodrun(Launch):
    """Each run is a horovodrun job of its own, started from here."""

    np: int = setting(2, "ranks of a run", least=1, most=65_536)
    controller: str = setting(
        "gloo", "gloo, or mpi (Open MPI waits by spinning: for more cores than ranks)", choices=("gloo", "mpi")
    )
    hosts: str | None = setting(
        None, "host:slots,host:slots as -H of horovodrun takes them; null: this machine", form=HOSTS
    )
    interface: str | None = setting(
        None, "network interfaces by which the hosts reach each other; null: any", form=INTERFACES
    )
    link: str | None = setting(
        None,
        "rate such as 200mbit or 1gbit: ranks run on hosts of their own in the network lab, joined by links of that "
        "rate (root and iproute2; see hvdllm bench exchange); null: the network as it is",
    )


@dataclass
class Slurm(Launch):
    """Each run is a Slurm job, submitted by sbatch; this process waits for it and tells how it ended."""

    how: str = setting(
        "srun",
        "what starts the ranks inside the job: srun (with PMIx), gloo (srun with Gloo, where there is no PMIx that "
        "fits and no ssh) or horovodrun (needs ssh between nodes)",
        choices=("srun", "gloo", "horovodrun"),
    )
    nodes: int = setting(1, "nodes of a run", least=1, most=65_536)
    ranks_per_node: int = setting(1, "ranks on each node, one a GPU", least=1, most=4096)
    gpus_per_node: int | None = setting(
        None, "GPUs asked for on each node; null: none is asked for", least=1, most=4096
    )
    cpus_per_rank: int | None = setting(None, "cores asked for a rank; null: Slurm's default", least=1, most=65_536)
    time: str | None = setting(None, "limit of a job as sbatch takes it (2:00:00); null: the partition's", form=TIME)
    partition: str | None = setting(None, "partition; null: the cluster's default", form=NAMES)
    account: str | None = setting(None, "account that pays; null: the user's default", form=NAME)
    interface: str | None = setting(None, "network interfaces of the nodes; null: any", form=INTERFACES)
    modules: Any = setting(None, "environment modules that a job loads, a name or a list; null: none", form=MODULE)
    options: Any = setting(None, "further options of sbatch, one or a list (--constraint=a100); null: none")


@dataclass
class NoTracker:
    """The run's folder has all records; nothing else gets them."""


@dataclass
class Wandb:
    """Weights & Biases: all records by tokens, configuration, samples; offline where no server is reached."""

    project: str = setting("hvdllm", "project of the run")
    entity: str | None = setting(None, "user or team; null: the key's own")
    group: str | None = setting(None, "group of the run; null: its sweep")
    tags: Any = setting(None, "a tag or a list of tags; null: none")
    mode: str = setting(
        "auto",
        "auto (online where a server and a key are there within start_s, else offline with a sentence), online "
        "(refused without them) or offline",
        choices=("auto", "online", "offline"),
    )
    start_s: float = setting(
        15.0, "seconds that a server may take at the start before the run goes offline", least=1, most=1e6
    )
    checkpoints: bool = setting(False, "upload each checkpoint as an artifact")


@dataclass
class TensorBoard:
    """TensorBoard's event files in the run's folder, all numbers by tokens."""


# ------------------------------------------------------------------ the whole
@dataclass
class Config:
    """A run. `*_tokens` and `*_every` are counted in tokens committed by all ranks together."""

    name: str | None = setting(None, "folder of the run under runs_dir; null: date-time and four hex digits", ours=True)
    runs_dir: str = setting("runs", "folder that holds the runs; shared by all hosts", ours=True)
    data_dir: str | None = setting(
        None, "folder of prepared token shards; null: hvdllm's folder in the user's cache", ours=True
    )
    seed: int = setting(0, "of weights, order of data, dropout and samples", least=0, most=2**63 - 1)
    resume: str = setting(
        "auto",
        "auto (go on if the run's folder has a checkpoint), never, must, or the path of a run to go on with",
        ours=True,
    )
    init_from: str | None = setting(
        None,
        "run folder, or one of its checkpoints, whose weights this run begins with instead of drawing them: a shared "
        "trunk makes comparisons sharper; null: draw them",
        ours=True,
    )
    init_optimizer: bool = setting(
        False, "also the optimizer's state of init_from, of the same optimizer; the schedule begins anew all the same"
    )
    budget_tokens: int = setting(1_200_000, "tokens to train on; rounded up to whole batches", least=1)
    batch_tokens: int = setting(
        2048,
        "tokens an update (the global batch, whatever the world size); a multiple of model.context",
        least=1,
    )
    micro_batch: int = setting(
        16, "sequences a forward pass; as many as memory holds, has no effect on the result", least=1, most=10_000_000
    )
    eval_every: int = setting(400_000, "tokens between evaluations; 0: never, not even at the end", least=0)
    save_every: int = setting(
        400_000,
        "tokens between checkpoints; 0: never, not even at the end, but still when stopped by Ctrl-C or SIGTERM",
        least=0,
    )
    sample_every: int = setting(400_000, "tokens between samples of text; 0: never, not even at the end", least=0)
    audit_every: int = setting(
        400_000,
        "tokens between audits, which compare the weights of all ranks bit by bit (or say how far apart they are, "
        "where the exchange does not promise equality); 0: never",
        least=0,
    )
    log_every: int = setting(20_000, "tokens between `commit` records; 0: never", least=0)
    keep: int = setting(2, "checkpoints kept; the older ones are deleted", least=1, most=1_000_000)
    eval_tokens: int = setting(65_536, "tokens of an evaluation, always the same first ones; 0: all", least=0)
    target_loss: float | None = setting(
        None,
        "validation loss, in nats a token, to which `hvdllm report` measures the way; named before the runs, so that "
        "no result chooses it; null: the best that all runs reached",
        least=1e-3,
    )
    trace_steps: str | None = setting(
        None, "steps first:last of which trace.json shows compute, flight and blocked time of every rank; null: none"
    )
    sample_prompt: str = setting("def ", "text that a sample continues")
    sample_tokens: int = setting(160, "tokens a sample has", least=1, most=1_000_000)
    precision: str = setting(
        "fp32",
        "fp32 (on GPUs without TF32, which has 10 bits of fp32's 23), bf16 (autocast; weights and sums stay fp32) or "
        "fp64 (for oracles)",
        choices=("fp32", "bf16", "fp64"),
    )
    text: Any = setting(None, "where the text comes from")
    model: Any = setting(None, "the transformer")
    exchange: Any = setting(None, "how the gradients of the ranks meet")
    wire: Any = setting(None, "how a sum travels")
    world: Any = setting(None, "which processes train together", ours=True)
    optim: Any = setting(None, "what a summed gradient does to the weights")
    schedule: Any = setting(None, "the learning rate as a function of tokens")
    device: Any = setting(None, "where the model computes", ours=True)
    launch: Any = setting(None, "what starts the ranks", ours=True)
    track: Any = setting(None, "who else gets the records", ours=True)


# The options of each group, by the name that `group=name` takes where the name chooses the settings' class.
SCHEMAS: dict[str, dict[str, type]] = {
    "text": {"stdlib": Stdlib, "files": Files},
    "model": {"gpt": Model},
    "exchange": {
        "allreduce": AllReduce,
        "sharded": Sharded,
        "delayed": Delayed,
        "acco": Acco,
        "local_sgd": LocalSGD,
        "diloco": DiLoCo,
        "streaming_diloco": StreamingDiLoCo,
        "fedavg": FedAvg,
        "parameter_server": ParameterServer,
        "ddp": Ddp,
        "horovod": Horovod,
    },
    "wire": {
        "fp32": Fp32,
        "fp16": Fp16,
        "bf16": Bf16,
        "int8": Int8,
        "topk": TopK,
        "sign": Sign,
        "powersgd": PowerSGD,
    },
    "world": {"world": World},
    "optim": {"adamw": AdamW, "nadam": NAdam, "sgd": SGD},
    "schedule": {"constant": Constant, "cosine": Cosine, "wsd": WarmupStableDecay},
    "device": {"device": Device},
    "launch": {"local": Local, "horovodrun": Horovodrun, "slurm": Slurm},
    "track": {"none": NoTracker, "wandb": Wandb, "tensorboard": TensorBoard},
}


def name_of(group: str, settings: Any) -> str:
    """allreduce for an AllReduce."""
    return next(name for name, kind in SCHEMAS[group].items() if kind is type(settings))
