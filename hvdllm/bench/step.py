"""Compares our step with a plain PyTorch loop of the same model, batch and dtype, in one process.

plain: forward, backward, clip_grad_norm_, torch.optim.AdamW(fused=True) and zero_grad, on batches that are ready.
ours:  the exchange, the update on flat slices, and the stream with its thread: everything of `hvdllm train` but acts.

Blocks of steps alternate (ours, plain, plain, ours, ...), and the ratio of each pair counts. Pairs are added until the
95 % interval of their median is as narrow as asked, or the time is over.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable
from dataclasses import replace

import torch

from hvdllm.bench.paired import Ratio, ratio
from hvdllm.exchange.base import Divisor
from hvdllm.exchange.parts import AllReduce
from hvdllm.exchange.wire.parts import Fp32
from hvdllm.optim.schedule import factor
from hvdllm.plain import Json
from hvdllm.settings import Config
from hvdllm.task.base import Prepared
from hvdllm.trainer.assemble import assemble, build_model, make_stream
from hvdllm.trainer.backward import Loss, autocast, backward
from hvdllm.world.single import SingleWorld

EVERY_S = 5.0


def measure(
    config: Config, data: Prepared, device: torch.device, *, seconds: float, half_width: float,
    say: Callable[[str], None] = lambda text: None,
) -> Json:  # fmt: skip
    """The figures of both sides: tokens a second, milliseconds of the optimizer alone, and the paired ratio.

    Args:
        config: the settings of both sides.
        data: the prepared text.
        device: where both compute.
        seconds: how long it measures at most.
        half_width: half the width of the ratio's 95 % interval at which it ends.
        say: gets a sentence about what is known so far, every EVERY_S seconds.
    """
    say(f"measuring for at most {seconds:.0f} s, in turns of four steps")
    ours, our_update = our_step(config, data, device)
    plain, plain_update = plain_step(config, data, device)
    block = 4
    for _ in range(2):
        timed(ours, block, device)
        timed(plain, block, device)
    pairs: list[tuple[float, float]] = []
    told = time.monotonic()
    end = told + seconds
    found = Ratio(math.nan, math.nan, math.nan, 0)
    while len(pairs) < 6 or (time.monotonic() < end and (len(pairs) < 30 or found.half_width > half_width)):
        if len(pairs) % 2:
            b, a = timed(plain, block, device), timed(ours, block, device)
        else:
            a, b = timed(ours, block, device), timed(plain, block, device)
        pairs.append((a, b))
        if len(pairs) >= 6:
            found = ratio([plain_s / ours_s for ours_s, plain_s in pairs])
        if time.monotonic() > told + EVERY_S:
            told = time.monotonic()
            so_far = f", ours / plain {found.median:.4f} ± {found.half_width:.4f}" if found.pairs else ""
            say(f"{len(pairs)} pairs measured{so_far}; at most {max(0.0, end - told):.0f} s more")
    updates = [(timed(our_update, 10, device), timed(plain_update, 10, device)) for _ in range(20)]
    tokens = config.batch_tokens * block
    middle = [sorted(column)[len(column) // 2] for column in zip(*pairs, strict=True)]
    optimizer = [1e3 * min(column) / 10 for column in zip(*updates, strict=True)]
    return {
        "tokens_per_s": {"ours": tokens / middle[0], "plain": tokens / middle[1]},
        "optimizer_ms": {"ours": optimizer[0], "plain": optimizer[1]},
        "ratio": found.median,
        "ratio_low": found.low,
        "ratio_high": found.high,
        "half_width": found.half_width,
        "pairs": found.pairs,
        "steps_a_block": block,
        "threads": torch.get_num_threads(),
    }


def timed(step: Callable[[], object], times: int, device: torch.device) -> float:
    """The seconds that `times` steps take, with the work of the device."""
    begin = time.perf_counter()
    for _ in range(times):
        step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin


def our_step(config: Config, data: Prepared, device: torch.device) -> tuple[Callable[[], object], Callable[[], object]]:
    """Two functions: one makes a commit, the other makes the update alone."""
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

    def step() -> None:
        while exchange.advance(batch := next(feed), backward(parts.module, batch)) is None:
            pass

    def update_only() -> None:
        parts.update.step(pieces, gradients, Divisor(1.0, 1), lambda sums: sums)
        flat.g.zero_()

    return step, update_only


def plain_step(
    config: Config, data: Prepared, device: torch.device
) -> tuple[Callable[[], object], Callable[[], object]]:
    """Two functions: one makes a step as anybody would write it, the other only clips and steps the optimizer."""
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

    def update_only() -> None:
        torch.nn.utils.clip_grad_norm_(parameters, config.optim.clip or math.inf)
        optimizer.step()

    def step() -> None:
        for batch in next(rounds):
            assert batch.inputs is not None and batch.targets is not None
            with autocast(config.precision, device):
                loss = data.task.loss(model, batch.inputs, batch.targets) / config.batch_tokens
            loss.backward()
        update_only()
        optimizer.zero_grad()

    def update_kept() -> None:
        for p in parameters:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        update_only()

    return step, update_kept
