"""The parts of a training step, made and joined in one order: the trainer, the benchmarks and the tests use it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from hvdllm import registry
from hvdllm.exchange.base import Exchange, Milestones, Wire
from hvdllm.exchange.wire.build import build as make_wire
from hvdllm.exchange.wire.plain import Plain
from hvdllm.flat import Flat
from hvdllm.models import size
from hvdllm.models.gpt import GPT, compile_blocks, init_weights
from hvdllm.optim.update import Update
from hvdllm.settings import Config
from hvdllm.text.shards import Corpus
from hvdllm.text.stream import Stream
from hvdllm.world.base import World, peers

DTYPES = {"fp32": torch.float32, "bf16": torch.float32, "fp64": torch.float64}


@dataclass(frozen=True)
class Assembly:
    """module: what the loop calls; the others lie behind it."""

    module: nn.Module
    flat: Flat
    update: Update
    wire: Wire
    exchange: Exchange


def assemble(
    config: Config,
    model: nn.Module,
    module: nn.Module,
    world: World,
    factor: Callable[[int], float],
    unlike: bool = False,
) -> Assembly:
    """Collective.

    model: whose parameters are trained.
    module: what is to be called, and calls the model.
    factor: of the peak learning rate, by committed tokens (optim/schedule.py).
    unlike: do the ranks compute on several models of processor?
    """
    exchange = registry.built(registry.of("exchange", config.exchange))(config.exchange, config.batch_tokens)
    exchange.milestones, exchange.unlike = milestones(config), unlike
    flat = Flat(model, world.size, bucket_bytes(config, model), exchange.copies)
    update = Update(config.optim, factor)
    with peers(world):
        wire = build_wire(config, exchange.between(world), flat)
        module = exchange.attach(module, flat, update, wire, world)
    return Assembly(module, flat, update, wire, exchange)


def build_model(config: Config, vocab: int, device: torch.device) -> GPT:
    """vocab: of the tokenizer; the model's is padded. Weights as drawn from the seed."""
    model = GPT(config.model, size.pad_vocab(vocab)).to(DTYPES[config.precision])
    init_weights(model, config.seed)
    model = model.to(device)
    if config.model.compile:
        compile_blocks(model)
    return model


def is_reference(config: Config) -> bool:
    """Does a library of its own move the sums?"""
    return registry.of("exchange", config.exchange).facts.carries in registry.LIBRARIES


def build_wire(config: Config, world: World, flat: Flat) -> Wire:
    """A reference reads of its wire the settings alone."""
    if is_reference(config):
        return Plain(world, config.wire, flat, config.batch_tokens)
    return make_wire(config.wire, world, flat, config.batch_tokens)


def milestones(config: Config) -> Milestones:
    """Every act that is due has a mark; only logs need nobody to stand still."""
    acts = (config.eval_every, config.sample_every, config.save_every, config.audit_every)
    return Milestones(acts, (config.log_every,), config.budget_tokens)


def bucket_bytes(config: Config, model: nn.Module) -> float:
    """Of gradients that travel together; see exchange.bucket_mb."""
    whole = sum(p.nbytes for p in model.parameters())
    chosen = config.exchange.bucket_mb
    if chosen:
        return float(chosen * 2**20)
    if (fragments := getattr(config.exchange, "fragments", 1)) > 1:  # of several buckets each: they come out equal
        return float(min(25 * 2**20, whole / (4 * fragments)))
    return float(min(25 * 2**20, max(2**20, whole / 8)))


def make_stream(config: Config, corpus: Corpus, device: torch.device, world: World) -> Stream:
    """This rank's training batches. Raises UserError where the text has fewer windows than one global batch."""
    return Stream(
        corpus.train, context=config.model.context, batch=config.batch_tokens // config.model.context,
        micro_batch=config.micro_batch, seed=config.seed, rank=world.rank, size=world.size, device=device,
        end=corpus.tokenizer.end,
    )  # fmt: skip
