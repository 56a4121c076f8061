"""`hvdllm bench step|start|exchange|prepare`: measures, and shows the figures as a table and as JSON."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from hvdllm import registry, screen
from hvdllm.errors import RunError, UserError
from hvdllm.paths import argument
from hvdllm.plain import Json

LAB = """examples:
  hvdllm bench exchange --link 200mbit --exchanges allreduce,delayed,acco+exchange.timed=true
  hvdllm bench exchange --ranks 4 --hosts 2 --wires fp32,int8 --plot wires.png
  hvdllm bench exchange --exchanges allreduce --worlds horovod,torch model=gpt2 batch_tokens=8192 micro_batch=1

settings are those of train, for all cases alike; without model=... a model of 2.5 M parameters whose computation takes
about as long as its gradients at 200mbit. What a column means: hvdllm/bench/figures.py."""


AGAINST = {"plain": "plain PyTorch", "hf": "transformers' Trainer"}  # what bench step compares with

ALL = "allreduce,sharded,delayed,acco,ddp,horovod"


# The exchanges that are measured with --slow: one that waits for the slowest rank, and those that need not.
UNEVEN = "allreduce,acco+exchange.timed=true,local_sgd,parameter_server+exchange.staleness=null"


def run(argv: list[str]) -> int:
    """Runs the command, and returns its exit code. Raises UserError."""
    if argv[:1] == ["rank"]:  # this process was started by bench exchange
        return bench_rank(argv[1:])
    given = parsed(argv)
    measures = {"step": bench_step, "start": bench_start, "exchange": bench_exchange, "prepare": bench_prepare}
    figures = measures[given.what](given)
    out = given.json or Path(f"bench-{given.what}.json")
    try:
        out.write_text(json.dumps(figures, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"{out} cannot be written ({error.strerror}): name another file with --json") from None
    print(f"written to {out}")
    return int(any(case["failed"] for case in figures.get("cases", {}).values()))


def parsed(argv: list[str]) -> argparse.Namespace:
    """The words of the command line. Settings may stand on both sides of the flags, of which argparse takes one group.

    Raises SystemExit, as argparse does, where they cannot be understood.
    """
    parser = argparse.ArgumentParser("hvdllm bench", description="Measures, prints a table, writes JSON.")
    which = parser.add_subparsers(dest="what", required=True, metavar="step|start|exchange|prepare")
    step = which.add_parser("step", help="our step against a plain PyTorch loop, or transformers', in one process")
    step.add_argument("settings", nargs="*", help="settings as for train: model=tiny batch_tokens=4096")
    step.add_argument(
        "--against", choices=AGAINST, default="plain",
        help="plain: as anybody would write it (default); hf: transformers' Trainer, on equal weights and batches",
    )  # fmt: skip
    step.add_argument("--seconds", type=float, default=300.0, help="at most this long (300)")
    step.add_argument("--half-width", type=float, default=0.01, help="of the ratio's 95%% interval to reach (0.01)")
    start = which.add_parser("start", help="seconds to the first step and to a short run's end, under horovodrun")
    start.add_argument("--ranks", type=int, default=2)
    start.add_argument("--tokens", type=int, default=200_000)
    exchange = which.add_parser(
        "exchange", help="exchanges over a link of known speed, between hosts that are network namespaces",
        epilog=LAB, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    exchange.add_argument("settings", nargs="*", help="settings as for train, for all cases alike")
    exchange.add_argument("--link", default="200mbit", help="200mbit, 1gbit, ...; none: the loopback (200mbit)")
    exchange.add_argument("--ranks", type=int, default=2)
    exchange.add_argument("--hosts", type=int, help="2 to 8 (as many as ranks, at most 8)")
    exchange.add_argument(
        "--exchanges",
        help=f"with commas between; settings after a plus each ({ALL}; with --slow {UNEVEN})",
    )
    exchange.add_argument("--model", help="of conf/model, as model=NAME does (a small one of the bench's own)")
    exchange.add_argument("--wires", default="", help="with commas between (as configured)")
    exchange.add_argument("--worlds", default="", help="horovod,torch (as configured)")
    exchange.add_argument(
        "--slow", help="ranks slowed as world.slow does, 1:4 or 1:4,3:2: what of the ranks' speeds does each keep?"
    )
    exchange.add_argument("--steps", type=int, default=10, help="measured steps a repetition (10)")
    exchange.add_argument("--warmup", type=int, default=3, help="commits before them that do not count (3)")
    exchange.add_argument("--repetitions", type=int, default=3, help="of each case, interleaved (3)")
    exchange.add_argument("--limit", type=float, default=900.0, help="seconds that a repetition may take (900)")
    exchange.add_argument("--plot", type=argument, help="a picture of the steps (.png, .svg, .pdf)")
    exchange.add_argument("--keep", action="store_true", help="leave run folders and logs where they are")
    prepare = which.add_parser("prepare", help="MB/s at which a text is prepared, beside those of `tokenizers` alone")
    prepare.add_argument("--mb", type=int, default=1000, help="size of the text, which is made for it (1000)")
    for sub in (step, start, exchange, prepare):
        sub.add_argument("--json", type=argument, help="where to write the figures (bench-<what>.json)")
    given, rest = parser.parse_known_args(argv)
    if odd := [word for word in rest if word.startswith("-") or "=" not in word or "settings" not in given]:
        parser.error(f"unrecognized arguments: {' '.join(odd)}")
    if rest:
        given.settings = [*given.settings, *rest]
    return given


def bench_step(given: argparse.Namespace) -> Json:
    """Compares a training step with another loop's, prints a table, and returns the figures."""
    from hvdllm import device as devices
    from hvdllm.bench import step, trainer
    from hvdllm.cli.train import set_threads
    from hvdllm.config.check import check
    from hvdllm.config.compose import compose
    from hvdllm.task.base import Kind
    from hvdllm.trainer.account import versions
    from hvdllm.world.detect import Place

    config = compose(given.settings)
    check(config, Place())
    if registry.name_of("optim", config.optim) != "adamw":
        raise UserError("bench step compares with torch.optim.AdamW: leave optim at adamw")
    if given.against == "hf":
        trainer.refuse(config)
    set_threads(config, Place())
    device = devices.choose(config.device.kind, 0)
    kind: Kind = registry.built(registry.of("task", config.task))
    data = kind.prepare(config, say=print, whole=True, wanted=None)
    figures = step.measure(
        config, data, device, against=given.against, seconds=given.seconds, half_width=given.half_width,
        say=lambda text: print(text, file=sys.stderr, flush=True),
    )  # fmt: skip
    rate, optimizer = figures["tokens_per_s"], figures["optimizer_ms"]
    table(
        ("", "ours", AGAINST[given.against]),
        (f"{data.task.unit} a second", f"{rate['ours']:,.0f}", f"{rate[given.against]:,.0f}"),
        ("clip and optimizer, ms", f"{optimizer['ours']:.3f}", f"{optimizer[given.against]:.3f}"),
    )
    print(
        f"ours / {given.against}: {figures['ratio']:.4f}, "
        f"95% interval {figures['ratio_low']:.4f} to {figures['ratio_high']:.4f} "
        f"(half-width {figures['half_width']:.4f}, {figures['pairs']} interleaved pairs, {figures['threads']} threads)"
    )
    return figures | {"device": devices.name(device), "versions": versions(), "settings": given.settings}


def bench_start(given: argparse.Namespace) -> Json:
    """Measures how long a run takes to start, prints a table, and returns the figures."""
    from hvdllm.bench import start

    figures = start.measure(given.ranks, given.tokens)
    table(
        (f"{given.ranks} ranks, horovodrun --gloo, model=tiny", "seconds"),
        ("from the command to the first step", f"{figures['first_step_s']:.1f}"),
        (f"{given.tokens:,} tokens, text prepared anew", f"{figures['whole_s']:.1f}"),
    )
    return figures


def bench_prepare(given: argparse.Namespace) -> Json:
    """Measures how fast a text is prepared, prints a table, and returns the figures."""
    from hvdllm.bench import prepare
    from hvdllm.trainer.account import versions

    if given.mb < 1:
        raise UserError(f"--mb {given.mb} is too small: give at least 1")
    figures = prepare.measure(given.mb)
    speeds, found = figures["shares_mb_per_s"], figures["ratio"]
    table(
        (f"{figures['megabytes']:,.0f} MB of text, {figures['cores']} cores", "MB a second"),
        ("bpe, trained", f"{figures['train_mb_per_s']:.2f}"),
        ("encoded and written", f"{figures['encode_mb_per_s']:.2f}"),
        ("the same, a sixth at a time (median)", f"{statistics.median(speeds['ours']):.2f}"),
        ("tokenizers alone, a sixth at a time", f"{statistics.median(speeds['tokenizers']):.2f}"),
    )
    print(
        f"ours / tokenizers alone: {found['median']:.3f}, 95% interval {found['low']:.3f} to {found['high']:.3f} "
        f"({found['pairs']} interleaved pairs); peak memory of all processes {figures['peak_mib']:,.0f} MiB"
    )
    return figures | {"versions": versions()}


def bench_exchange(given: argparse.Namespace) -> Json:
    """Measures exchanges in the network lab or over the loopback, prints tables, and returns the figures."""
    from hvdllm.bench import exchange, plot
    from hvdllm.launch import lab

    given.settings += [f"model={given.model}"] * (given.model is not None)
    asked = ask(given)
    if given.plot:
        plot.check(given.plot)
    if given.link != "none" and asked.link is None:
        print(f"{lab.missing()}, so the ranks talk over the loopback, whose speed is the machine's: --link is left out")
    elif asked.link is None:
        print("the ranks talk over the loopback of this machine: there is no link whose speed would be known")
    try:
        figures = exchange.measure(asked, lambda text: print(text, flush=True), given.keep)
    except KeyboardInterrupt:
        raise RunError("ended by a signal: the ranks and the hosts that this bench made are gone") from None
    for rows in exchange_tables(figures):
        if rows[1:]:
            print()
            table(*rows)
    print("\nbound: the larger of compute alone and communication, for as many tokens; medians, see bench/figures.py")
    if busy := exchange.busy(figures):
        print(busy)
    for label, case in figures["cases"].items():
        for what in ("refused", "failed"):
            if case[what]:
                print(f"\n{label} {what}: {case[what]}")
    if given.plot:
        plot.draw(figures, given.plot)
        print(f"\ndrawn to {given.plot}")
    print()
    return figures


def ask(given: argparse.Namespace) -> Any:
    """The request of `bench exchange`, checked. Raises UserError if it cannot work."""
    from hvdllm.bench.exchange import Asked
    from hvdllm.config.pace import bits_per_second, slowed
    from hvdllm.config.words import split
    from hvdllm.launch import lab

    link = None if given.link == "none" or lab.missing() else given.link
    if given.link != "none":
        bits_per_second(given.link)
    hosts = given.hosts if given.hosts is not None else min(given.ranks, lab.MOST_HOSTS)
    for flag, value, least in (
        ("--ranks", given.ranks, 2), ("--steps", given.steps, 1), ("--warmup", given.warmup, 1),
        ("--repetitions", given.repetitions, 1),
    ):  # fmt: skip
        if value < least:
            raise UserError(f"{flag} {value} is too small: give at least {least}")
    if not 2 <= hosts <= lab.MOST_HOSTS or hosts > given.ranks:
        raise UserError(
            f"--hosts {hosts}: give 2 to {lab.MOST_HOSTS}, and no more than there are ranks ({given.ranks})"
        )
    if given.exchanges is None:
        given.exchanges = UNEVEN if given.slow else ALL
    exchanges, wires, worlds = (
        tuple(filter(None, split(text))) for text in (given.exchanges, given.wires, given.worlds)
    )
    slowed(given.slow, given.ranks)
    if not exchanges:
        raise UserError("--exchanges is empty: name one, allreduce for example")
    if odd := set(worlds) - {"horovod", "torch"}:
        raise UserError(f"--worlds {odd.pop()}: real ranks talk through horovod or torch")
    return Asked(
        link, given.ranks, hosts, exchanges, wires, worlds, settings=tuple(given.settings), steps=given.steps,
        warmup=given.warmup,
        repetitions=given.repetitions, limit_s=given.limit, slow=given.slow,
    )  # fmt: skip


def exchange_tables(figures: Json) -> list[list[tuple[str, ...]]]:
    """The tables of times, traffic and learning. The last two have only the cases in which ranks exchange something."""
    found = {label: case["figures"] for label, case in figures["cases"].items() if "figures" in case}
    joined = {label: f for label, f in found.items() if figures["cases"][label]["kind"] == "together"}

    def cell(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    titles = ("", "step, ms", "compute", "blocked", "flight", "hidden", "step / bound", "a batch, ms")
    times: list[tuple[str, ...]] = [titles]
    for label, f in found.items():
        apart = figures["cases"][label]["kind"] != "together"
        columns = [f[f"{name}_ms"] for name in ("step", "compute", "blocked", "flight")]
        cells = [cell(None if apart and k > 1 else value, ".0f") for k, value in enumerate(columns)]
        a_batch = "-" if apart else cell(f["batch_ms"], ".0f")
        times.append((label, *cells, cell(f["hidden"], ".0%"), cell(f["bound"], ".3f"), a_batch))
    traffic: list[tuple[str, ...]] = [
        ("MB a rank and step", "counted", "on the wire", "ratio", "a sum alone: ms", "MB a rank")
    ]
    learning: list[tuple[str, ...]] = [("", "loss", "updates", "tokens an update", "tokens a second")]
    for label, f in joined.items():
        counted = [cell(f[name], ".3f") for name in ("sent_mb", "wire_mb", "wire_ratio")]
        traffic.append((label, *counted, cell(f["sum_ms"], ".0f"), cell(f["sum_mb"], ".3f")))
        counts = (f"{f['updates']:g}", f"{f['tokens_per_update']:,.0f}", f"{f['tokens_per_s']:,.0f}")
        learning.append((label, f"{f['loss']:.4f}", *counts))
    return [times, traffic, learning, *uneven_tables(figures, joined)]


def uneven_tables(figures: Json, joined: Json) -> list[list[tuple[str, ...]]]:
    """The tables for --slow: the speeds of the ranks alone, and how much of their sum each exchange keeps."""
    from hvdllm.bench.exchange import ALONE, SLOWED

    speeds = figures.get("rank_tokens_per_s", {})
    if SLOWED not in speeds:
        return []
    ranks = range(len(speeds[SLOWED]))
    alone: list[tuple[str, ...]] = [("tokens a second alone", *(f"rank {rank}" for rank in ranks), "sum")]
    for label in (ALONE, SLOWED):
        own = speeds.get(label, [])
        alone += [(label, *(f"{speed:,.0f}" for speed in own), f"{sum(own):,.0f}")] * bool(own)
    whole = sum(speeds[SLOWED])
    allowed = len(ranks) * min(speeds[SLOWED])
    kept: list[tuple[str, ...]] = [("", "tokens a second", "of the sum of the ranks' speeds")]
    kept.append(("what the slowest allows, in equal shares", f"{allowed:,.0f}", f"{allowed / whole:.0%}"))
    kept += [(label, f"{f['tokens_per_s']:,.0f}", f"{f['kept']:.0%}") for label, f in joined.items()]
    return [alone, kept]


def bench_rank(argv: list[str]) -> int:
    """Runs one rank of bench exchange, and returns its exit code.

    Args:
        argv: the path of the specification; for a process that trains alone also its index.
    """
    from hvdllm.bench import rank
    from hvdllm.cli.train import open_world, set_threads
    from hvdllm.config.check import check
    from hvdllm.config.compose import compose
    from hvdllm.config.words import of
    from hvdllm.world import signals
    from hvdllm.world.detect import Place, place
    from hvdllm.world.single import SingleWorld

    spec, here = json.loads(Path(argv[0]).read_text()), place()
    index = int(argv[1]) if argv[1:] else here.rank
    folder, together = Path(spec["folder"]), spec["kind"] == "together"
    words = [
        *spec["words"],
        *([f"world.slow=0:{factor}"] if (factor := spec.get("slow", {}).get(str(index))) else []),
        of("runs_dir", f"{folder}/runs"),
        f"name=run-{0 if together else index}",
        "resume=never",
    ]
    trains = here if together else Place()
    try:
        config = compose(words)
        check(config, trains)
        set_threads(config, here)
        world = open_world(config, here)
        signals.watch_launcher(world.asks)
        own: Any = world if together else SingleWorld()
        rank.run(config, words, trains, own, spec["interface"], folder, index)
    except UserError as error:
        (folder / f"refused-{index}.txt").write_text(str(error))
        raise
    world.close()
    return 0


def table(*rows: tuple[str, ...]) -> None:
    """Prints a table. The first row has the titles of the columns."""
    from rich.table import Table

    grid = Table(box=None, padding=(0, 3, 0, 0))
    for i, title in enumerate(rows[0]):
        grid.add_column(title, justify="left" if i == 0 else "right")
    for row in rows[1:]:
        grid.add_row(*row)
    # Without a terminal rich would fold lines at 80 characters, although a file takes longer ones.
    screen.console(highlight=False, width=None if sys.stdout.isatty() else 120).print(grid)
