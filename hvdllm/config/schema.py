"""Every setting of hvdllm: its type, its default, its unit and why the default is what it is.

One dataclass a group; where a group has options with settings of their own (an exchange, an
optimizer), one dataclass an option. conf/ chooses among them and gives presets. `hvdllm train --help`
prints what stands here. What involves two settings, or the machine, is checked in check.py.

Types are what OmegaConf 2.3 can hold: it knows no Literal and no Union, so a choice is a string with
`choices` beside it (checked by compose.py), and a path that may be one or several is Any.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


def setting(default: Any, doc: str, *, choices: tuple[str, ...] = (), least: float | None = None) -> Any:
    """A field with what --help says of it, and what alone can be checked of it: its choices, its least value."""
    return field(default=default, metadata={"doc": doc, "choices": choices, "least": least})


# ------------------------------------------------------------------ text
@dataclass
class Text:
    """What is common to every source of text."""

    tokenizer: str = setting(
        "bpe",
        "bytes (257 tokens), bpe (byte-level, trained on this corpus) or the path of a tokenizer.json; "
        "bpe, because a small model gets further on 3 bytes a token than on one",
    )
    vocab: int = setting(2048, "tokens; asked of tokenizer=bpe, the corpus may yield fewer", least=258)
    validation: Any = setting(
        None, "path, list or glob of the validation text; null: documents chosen by a hash of their content"
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

    path: Any = setting(None, "file, folder or glob, or a list of them; folders are walked in sorted order")
    column: str = setting("text", "name of the field that holds the text of a .jsonl line")


# ------------------------------------------------------------------ model
@dataclass
class Model:
    """A decoder-only transformer: GPT-2 or Llama by its settings. The presets in conf/model set them."""

    layers: int = setting(4, "blocks of attention and MLP, one after the other", least=1)
    width: int = setting(128, "features of the residual stream (d_model)", least=1)
    heads: int = setting(4, "attention heads; a divisor of the width", least=1)
    kv_heads: int | None = setting(None, "heads of keys and values (grouped-query attention); null: as heads", least=1)
    mlp_width: int | None = setting(None, "hidden features of the MLP; null: 4 x width")
    context: int = setting(128, "tokens a sequence (window) has", least=1)
    positions: str = setting(
        "learned", "how a token knows its place: learned (GPT-2) or rope (Llama)", choices=("learned", "rope")
    )
    norm: str = setting("layernorm", "layernorm (GPT-2) or rmsnorm (Llama)", choices=("layernorm", "rmsnorm"))
    norm_eps: float = setting(1e-5, "added to the variance before its root")
    mlp: str = setting("gelu", "gelu (GPT-2, tanh form) or swiglu (Llama)", choices=("gelu", "swiglu"))
    bias: bool = setting(True, "biases in linear layers and LayerNorm; true in GPT-2, false in Llama")
    tied: bool = setting(True, "the output layer shares the embedding's weights; spares vocabulary x width")
    rope_theta: float = setting(10000.0, "base of the rotary frequencies; read where positions=rope")
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
class AllReduce:
    """Synchronous: every update waits for the sum of all ranks' gradients. Replicas stay identical."""

    bucket_mb: float = setting(
        25.0,
        "MiB of gradients that travel together; smaller starts earlier, larger has less overhead",
        least=0.001,
    )


# ------------------------------------------------------------------ world
@dataclass
class World:
    """Which processes train together, and how they talk."""

    kind: str = setting(
        "auto",
        "auto (what started us decides), single (this process alone) or horovod (needs a launcher)",
        choices=("auto", "single", "horovod"),
    )
    timeout_s: float = setting(
        1800.0,
        "seconds a rank waits for the others before it gives up with a sentence; longer than any act",
        least=1,
    )


# ------------------------------------------------------------------ optim and schedule
@dataclass
class AdamW:
    """Adam with decoupled weight decay (Loshchilov and Hutter, 2019). Decays matrices and embeddings only."""

    lr: float = setting(3e-3, "peak learning rate; small models take more than large ones", least=0)
    beta1: float = setting(0.9, "decay of the mean of gradients, a step", least=0)
    beta2: float = setting(
        0.95, "decay of the mean of squared gradients, a step; .95 as usual for language models", least=0
    )
    eps: float = setting(1e-8, "added to the root of the second moment", least=0)
    weight_decay: float = setting(0.1, "decay a step, times the learning rate", least=0)
    clip: float = setting(1.0, "largest global gradient norm; 0: no clipping", least=0)


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

    floor: float = setting(0.1, "share of the peak rate left at the horizon", least=0)


@dataclass
class WarmupStableDecay(Schedule):
    """The peak rate, then a linear fall over the last part of the horizon: a run can be extended before it."""

    decay: float = setting(0.2, "share of the horizon over which the rate falls", least=0)
    floor: float = setting(0.0, "share of the peak rate left at the horizon", least=0)


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
    )


# ------------------------------------------------------------------ the whole
@dataclass
class Config:
    """A run. `*_tokens` and `*_every` are counted in tokens committed by all ranks together."""

    name: str | None = setting(None, "folder of the run under runs_dir; null: date-time and four hex digits")
    runs_dir: str = setting("runs", "folder that holds the runs; shared by all hosts")
    data_dir: str | None = setting(None, "folder of prepared token shards; null: hvdllm's folder in the user's cache")
    seed: int = setting(0, "of weights, order of data, dropout and samples", least=0)
    resume: str = setting(
        "auto",
        "auto (go on if the run's folder has a checkpoint), never, must, or the path of a run to go on with",
    )
    budget_tokens: int = setting(1_200_000, "tokens to train on; rounded up to whole batches", least=1)
    batch_tokens: int = setting(
        2048,
        "tokens an update (the global batch, whatever the world size); a multiple of model.context",
        least=1,
    )
    micro_batch: int = setting(
        16, "sequences a forward pass; as many as memory holds, has no effect on the result", least=1
    )
    eval_every: int = setting(400_000, "tokens between evaluations; 0: never, not even at the end", least=0)
    save_every: int = setting(
        400_000,
        "tokens between checkpoints; 0: never, not even at the end, but still when stopped by Ctrl-C or SIGTERM",
        least=0,
    )
    sample_every: int = setting(400_000, "tokens between samples of text; 0: never, not even at the end", least=0)
    log_every: int = setting(20_000, "tokens between `commit` records; 0: never", least=0)
    keep: int = setting(2, "checkpoints kept; the older ones are deleted", least=1)
    eval_tokens: int = setting(65_536, "tokens of an evaluation, always the same first ones; 0: all", least=0)
    sample_prompt: str = setting("def ", "text that a sample continues")
    sample_tokens: int = setting(160, "tokens a sample has", least=1)
    precision: str = setting(
        "fp32",
        "fp32, bf16 (autocast; weights and sums stay fp32) or fp64 (for oracles)",
        choices=("fp32", "bf16", "fp64"),
    )
    text: Any = setting(None, "where the text comes from")
    model: Any = setting(None, "the transformer")
    exchange: Any = setting(None, "how the gradients of the ranks meet")
    world: Any = setting(None, "which processes train together")
    optim: Any = setting(None, "what a summed gradient does to the weights")
    schedule: Any = setting(None, "the learning rate as a function of tokens")
    device: Any = setting(None, "where the model computes")


# The options of each group, by the name that `group=name` takes where the name chooses the settings' class.
SCHEMAS: dict[str, dict[str, type]] = {
    "text": {"stdlib": Stdlib, "files": Files},
    "model": {"gpt": Model},
    "exchange": {"allreduce": AllReduce},
    "world": {"world": World},
    "optim": {"adamw": AdamW, "sgd": SGD},
    "schedule": {"constant": Constant, "cosine": Cosine, "wsd": WarmupStableDecay},
    "device": {"device": Device},
}
