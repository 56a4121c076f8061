"""`hvdllm cooldown RUN`: branches a finished model off a run on a stream, while the stream goes on."""

from __future__ import annotations

from hvdllm.paths import path_of

USAGE = """hvdllm cooldown RUN [setting=value ...]

Trains a copy of RUN's newest checkpoint while the learning rate falls to 0, on the newest text of RUN's log. RUN itself
goes on, and nothing in its folder is changed. The model is in RUN-cooldown-TOKENS/final.

  hvdllm cooldown runs/news
  horovodrun --gloo -np 2 hvdllm cooldown runs/news budget_tokens=500_000 name=news-friday

Settings are those of train; the others are RUN's. By default it trains on a tenth of what RUN has trained on.
"""


def run(argv: list[str]) -> int:
    """Runs the command, and returns its exit code. Raises UserError or RunError."""
    if not argv or argv[0] in ("-h", "--help") or "=" in argv[0]:
        print(USAGE)
        return 0 if argv and argv[0] in ("-h", "--help") else 2

    from hvdllm import runs
    from hvdllm.checkpoint import read
    from hvdllm.cli.train import say_first, set_threads, train
    from hvdllm.config import compose
    from hvdllm.config.check import check
    from hvdllm.config.words import key_of, of
    from hvdllm.errors import UserError
    from hvdllm.world.detect import place

    here = place()
    folder = path_of(argv[0], "RUN ")
    theirs = runs.read_config(folder, say_first if here.rank == 0 else None)
    if not theirs.text.endless:
        raise UserError(f"{folder} was not trained on a stream: train it on with schedule=wsd, or resume it")
    newest = read.newest(folder, say_first if here.rank == 0 else lambda text: None)
    if newest is None:
        raise UserError(f"{folder} has no whole checkpoint yet: wait for one")
    trained = read.tokens_of(read.read_state(newest), newest)
    given = {key_of(word) for word in argv[1:]}
    rate = theirs.optim.lr * getattr(theirs.schedule, "hold", 1.0)
    budget = max(theirs.batch_tokens, trained // 10)
    usual = {
        "name": f"{folder.name}-cooldown-{trained}", "runs_dir": str(folder.parent), "init_from": str(newest),
        "init_optimizer": "true", "text": "stream", "text.source": "log", "text.path": str(folder / "log"),
        "text.tokenizer": str(folder / "tokenizer.json"), "text.replay": "0", "schedule": "wsd", "schedule.warmup": "0",
        "schedule.decay": "1", "schedule.floor": "0", "optim.lr": repr(rate), "budget_tokens": str(budget),
        "publish_every": "0",
    }  # fmt: skip
    words = [*(of(key, value) for key, value in usual.items() if key not in given), *argv[1:]]
    config = compose.compose(words, theirs)
    if config.text.last_tokens is None:
        config.text.last_tokens = config.budget_tokens
    check(config, here)
    set_threads(config, here)
    return train(config, words, here)
