"""Compares our step with another loop of the same model, batch and dtype, in one process.

ours:  the exchange, the update on flat slices, and the stream with its thread: everything of `hvdllm train` but acts.
plain: forward, backward, clip_grad_norm_, torch.optim.AdamW(fused=True) and zero_grad, on batches that are ready.
hf:    the Trainer of the library transformers, with its data loader (bench/trainer.py).

All train at a constant rate from equal weights on equal batches, so the losses of their first steps must agree.
Otherwise nothing is measured. Then blocks of steps alternate (ours, theirs, theirs, ours, ...), and the ratio of each
pair counts. Pairs are added until the 95 % interval of their median is as narrow as asked, or the time is over.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable
from dataclasses import replace

import torch

from hvdllm.bench import trainer
from hvdllm.bench.paired import Ratio, ratio
from hvdllm.bench.side import Side
from hvdllm.errors import RunError
from hvdllm.exchange.base import Divisor
from hvdllm.exchange.parts import AllReduce
from hvdllm.exchange.wire.parts import Fp32
from hvdllm.optim.parts import Constant
from hvdllm.optim.schedule import factor
from hvdllm.plain import Json
from hvdllm.settings import Config
from hvdllm.task.base import Prepared
from hvdllm.trainer.assemble import assemble, build_model, make_stream
from hvdllm.trainer.backward import Loss, autocast, backward
from hvdllm.world.single import SingleWorld

EVERY_S = 5.0
BLOCK = 4  # steps of a turn
NEAR = {"fp64": 1e-9, "fp32": 1e-4, "bf16": 2e-2}  # how far losses of the first steps may differ, relative to them


def measure(
    config: Config, data: Prepared, device: torch.device, *, against: str, seconds: float, half_width: float,
    say: Callable[[str], None] = lambda text: None,
) -> Json:  # fmt: skip
    """The figures of both sides: tokens a second, milliseconds of the optimizer alone, and the paired ratio.

    Args:
        config: the settings of both sides.
        data: the prepared text.
        device: where both compute.
        against: the other side, plain or hf.
        seconds: how long it measures at most.
        half_width: half the width of the ratio's 95 % interval at which it ends.
        say: gets a sentence about what is known so far, every EVERY_S seconds.

    Raises UserError if the other side has no such model or no such batches, and RunError if the losses differ.
    """
    config = replace(config, schedule=Constant(warmup=0.0))
    other = {"plain": plain_side, "hf": trainer.side}[against](config, data, device)
    try:
        ours = our_side(config, data, device)
        first = check_losses(ours, other, against, NEAR[config.precision])
        say(f"the losses of {len(first)} steps agree; measuring for at most {seconds:.0f} s, in turns of {BLOCK} steps")
        return figures(config, ours, other, against, device, seconds=seconds, half_width=half_width, say=say) | {
            "first_losses": first
        }
    finally:
        other.close()


def check_losses(ours: Side, other: Side, against: str, near: float) -> list[list[float]]:
    """Makes two turns of each side. Returns their losses, a pair a step. Raises RunError if they differ."""
    sides = [[loss for _ in range(2) for loss in side.steps(BLOCK)] for side in (ours, other)]
    pairs = [[float(a), float(b)] for a, b in zip(*sides, strict=True)]
    for step, (a, b) in enumerate(pairs, 1):
        if not abs(a - b) <= near * abs(a):
            raise RunError(
                f"the loss of step {step} is {a:.6f} with ours and {b:.6f} with --against {against}, so they do not "
                "compute the same, and nothing is measured: please report this"
            )
    return pairs


def figures(
    config: Config, ours: Side, other: Side, against: str, device: torch.device, *, seconds: float, half_width: float,
    say: Callable[[str], None],
) -> Json:  # fmt: skip
    """Measures the two sides, whose losses agree. See `measure`."""
    pairs: list[tuple[float, float]] = []
    told = time.monotonic()
    end = told + seconds
    found = Ratio(math.nan, math.nan, math.nan, 0)
    while len(pairs) < 6 or (time.monotonic() < end and (len(pairs) < 30 or found.half_width > half_width)):
        if len(pairs) % 2:
            b, a = timed(lambda: other.steps(BLOCK), device), timed(lambda: ours.steps(BLOCK), device)
        else:
            a, b = timed(lambda: ours.steps(BLOCK), device), timed(lambda: other.steps(BLOCK), device)
        pairs.append((a, b))
        if len(pairs) >= 6:
            found = ratio([other_s / ours_s for ours_s, other_s in pairs])
        if time.monotonic() > told + EVERY_S:
            told = time.monotonic()
            so_far = f", ours / {against} {found.median:.4f} ± {found.half_width:.4f}" if found.pairs else ""
            say(f"{len(pairs)} pairs measured{so_far}; at most {max(0.0, end - told):.0f} s more")
    updates = [(timed(ours.update, device, 10), timed(other.update, device, 10)) for _ in range(20)]
    tokens = config.batch_tokens * BLOCK
    middle = [sorted(column)[len(column) // 2] for column in zip(*pairs, strict=True)]
    optimizer = [1e3 * min(column) / 10 for column in zip(*updates, strict=True)]
    return {
        "against": against,
        "tokens_per_s": {"ours": tokens / middle[0], against: tokens / middle[1]},
        "optimizer_ms": {"ours": optimizer[0], against: optimizer[1]},
        "ratio": found.median,
        "ratio_low": found.low,
        "ratio_high": found.high,
        "half_width": found.half_width,
        "pairs": found.pairs,
        "steps_a_block": BLOCK,
        "threads": torch.get_num_threads(),
    }


def timed(work: Callable[[], object], device: torch.device, times: int = 1) -> float:
    """The seconds that it takes to do something so many times, with the work of the device."""
    begin = time.perf_counter()
    for _ in range(times):
        work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin


def our_side(config: Config, data: Prepared, device: torch.device) -> Side:
    """The parts of `hvdllm train` on one rank."""
    world = SingleWorld()
    config = replace(config, exchange=AllReduce(bucket_mb=config.exchange.bucket_mb), wire=Fp32())
    model = build_model(data.task, device)
    loss = Loss(
        data.task, model, precision=config.precision, device=device, seed=0, rank=0, dropout=config.model.dropout > 0
    )
    parts = assemble(config, model, loss, world, factor(config.schedule, config.budget_tokens))
    exchange, flat = parts.exchange, parts.flat
    pieces, gradients = ([vector[span.start : span.stop] for span in flat.pieces(0, 1)] for vector in (flat.x, flat.g))
    feed = exchange.feed(make_stream(config, data.train, device, world))

    def step() -> torch.Tensor:
        losses, commit = [], None
        while commit is None:
            batch = next(feed)
            losses.append(backward(parts.module, batch))
            commit = exchange.advance(batch, losses[-1])
        return torch.stack(losses).sum() / config.batch_tokens

    def update() -> None:
        parts.update.step(pieces, gradients, Divisor(1.0, 1), lambda sums: sums)
        flat.g.zero_()

    return Side(lambda count: [step() for _ in range(count)], update)


def plain_side(config: Config, data: Prepared, device: torch.device) -> Side:
    """A step as anybody would write it."""
    model = build_model(data.task, device)
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.optim.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    betas = (config.optim.beta1, config.optim.beta2)
    optimizer = torch.optim.AdamW(groups, lr=config.optim.lr, betas=betas, eps=config.optim.eps, fused=True)
    stream = make_stream(config, data.train, device, SingleWorld())
    rounds = itertools.cycle([stream.share(t) for t in range(min(64, len(stream.items) // stream.batch))])

    def clip_and_step() -> None:
        torch.nn.utils.clip_grad_norm_(parameters, config.optim.clip or math.inf)
        optimizer.step()

    def step() -> torch.Tensor:
        losses = []
        for batch in next(rounds):
            with autocast(config.precision, device):
                loss = data.task.loss(model, batch.inputs, batch.targets) / config.batch_tokens
            loss.backward()
            losses.append(loss.detach())
        clip_and_step()
        optimizer.zero_grad()
        return torch.stack(losses).sum()

    def update() -> None:
        for p in parameters:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        clip_and_step()

    return Side(lambda count: [step() for _ in range(count)], update)
