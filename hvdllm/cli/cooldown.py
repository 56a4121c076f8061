"""`hvdllm cooldown RUN`: branches a finished model off a run on a stream, while the stream goes on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from hvdllm.errors import UserError
from hvdllm.paths import path_of

if TYPE_CHECKING:
    from hvdllm.settings import Config
    from hvdllm.world.base import World

USAGE = """hvdllm cooldown RUN [setting=value ...]

Trains a copy of RUN's newest checkpoint on the newest text of RUN's log, while the learning rate falls to 0. RUN itself
goes on, and nothing in its folder is changed. The finished model is in RUN-cooldown-TOKENS/final.

  hvdllm cooldown runs/news
  horovodrun --gloo -np 2 hvdllm cooldown runs/news budget_tokens=500_000 name=news-friday

Settings are those of train, and those that are not given are RUN's. By default a cooldown trains on a tenth of the
tokens that RUN has trained on. The optimizer's state is taken from the checkpoint where one belongs to all ranks; after
local steps it begins anew.
"""
AHEAD = 4  # commits for which exchanges may take text beyond the budget, in flight or read by a faster rank


def run(argv: list[str]) -> int:
    """Runs the command, and returns its exit code. Raises UserError or RunError."""
    from hvdllm import runs
    from hvdllm.cli.flags import settings_only
    from hvdllm.cli.train import say_first, set_threads, train
    from hvdllm.config import compose
    from hvdllm.config.check import check
    from hvdllm.registry import name_of
    from hvdllm.world.base import from_first
    from hvdllm.world.detect import place

    if argv[:1] in (["-h"], ["--help"]):
        print(USAGE, end="")
        return 0
    if not argv or argv[0].startswith("-") or ("=" in argv[0] and not Path(argv[0]).exists()):
        raise UserError("cooldown needs the folder of a run: hvdllm cooldown RUN [setting=value ...]")
    folder = path_of(argv[0], "RUN ")
    given = settings_only(argv[1:], USAGE, compose.compose, USAGE)
    if given is None:
        return 0
    here = place()
    theirs = runs.read_config(folder, say_first if here.rank == 0 else None)
    words = branched(folder, theirs, given)
    config = compose.compose(words, theirs)

    def late(world: World) -> tuple[Config, list[str]]:  # RUN may have saved anew, and deleted older checkpoints
        words: list[str] = from_first(world, lambda: branched(folder, theirs, given), "start.branch")
        return compose.compose(words, theirs), words

    if (kind := name_of("launch", config.launch)) != "local":
        raise UserError(f"launch={kind} with cooldown: start it under a launcher instead, {kind} … hvdllm cooldown RUN")
    check(config, here)
    set_threads(config, here)
    return train(config, words, here, late)


def branched(folder: Path, theirs: Config, given: list[str]) -> list[str]:
    """The words of a run that cools a copy of another one down.

    Args:
        folder: of the run that goes on.
        theirs: its settings.
        given: words of the user, which count before the usual ones.

    Raises UserError if there is nothing to branch off.
    """
    import numpy as np

    from hvdllm.checkpoint import read
    from hvdllm.cli.train import say_first
    from hvdllm.config import compose
    from hvdllm.config.words import expand, key_of, last, of
    from hvdllm.online.log import Log
    from hvdllm.online.opened import FOLDER, layout_of
    from hvdllm.optim.schedule import factor
    from hvdllm.registry import name_of
    from hvdllm.text.parts import Stream

    if not theirs.text.endless:
        raise UserError(f"{folder} was not trained on a stream: go on with schedule=wsd init_from={folder}")
    newest = read.newest(folder, say_first)
    if newest is None:
        raise UserError(f"{folder} has no whole checkpoint yet: wait until it has saved one, or send it SIGUSR1")
    with read.fitting(newest):
        state = read.read_run(newest)
        trained = read.tokens_of(state, newest)
        rate = factor(theirs.schedule, state["horizon"], theirs.batch_tokens)
        rate.rewarmed = [int(at) for at in state["due"].get("rewarmed", [])]
        held = theirs.optim.lr * rate(trained)
    words = [each for word in given for each in expand(word)]
    keys = {key_of(word) for word in words}
    if not held and "optim.lr" not in keys:
        raise UserError(f"the learning rate of {folder} has fallen to 0 already: give optim.lr=")
    optimizer = name_of("optim", theirs.optim)
    taken = isinstance(state["shared"].get("steps"), int) and last(words, "optim", optimizer) == optimizer
    usual = {
        "name": f"{folder.absolute().name}-cooldown-{trained}", "runs_dir": str(folder.parent),
        "init_from": str(newest), "init_optimizer": str(taken).lower(),
        "text": "stream", "text.source": "log", "text.path": str(folder / FOLDER),
        "text.replay": "0", "text.replay_by": "uniform",
        "text.tokenizer": str(folder / "tokenizer.json"), "text.backlog": "all", "schedule": "wsd",
        "schedule.warmup": "0", "schedule.decay": "1", "schedule.floor": "0", "optim.lr": repr(held),
        "budget_tokens": str(max(theirs.batch_tokens, trained // 10)), "publish_every": "0",
    }  # fmt: skip
    words = [*(of(key, value) for key, value in usual.items() if key not in keys), *words]
    config = compose.compose(words, theirs)
    a_commit = config.batch_tokens * config.exchange.batches_a_commit
    commits = -(-config.budget_tokens // a_commit)
    sizes = {"schedule.horizon": commits * a_commit, "text.last_tokens": (commits + AHEAD) * a_commit}
    words += [of(key, str(size)) for key, size in sizes.items() if key not in keys]
    config = compose.compose(words, theirs)
    if isinstance(config.text, Stream) and config.text.path == usual["text.path"]:
        log = Log(folder / FOLDER, np.dtype(np.uint16))
        if not log.refresh():
            raise UserError(f"{log.folder} holds no text: give text.path= with the log that {folder} was trained on")
        there = layout_of(config).fresh(log.last.tokens) * config.model.context
        if there < config.budget_tokens:
            raise UserError(f"{log.folder} holds {there:,} tokens to train on: give budget_tokens={there} or less")
    return words
