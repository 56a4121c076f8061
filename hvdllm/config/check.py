"""What involves two settings, or the world: checked before anything is built, said in one sentence."""

from __future__ import annotations

import importlib.util
import math
import re
from pathlib import Path

from hvdllm.config import pace
from hvdllm.config.bounds import outer_rate_below
from hvdllm.config.composition import group_size, ranks, refusal, transport
from hvdllm.config.paths import check_name, path_of, short
from hvdllm.config.schema import (
    Acco,
    Config,
    Cosine,
    FedAvg,
    Files,
    LocalRounds,
    LocalSteps,
    NoTracker,
    ParameterServer,
    StreamingDiLoCo,
    Wandb,
    WarmupStableDecay,
    name_of,
)  # fmt: skip
from hvdllm.errors import UserError
from hvdllm.models.size import check_model
from hvdllm.world.detect import Place

MOST_LOGICAL = 4096  # ranks of world=virtual


def check(config: Config, place: Place) -> None:
    """Raises UserError for the first combination that cannot work."""
    context = config.model.context
    check_model(config.model)
    if config.batch_tokens % context:
        near = max(1, round(config.batch_tokens / context)) * context
        raise UserError(
            f"batch_tokens={config.batch_tokens} is no multiple of model.context={context}: {near} would be the nearest"
        )
    check_world(config, place)
    if why := refusal(config, place):
        raise UserError(why)
    check_servers(config, ranks(config, place), transport(config, place))
    check_batch(config, ranks(config, place) - getattr(config.exchange, "dedicated", 0))
    check_local(config)
    check_federation(config, place)
    if isinstance(config.text, Files) and config.text.path is None and config.text.prepared is None:
        raise UserError("text=files needs text.path: a file, a folder, a glob or a list of them")
    for key in ("path", "validation"):
        value = getattr(config.text, key, None)
        if value is not None and not (
            isinstance(value, str) or (isinstance(value, list) and value and all(isinstance(v, str) for v in value))
        ):
            raise UserError(f"text.{key}={value} is neither a path nor a list of paths")
    if not 0 <= config.text.validation_share < 1:
        raise UserError(f"text.validation_share={config.text.validation_share} must lie between 0 and 1")
    if config.model.dropout >= 1:
        raise UserError(f"model.dropout={config.model.dropout} must lie between 0 and 1")
    for name in ("beta1", "beta2", "momentum"):
        if getattr(config.optim, name, 0) >= 1:
            raise UserError(f"optim.{name}={getattr(config.optim, name)} must be smaller than 1")
    if getattr(config.optim, "nesterov", False) and not config.optim.momentum:
        raise UserError("optim.nesterov=true needs optim.momentum above 0")
    schedule = config.schedule
    if schedule.warmup > 1 or (isinstance(schedule, WarmupStableDecay) and schedule.warmup + schedule.decay > 1):
        raise UserError("the shares of the schedule (warmup, decay) add up to more than its horizon: lower one of them")
    if isinstance(schedule, (Cosine, WarmupStableDecay)) and schedule.floor > 1:
        raise UserError(f"schedule.floor={schedule.floor} is above the peak: give a share between 0 and 1")
    check_paths(config)
    if not 0 < getattr(config.wire, "density", 1) <= 1:
        raise UserError(f"wire.density={config.wire.density} must lie between 0 and 1")
    if getattr(config.wire, "momentum", 0) >= 1:
        raise UserError(f"wire.momentum={config.wire.momentum} must be smaller than 1")
    if config.precision == "fp64" and config.device.kind == "cuda":
        raise UserError("precision=fp64 is for oracles on the CPU: give device=cpu, or precision=fp32 or bf16")
    if config.init_optimizer and config.init_from is None:
        raise UserError("init_optimizer=true needs init_from: the run whose optimizer this one begins with")
    if config.trace_steps is not None:
        parse_steps(config.trace_steps)
    check_track(config)


def check_paths(config: Config) -> None:
    """Raises UserError for a name or a path that no file system could take."""
    if config.launch.sweep is not None:
        check_name(config.launch.sweep, "launch.sweep")
    if config.name is not None:
        check_name(config.name, "name")
        path_of(str(Path(config.runs_dir) / config.name / "checkpoints"), "runs_dir=")
    several = {"text.path": getattr(config.text, "path", None), "text.validation": config.text.validation}
    paths = [(key, path) for key, value in several.items() for path in (value if isinstance(value, list) else [value])]
    paths += [("runs_dir", config.runs_dir), ("data_dir", config.data_dir), ("init_from", config.init_from)]
    paths += [("text.tokenizer", config.text.tokenizer)] * (config.text.tokenizer not in ("bytes", "bpe"))
    paths += [("resume", config.resume)] * (config.resume not in ("auto", "never", "must"))
    for key, path in paths:
        if path == "":
            raise UserError(f"{key} is empty: give a path, or leave it out")
        if path is not None:
            path_of(path, f"{key}=")


def check_track(config: Config) -> None:
    """Raises UserError where a tracker's library is not here, or tags are no words. Imports none."""
    if isinstance(config.track, NoTracker):
        return
    name = name_of("track", config.track)
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:  # a folder wandb/, which W&B makes where it is started, is no package
        raise UserError(f"track={name}: the package is not installed: pip install {name}, or leave track at none")
    tags = getattr(config.track, "tags", None)
    if tags is not None and not (
        (isinstance(tags, str) and tags) or (isinstance(tags, list) and all(isinstance(t, str) and t for t in tags))
    ):
        raise UserError(f"track.tags={tags} is neither a tag nor a list of tags: give words, such as [baseline,night]")
    if isinstance(config.track, Wandb):
        if not config.track.project:
            raise UserError("track.project is empty: give the name of a project")
        for key, most in (("project", 128), ("entity", 128), ("group", 128)):
            text = getattr(config.track, key) or ""
            if len(text) > most or re.search(r"[/\\#?%:\x00-\x1f]", text):
                raise UserError(
                    f"track.{key}={short(text)!r}: W&B takes at most {most} letters, and none of / \\ # ? % :"
                )


def parse_steps(text: str) -> tuple[int, int]:
    """trace_steps `20:24` as (20, 24): steps 20, 21, 22 and 23. Raises UserError for anything else."""
    found = re.fullmatch(r"\s*(\d+)\s*:\s*(\d+)\s*", text, re.ASCII)
    if found is None or int(found[1]) >= int(found[2]):
        raise UserError(
            f"trace_steps={text} is no range of steps: give the first and the one to stop before, such as 20:24, not "
            f"`{text}`"
        )
    return int(found[1]), int(found[2])


def check_batch(config: Config, size: int) -> None:
    """Raises UserError where a global batch cannot be dealt."""
    context = config.model.context
    sequences = config.batch_tokens // context
    halves = isinstance(config.exchange, Acco) and not config.exchange.timed
    if halves and sequences % 2:
        raise UserError(
            f"batch_tokens={config.batch_tokens} is {sequences} sequences, and exchange=acco takes them in two halves: "
            f"{(sequences + 1) * context} would be even"
        )
    if isinstance(config.exchange, Acco) and (config.exchange.most or math.inf) < config.exchange.least:
        raise UserError(f"exchange.most={config.exchange.most} is less than exchange.least={config.exchange.least}")
    least = size * (2 if halves else 1)
    if sequences < least:
        raise UserError(
            f"batch_tokens={config.batch_tokens} is {sequences} sequences of {context} tokens, fewer than the "
            f"{size} ranks{' have in two halves' if halves else ''}: at least {least * context}, or start fewer ranks"
        )


def check_local(config: Config) -> None:
    """Raises UserError where local steps, pulses or an outer optimizer cannot be as asked."""
    exchange = config.exchange
    if not isinstance(exchange, LocalSteps):
        return
    if isinstance(exchange, LocalRounds | FedAvg) and (exchange.pulses or 1) > exchange.local_steps:
        raise UserError(
            f"exchange.pulses={exchange.pulses} in {exchange.local_steps} local steps: at most one after each"
        )
    if isinstance(exchange, StreamingDiLoCo):
        if (exchange.delay + 1) * exchange.fragments > exchange.local_steps:
            raise UserError(
                f"exchange.delay={exchange.delay} is not less than local_steps / fragments = {exchange.local_steps} / "
                f"{exchange.fragments}: one part travels at a time"
            )
        if exchange.mixing > 1:
            raise UserError(f"exchange.mixing={exchange.mixing} must lie between 0 and 1")
    momentum = getattr(exchange, "outer_momentum", 0.0)
    if momentum >= 1:
        raise UserError(f"exchange.outer_momentum={momentum} must be smaller than 1")
    late, lr = getattr(exchange, "overlap", False), getattr(exchange, "outer_lr", 1.0)
    if isinstance(exchange, FedAvg):
        lr = exchange.rate if exchange.server == "sgd" else 0.0
    bound = outer_rate_below(momentum, late)
    if lr >= bound:
        why = "applied one round late (exchange.overlap) it is" if late else "it is"
        raise UserError(
            f"exchange.outer_lr={lr:g} with exchange.outer_momentum={momentum:g} is unstable: {why} stable below "
            f"{bound:.3g} only; lower one of them"
        )


def check_servers(config: Config, size: int, world: str) -> None:
    """Raises UserError where a parameter server has no workers, or nothing to correct. Imports nothing."""
    exchange = config.exchange
    if not isinstance(exchange, ParameterServer):
        return
    if not re.fullmatch(r"shared|[1-9]\d*", exchange.servers):
        raise UserError(
            f"exchange.servers={exchange.servers}: give shared, where every rank trains and serves its part, or how "
            "many ranks serve and do not train"
        )
    if exchange.dedicated >= size:
        raise UserError(
            f"exchange.servers={exchange.servers} of {size} rank{'s' * (size > 1)}: none is left to train; start more, "
            "or give exchange.servers=shared, where every rank trains and serves its part"
        )
    for name in ("compensation", "staleness_aware"):
        if exchange.staleness == 0 and getattr(exchange, name):
            raise UserError(
                f"exchange.{name} with exchange.staleness=0: gradients are not late there, leave it out or give "
                "another staleness"
            )
    if world == "horovod" and importlib.util.find_spec("mpi4py") is None:
        raise UserError("exchange=parameter_server needs mpi4py: run jobs/setup.sh, or pip install mpi4py")


def check_federation(config: Config, place: Place) -> None:
    """Raises UserError where clients cannot be drawn, dealt or served as asked."""
    exchange = config.exchange
    if not isinstance(exchange, FedAvg):
        return
    drawn, each = exchange.sampled or exchange.clients, group_size(config, place)
    groups, context = ranks(config, place) // each, config.model.context
    name = "clients" if exchange.sampled is None else "sampled"
    if drawn > exchange.clients:
        raise UserError(f"exchange.sampled={drawn} of exchange.clients={exchange.clients}: at most all of them")
    if drawn < groups:
        raise UserError(
            f"exchange.{name}={drawn} clients a round for {groups} {'ranks' if each == 1 else 'groups of ranks'}: some "
            f"would have nothing to do; at least {groups}, or start fewer ranks"
        )
    if config.batch_tokens // context < drawn * each:
        raise UserError(
            f"batch_tokens={config.batch_tokens} is {config.batch_tokens // context} sequences of {context} tokens, "
            f"fewer than {drawn} clients take in a step{f' on {each} ranks each' * (each > 1)}: at least "
            f"{drawn * each * context}, or a smaller exchange.{name}"
        )
    if exchange.server == "adam" and exchange.outer_momentum:
        raise UserError(
            "exchange.outer_momentum is that of exchange.server=sgd: leave it at 0, adam has exchange.beta1"
        )
    for key in ("beta1", "beta2", "tau"):
        if exchange.server == "sgd" and getattr(exchange, key) != getattr(FedAvg, key):
            raise UserError(f"exchange.{key} is that of exchange.server=adam: leave it out, or give that server")
        if key != "tau" and getattr(exchange, key) >= 1:
            raise UserError(f"exchange.{key}={getattr(exchange, key)} must be smaller than 1")
    if config.init_optimizer:
        raise UserError(
            "init_optimizer=true: each client of exchange=fedavg begins with a fresh optimizer, leave it out"
        )
    if exchange.prox and exchange.host_memory:
        raise UserError("exchange.prox reads the anchor at every step: leave exchange.host_memory at false")


def check_world(config: Config, place: Place) -> None:
    """Raises UserError where what started us cannot be this world."""
    kind = transport(config, place)
    if kind in ("horovod", "torch") and place.launcher == "none":
        start = "horovodrun -np 2" if kind == "horovod" else "torchrun --nproc-per-node 2 -m"
        raise UserError(f"world={kind} needs ranks that a launcher started: {start} hvdllm train …")
    if kind == "horovod" and place.launcher == "torchrun":
        raise UserError(
            "torchrun starts ranks that Horovod cannot join: leave world at auto (or torch), or start them with "
            "horovodrun, mpirun or srun"
        )
    if kind in ("single", "virtual") and place.size > 1:
        raise UserError(
            f"world={kind} under a launcher would train {place.size} times the same run: leave world at auto, "
            "or start one process"
        )
    if kind == "virtual" and config.world.size > MOST_LOGICAL:
        raise UserError(f"world.size={config.world.size}: each logical rank is a thread, at most {MOST_LOGICAL:,}")
    if kind == "virtual" and config.world.size % config.world.hosts:
        raise UserError(f"world.hosts={config.world.hosts} is no divisor of world.size={config.world.size}")
    pace.check(config.world, kind, ranks(config, place))
