"""`hvdllm train`: composes and checks the settings, then trains (trainer/life.py) or starts ranks that do (launch/)."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from hvdllm import registry
from hvdllm.config import compose
from hvdllm.config.check import check
from hvdllm.config.composition import setup_of
from hvdllm.errors import STOPPED, UserError
from hvdllm.launch import sweep as sweeps
from hvdllm.settings import Config
from hvdllm.world.detect import Place, place

if TYPE_CHECKING:
    from hvdllm.world.base import World
    from hvdllm.world.hub import Links

SWEEP = ("-m", "--multirun")
SHORT = """hvdllm train [-m] [setting=value ...] [--config-dir DIR] [--cfg job] [--help [GROUP]]
Trains a transformer language model and writes runs/<name>/. Under a launcher every process is a rank:

  hvdllm train
  hvdllm train text=files text.path=notes/ budget_tokens=5M
  horovodrun --gloo -np 2 hvdllm train exchange=acco wire=bf16
  hvdllm train resume=runs/<name> budget_tokens=10M
  hvdllm train -m launch=horovodrun exchange=allreduce,diloco+exchange.local_steps=10 seed=0,1

Exit codes: 0 the budget is met; 75 stopped and saved, the same command goes on; 1 failed; 2 cannot work; 130 ended.
"""
USAGE = """hvdllm train [-m] [setting=value ...] [--config-dir DIR] [--cfg job] [--help [GROUP]]

Trains a transformer language model and writes runs/<name>/. As it stands: a small model on this machine's Python
standard library, in one to two minutes. Under a launcher every process is a rank:

  hvdllm train
  hvdllm train text=files text.path=notes/ budget_tokens=5e6
  horovodrun --gloo -np 2 hvdllm train experiment=laptop
  horovodrun --gloo -np 2 hvdllm train exchange=acco wire=bf16
  horovodrun --mpi -np 3 hvdllm train exchange=parameter_server exchange.staleness=2
  torchrun --nproc-per-node 2 -m hvdllm train exchange=ddp
  hvdllm train world=virtual world.size=8 exchange=delayed
  hvdllm train resume=runs/<name> budget_tokens=10M

Text stays as it is typed; whole numbers may end in k, M or B (thousands, millions, billions); an option takes settings
of its own after a plus each, exchange=diloco+exchange.local_steps=10.

launch= starts the ranks itself; -m (--multirun) trains with every combination of settings that have several values,
each in a folder of its own, and run again only what is missing; a text with commas stands in quotes there.
--config-dir: a folder of your own settings, whose launch/site.yaml is launch=site:

  hvdllm train launch=horovodrun launch.np=2
  hvdllm train -m launch=horovodrun launch.np=2 exchange=allreduce,delayed,acco seed=0,1,2
  hvdllm train -m exchange=allreduce,diloco+exchange.local_steps=10 seed=0,1,2
  hvdllm train -m hydra/sweeper=optuna hydra.sweeper.n_trials=20 'optim.lr=tag(log,interval(1e-4,1e-2))'
  hvdllm train --config-dir conf/ launch=site exchange=acco

Exit codes: 0 the budget is met; 75 stopped and saved (Ctrl-C, SIGTERM), or a sweep with points that are not finished:
the same command goes on; 1 the run failed; 2 the request cannot work; 130 ended at once.
"""


def run(argv: list[str]) -> int:
    """Runs the command, and returns its exit code. Raises UserError or RunError."""
    from hvdllm.cli.flags import settings_only

    here = place()
    sweep = any(flag in argv for flag in SWEEP)
    registry.load(compose.plugins(argv))
    words = settings_only([word for word in argv if word not in SWEEP], USAGE, compose.compose, SHORT)
    if words is None:
        return 0
    if sweep:
        if here.launcher != "none":
            raise UserError(f"train -m under {here.launcher}: it starts ranks itself, see launch= in --help")
        return sweeps.run(words)
    from hvdllm.trainer.resume import asked

    config, words = asked(words, say_first if here.rank == 0 else lambda text: None)
    if sweeps.LAUNCHED in os.environ:
        config = sweeps.obeyed(config)
    if (kind := registry.name_of("launch", config.launch)) != "local":
        if here.launcher != "none":
            raise UserError(f"launch={kind} under {here.launcher}: one of them starts the ranks, leave launch at local")
        return sweeps.one(config, words)
    check(config, here)
    set_threads(config, here)
    return train(config, words, here)


def say_first(text: str) -> None:
    """Prints what is found in a run's folder, before there is a display."""
    print(text, file=sys.stderr, flush=True)


def set_threads(config: Config, here: Place) -> None:
    """Sets the number of threads, before the first tensor. By default two ranks on two cores ran 20 times slower."""
    import torch

    from hvdllm import device

    together = 1 if config.world.kind == "virtual" else here.local_size  # only one logical rank computes at a time
    threads = config.device.threads or device.fair_share(together, cores_of_task(here))
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    torch.set_num_threads(threads)


def cores_of_task(here: Place) -> int | None:
    """The number of cores that srun gave to each rank, or None if ranks are not its tasks."""
    tasks = here.launcher == "srun" or os.environ.get("SLURM_STEP_NUM_TASKS") == str(here.size) != "1"
    cores = os.environ.get("SLURM_CPUS_PER_TASK", "")
    return int(cores) if tasks and "SLURM_STEP_ID" in os.environ and cores.isdecimal() and int(cores) else None


def train(
    config: Config, words: list[str], here: Place, late: Callable[[World], tuple[Config, list[str]]] | None = None
) -> int:
    """Trains as this process's rank, or as all logical ranks.

    Args:
        config: the checked settings.
        words: of the command line, for the records.
        here: the place of this process among those that its launcher started.
        late: makes settings and words anew once the ranks know each other, so that all have those of rank 0. It may
          change nothing that the world depends on.

    Returns the exit code, 0 or STOPPED.
    """
    from hvdllm.cli.display import make_show
    from hvdllm.trainer import heartbeat, life
    from hvdllm.world import signals

    stopped: list[int] = []

    def live(world: World) -> None:
        settled, said = (config, words) if late is None else late(world)
        launcher = list(signals.up_to_launcher()) if here.launcher in ("horovodrun", "mpirun") else []
        with make_show(world.rank, here.launcher == "none", launcher) as show:
            tokens = life.run(settled, said, here, world, show)
        if tokens is not None and world.rank == 0:
            tell_of_stop(tokens)
        if tokens is not None:
            stopped.append(tokens)
        world.close()
        if not transport.facts.logical:
            heartbeat.leave()

    transport = registry.parts("transport")[setup_of(config, here).transport]
    if transport.facts.logical:
        from hvdllm.world.base import Asks

        asks = Asks()
        signals.listen(asks, alone=True)
        run_all = registry.built(transport)
        run_all(config.world.size, live, asks, hosts=config.world.hosts, links=simulated_links(config))
        return STOPPED if stopped else 0
    world = open_world(config, here)
    signals.listen(world.asks, alone=world.size == 1)
    if here.launcher != "none":
        signals.watch_launcher(world.asks)
    live(world)
    return STOPPED if stopped else 0


def tell_of_stop(tokens: int) -> None:
    """Tells launch/inside.py, if it started this process, that this life of the run ended in good order."""
    from hvdllm.launch.base import STOP_FILE

    if path := os.environ.get(STOP_FILE):
        with contextlib.suppress(OSError):
            Path(path).write_text(f"{tokens}\n")


def open_world(config: Config, here: Place) -> World:
    """The world of the ranks that the launcher of this process started."""
    setup = setup_of(config, here)
    world: World = registry.built(registry.parts("transport")[setup.transport])(setup, here)
    return world


def simulated_links(config: Config) -> Links | None:
    """The links of world=virtual with a simulated clock, or None without such a clock."""
    from hvdllm.config import pace
    from hvdllm.world.hub import Links

    world = config.world
    return Links(pace.bandwidth(world), world.latency_ms / 1e3) if world.tokens_per_s is not None else None
