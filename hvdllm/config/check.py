"""Checks of settings that involve the machine, the world or the whole run, before anything is built.

What a part demands of its own settings and of other parts is checked beside its settings (`refusal`), which
composition.py calls. Every check raises UserError with one sentence.
"""

from __future__ import annotations

import importlib.util
import math
import re
from pathlib import Path

from hvdllm import registry
from hvdllm.config import pace
from hvdllm.config.composition import refusal, setup_of
from hvdllm.errors import UserError
from hvdllm.paths import check_name, path_of
from hvdllm.settings import Config, Setup, several
from hvdllm.world.detect import Place

MOST_LOGICAL = 4096  # the most ranks of world=virtual


def check(config: Config, place: Place) -> None:
    """Checks a whole configuration.

    Args:
        config: the settings.
        place: the place of this process among those that its launcher started.

    Raises UserError for the first combination that cannot work.
    """
    check_model(config)
    units = config.task.units(config)
    setup = setup_of(config, place)
    check_world(setup, place)
    if why := refusal(setup):
        raise UserError(why)
    if units is not None:
        check_batch(config, setup.ranks, units)
    check_paths(config)
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
    texts = config.text.paths.items()
    paths: list[tuple[str, str | None]] = [(key, path) for key, value in texts for path in several(value)]
    paths += [("runs_dir", config.runs_dir), ("data_dir", config.data_dir), ("init_from", config.init_from)]
    paths += [("text.tokenizer", config.text.tokenizer)] * (config.text.tokenizer not in ("bytes", "bpe"))
    paths += [("resume", config.resume)] * (config.resume not in ("auto", "never", "must"))
    for key, path in paths:
        if path == "":
            raise UserError(f"{key} is empty: give a path, or leave it out")
        if path is not None:
            path_of(path, f"{key}=")


def check_track(config: Config) -> None:
    """Raises UserError if the package of the tracker is not installed. The package is not imported."""
    tracker = registry.of("track", config.track)
    if not tracker.facts.package:
        return
    spec = importlib.util.find_spec(tracker.facts.package)
    if spec is None or spec.origin is None:  # a folder wandb/ that W&B has made here would have no origin
        raise UserError(
            f"track={tracker.name}: the package is not installed: pip install {tracker.facts.package}, or leave track "
            "at none"
        )


def parse_steps(text: str) -> tuple[int, int]:
    """Parses trace_steps: `20:24` becomes (20, 24), for steps 20, 21, 22 and 23. Raises UserError for anything else."""
    found = re.fullmatch(r"\s*(\d+)\s*:\s*(\d+)\s*", text, re.ASCII)
    if found is None or int(found[1]) >= int(found[2]):
        raise UserError(
            f"trace_steps={text} is no range of steps: give the first and the one to stop before, such as 20:24, not "
            f"`{text}`"
        )
    return int(found[1]), int(found[2])


def check_model(config: Config) -> None:
    """Raises UserError if no model has these settings, or if it is not one of the task."""
    task, model = registry.of("task", config.task), registry.of("model", config.model)
    if model.name != task.facts.model:
        raise UserError(f"task={task.name} trains model={task.facts.model}, and this is a {model.name}: give that")
    if problem := config.model.problem():
        raise UserError(problem)


def check_batch(config: Config, ranks: int, units: float) -> None:
    """Raises UserError if a global batch cannot be dealt to the ranks. units: what an item counts in the mean."""
    exchange = config.exchange
    items, parts = registry.of("task", config.task).facts.items, exchange.parts
    sequences, size = int(config.batch_tokens // units), ranks - exchange.dedicated
    if sequences % parts and config.batch_tokens % units == 0:
        name = registry.name_of("exchange", exchange)
        raise UserError(
            f"batch_tokens={config.batch_tokens} is {sequences} {items}, and exchange={name} takes them in {parts} "
            f"equal parts: {-(-sequences // parts) * parts * units} would do"
        )
    each = f" of {units:g} {registry.of('task', config.task).facts.unit}" * (units != 1)
    if sequences < size * parts:
        raise UserError(
            f"batch_tokens={config.batch_tokens} is {sequences} {items}{each}, fewer than the "
            f"{size} ranks{f' have in {parts} parts' if parts > 1 else ''}: at least "
            f"{math.ceil(size * parts * units)}, or start fewer ranks"
        )


def check_world(setup: Setup, place: Place) -> None:
    """Raises UserError if what started this process cannot be the world that the settings ask for."""
    kind, launcher, world = setup.transport, place.launcher, setup.config.world
    if kind in ("horovod", "torch") and launcher == "none":
        start = "horovodrun -np 2" if kind == "horovod" else "torchrun --nproc-per-node 2 -m"
        raise UserError(f"world={kind} needs ranks that a launcher started: {start} hvdllm train …")
    if kind == "horovod" and launcher == "torchrun":
        raise UserError(
            "torchrun starts ranks that Horovod cannot join: leave world at auto (or torch), or start them with "
            "horovodrun, mpirun or srun"
        )
    if kind in ("single", "virtual") and place.size > 1:
        raise UserError(
            f"world={kind} under a launcher would train {place.size} times the same run: leave world at auto, or start "
            "one process"
        )
    if kind == "virtual" and world.size > MOST_LOGICAL:
        raise UserError(f"world.size={world.size}: each logical rank is a thread, at most {MOST_LOGICAL:,}")
    if kind == "virtual" and world.size % world.hosts:
        raise UserError(f"world.hosts={world.hosts} is no divisor of world.size={world.size}")
    pace.check(world, kind, setup.ranks)
