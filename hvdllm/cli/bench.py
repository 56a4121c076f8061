"""`hvdllm bench step|start`: measurements, as a table and as JSON."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from hvdllm.errors import UserError


def run(argv: list[str]) -> int:
    parser = argparse.ArgumentParser("hvdllm bench", description="Measures, prints a table, writes JSON.")
    which = parser.add_subparsers(dest="what", required=True, metavar="step|start")
    step = which.add_parser("step", help="our step against a plain PyTorch loop, in one process")
    step.add_argument("settings", nargs="*", help="settings as for train: model=tiny batch_tokens=4096")
    step.add_argument("--seconds", type=float, default=300.0, help="at most this long (300)")
    step.add_argument("--half-width", type=float, default=0.01, help="of the ratio's 95%% interval to reach (0.01)")
    start = which.add_parser("start", help="seconds to the first step and to a short run's end, under horovodrun")
    start.add_argument("--ranks", type=int, default=2)
    start.add_argument("--tokens", type=int, default=200_000)
    for sub in (step, start):
        sub.add_argument("--json", type=Path, help="where to write the figures (bench-step.json, bench-start.json)")
    given = parser.parse_args(argv)
    figures = bench_step(given) if given.what == "step" else bench_start(given)
    out = given.json or Path(f"bench-{given.what}.json")
    try:
        out.write_text(json.dumps(figures, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"{out} cannot be written ({error.strerror}): name another file with --json") from None
    print(f"written to {out}")
    return 0


def bench_step(given: argparse.Namespace) -> dict[str, Any]:
    from hvdllm import device as devices
    from hvdllm.bench import step
    from hvdllm.cli.train import set_threads
    from hvdllm.config.check import check
    from hvdllm.config.compose import compose
    from hvdllm.config.schema import AdamW
    from hvdllm.text import shards
    from hvdllm.trainer.account import versions
    from hvdllm.world.detect import Place

    config = compose(given.settings)
    check(config, Place())
    if not isinstance(config.optim, AdamW):
        raise UserError("bench step compares with torch.optim.AdamW: leave optim at adamw")
    set_threads(config, Place())
    device = devices.choose(config.device.kind, 0)
    corpus = shards.prepare(config.text, shards.data_folder(config.data_dir), say=print)
    figures = step.measure(config, corpus, device, seconds=given.seconds, half_width=given.half_width)
    rate, optimizer = figures["tokens_per_s"], figures["optimizer_ms"]
    table(
        ("", "ours", "plain PyTorch"),
        ("tokens a second", f"{rate['ours']:,.0f}", f"{rate['plain']:,.0f}"),
        ("clip and optimizer, ms", f"{optimizer['ours']:.3f}", f"{optimizer['plain']:.3f}"),
    )
    print(
        f"ours / plain: {figures['ratio']:.4f}, 95% interval {figures['ratio_low']:.4f} to {figures['ratio_high']:.4f} "
        f"(half-width {figures['half_width']:.4f}, {figures['pairs']} interleaved pairs, {figures['threads']} threads)"
    )
    return figures | {"device": devices.name(device), "versions": versions(), "settings": given.settings}


def bench_start(given: argparse.Namespace) -> dict[str, Any]:
    from hvdllm.bench import start

    figures = start.measure(given.ranks, given.tokens)
    table(
        (f"{given.ranks} ranks, horovodrun --gloo, model=tiny", "seconds"),
        ("from the command to the first step", f"{figures['first_step_s']:.1f}"),
        (f"{given.tokens:,} tokens, text prepared anew", f"{figures['whole_s']:.1f}"),
    )
    return figures


def table(*rows: tuple[str, ...]) -> None:
    from rich.console import Console
    from rich.table import Table

    grid = Table(box=None, padding=(0, 3, 0, 0))
    for i, title in enumerate(rows[0]):
        grid.add_column(title, justify="left" if i == 0 else "right")
    for row in rows[1:]:
        grid.add_row(*row)
    Console(highlight=False).print(grid)
