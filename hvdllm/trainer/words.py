"""What a run tells of itself: its `run` record, its `end` record, and the header above the progress line."""

from __future__ import annotations

import math
from dataclasses import asdict

import torch

from hvdllm import device as devices
from hvdllm import registry
from hvdllm.config import compose, pace
from hvdllm.models import size
from hvdllm.plain import Json
from hvdllm.settings import Config
from hvdllm.task.base import Task
from hvdllm.trainer import account
from hvdllm.trainer.acts import Acts
from hvdllm.trainer.evaluate import told
from hvdllm.trainer.run import Run
from hvdllm.trainer.slow import crowded


def run_record(run: Run, overrides: list[str]) -> Json:
    """The values of the `run` record, with which each life of a run begins. They are enough to repeat it."""
    config, task = run.config, run.data.task
    return {
        "command": account.command(),
        "overrides": overrides,
        "config": compose.to_dict(config),
        "git": account.git(),
        "versions": account.versions(),
        "world": run.world.size,
        "ranks": run.hosts,
        "threads": run.hosts[0]["threads"],
        "fp32_products": torch.get_float32_matmul_precision(),  # "highest" means without TF32
        "clock": "simulated" if devices.simulated() else "host",
        "slurm": account.slurm(),
        "link": account.link(),
        "data_hash": run.data.data_hash,
        **run.data.record,
        "unit": task.unit,
        "parameters": task.parameters,
        "parameters_frozen": task.frozen,
        "flops_per_token": task.flops,
        "trunk": run.origin.trunk and asdict(run.origin.trunk),
    }


def header(run: Run) -> dict[str, str]:
    """The lines above the progress line, by their names."""
    config, task, hosts, trunk = run.config, run.data.task, run.hosts, run.origin.trunk
    facts = registry.of("task", config.task).facts
    names = sorted({f"{rank['device']} ({rank['kind']})" for rank in hosts})
    machines = len({rank["host"] for rank in hosts})
    ranks = f"{run.world.size} on {machines} host{'s' * (machines > 1)}, {hosts[0]['threads']} threads each"
    units, items = config.task.units(config), run.stream.batch
    each = f" ({items} x {units})" if units != 1 else ""
    batch = f"{config.batch_tokens:,} {task.unit}{each if units else f' ({items} in the mean)'}"
    going_on = {"goes on": f"from {run.origin.resumed['shared']['tokens']:,} {task.unit}"} if run.origin.resumed else {}
    if trunk is not None:
        at = f", {trunk.tokens:,} {task.unit}" if trunk.tokens is not None else ""
        going_on = {"begins": f"with the weights of {trunk.path}{at}{'; ' * bool(trunk.note)}{trunk.note}"}
    trained = f", of which {(task.parameters - task.frozen) / 1e6:.2f} M are trained" if task.frozen else ""
    return {
        "model": f"{task.parameters / 1e6:.2f} M parameters{trained}, {config.precision}",
        "text" if facts.text else "data": run.data.about,
        "exchange": exchange_name(config),
        "update": f"{batch}, {registry.name_of('optim', config.optim)}",
        "ranks": ranks,
        "device": ", ".join(names),
        **speed_lines(config, hosts),
        "run": run.start.folder,
        **going_on,
    }


def speed_lines(config: Config, hosts: list[Json]) -> dict[str, str]:
    """The lines of the header that say which ranks are slowed, and which speeds are simulated. Empty if none are."""
    world, out = config.world, dict[str, str]()
    by = pace.slowed(world.slow, len(hosts))
    if by:
        how = "by more compute"
        if world.tokens_per_s is not None:
            how = "on the simulated clock"
        elif any(crowded(hosts, rank, torch.device(hosts[rank]["kind"])) for rank in by):
            how = "by sleeping, since ranks outnumber cores"
        out["slowed"] = ", ".join(f"rank {rank} {factor:g} times" for rank, factor in sorted(by.items())) + f", {how}"
    if world.tokens_per_s is not None:
        speeds = pace.speeds(world, config.seed)
        spread = f"{min(speeds):,.0f}" + (f" to {max(speeds):,.0f}" if max(speeds) > min(speeds) else "")
        link = f"links of {world.bandwidth}" if world.bandwidth else "transfers that take no time for their size"
        late = f", {world.latency_ms:g} ms late" if world.latency_ms else ""
        unit = registry.of("task", config.task).facts.unit
        out["time"] = f"simulated: {spread} {unit}/s a rank, {link}{late}"
    return out


def exchange_name(config: Config) -> str:
    """The exchange and whatever is not the default around it, such as `acco, wire int8, world torch`."""
    wire = registry.name_of("wire", config.wire)
    parts = [registry.name_of("exchange", config.exchange)]
    parts += [f"wire {wire}"] * (wire != "fp32") + ["hierarchical"] * config.wire.hierarchical
    inner = getattr(config.exchange, "inner", "none")
    parts += [f"{inner} inside"] * (inner != "none")
    return ", ".join(parts + [f"world {config.world.kind}"] * (config.world.kind not in ("auto", "horovod")))


def each(config: Config, task: Task) -> str:
    """What a loss is per, such as `nats a token`."""
    one, nats = task.unit.removesuffix("s"), bool(registry.of("task", config.task).facts.nats)
    return "nats " * nats + f"a{'n' * (one[0] in 'aeiou')} {one}"


def next_commands(config: Config) -> list[str]:
    """The commands that read a finished run of this task."""
    task = registry.of("task", config.task)
    return ["sample"] * task.facts.writes + ["evaluate"] * (task.made is not None)


def end_record(run: Run, acts: Acts, reason: str) -> Json:
    """The values of the `end` record.

    Its `loss` is that of the last `commit` record, and `mfu` the share of the device's peak rate, if that is known.

    Args:
        run: the run.
        acts: what was committed and evaluated.
        reason: why the run ends: budget, stop or failed.
    """
    config, ledger, clock, task = run.config, run.ledger, run.clock, run.data.task
    seconds, here = clock.seconds(), clock.seconds_here()
    peak = None if devices.simulated() else size.peak_flops(run.hosts[0]["device"], config.precision)
    if config.precision == "fp32" and torch.get_float32_matmul_precision() != "highest":
        peak = None  # the user's environment allows TF32, whose peak is another one
    flops = task.flops * acts.tokens_here
    known = ledger.recorded_loss is not None or math.isnan(ledger.last_loss)
    settled = acts.settled
    return {
        "reason": reason,
        "unit": task.unit,
        "each": each(config, task),
        "told": told(task, acts.last_eval) if acts.last_eval else "",
        "next": next_commands(config),
        "tokens": acts.tokens,
        **ledger.totals(seconds),
        "loss": ledger.recorded_loss if known else ledger.last_loss,
        "eval_loss": acts.last_eval.loss if acts.last_eval else None,
        **({name: value for name, value in acts.last_eval.metrics.items() if name != "loss"} if acts.last_eval else {}),
        "tokens_computed": acts.tokens + settled.tokens + settled.dropped,  # without rounds that failed
        "tokens_settled": settled.tokens,
        # These lie in the checkpoint and are not yet applied, or they were dropped.
        "tokens_not_committed": settled.dropped + (0 if acts.finished else settled.tokens),
        "mfu": flops / (here * run.world.size * peak) if peak and flops and here > 0 else None,
        "peak_memory_bytes": devices.peak_memory(run.device),
        "device_hours": clock.wall_s() * run.world.size / 3600,
        "data_waited_s": 0.0 if devices.simulated() else run.stream.waited_s,
        **ledger.prequential.values(),  # of a stream
    }
