"""`hvdllm prepare`: makes the token shards that train would make by itself, and says what is in them."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

from hvdllm import registry
from hvdllm.cli.flags import settings_only
from hvdllm.config.compose import compose
from hvdllm.settings import Config
from hvdllm.task.base import Kind
from hvdllm.text.overlap import RUN
from hvdllm.text.parts import Mix
from hvdllm.text.shards import Corpus, Shard, data_folder, prepare

USAGE = """hvdllm prepare [setting=value ...] [--help]

Makes the token shards that train would make by itself. It reads the settings text.*, task.* and data_dir:

  hvdllm prepare
  hvdllm prepare text=files text.path=notes/ text.tokenizer=bytes
  hvdllm prepare text=tokens text.path=train.bin text.tokenizer=tokenizer.json
  hvdllm prepare task=ratings task.path=ratings.csv task.threshold=4
"""


def run(words: Sequence[str]) -> int:
    """Runs the command, and returns its exit code.

    It takes the settings of train, such as text=files text.path=… text.tokenizer=… data_dir=…. The table is written to
    standard output, and progress to standard error. Raises UserError.
    """
    settings = settings_only(list(words), USAGE, compose, groups=("text",))
    if settings is None:
        return 0
    config = compose(settings)
    started = time.perf_counter()

    def say(text: str) -> None:
        print(text, file=sys.stderr)

    task = registry.of("task", config.task)
    if task.facts.text and not config.text.ready and not isinstance(config.text, Mix):
        print(table(prepare(config.text, data_folder(config.data_dir), say=say), config, time.perf_counter() - started))
        return 0
    kind: Kind = registry.built(task)
    data = kind.prepare(config, say=say, whole=True, wanted=None)
    notes = [("note", note) for note in data.notes]
    seconds = f"{time.perf_counter() - started:.1f}"
    print(lines([("data", data.about), ("data hash", data.data_hash), ("seconds", seconds), *notes]))
    return 0


def table(corpus: Corpus, config: Config, seconds: float) -> str:
    """What is in a prepared text, as lines. seconds: how long it took to prepare."""
    share = corpus.repeated(config.model.context, 0)
    known = "not known" if share is None else f"{share:.2%} of its windows of {config.model.context} tokens"
    rows = [
        ("folder", str(corpus.folder)),
        ("training", _side(corpus.train_shard)),
        ("validation", _side(corpus.validation_shard)),
        ("repeated", f"{known} hold {RUN} tokens in a row of the training text"),
        ("vocabulary", f"{corpus.tokenizer.vocab:,} tokens"),
        ("data hash", corpus.data_hash),
        ("tokenizer hash", corpus.tokenizer.hash),
        ("seconds", f"{seconds:.1f}"),
        *(("note", note) for note in corpus.notes),
    ]
    return lines(rows)


def lines(rows: Sequence[tuple[str, str]]) -> str:
    """A line for each name and value."""
    return "\n".join(f"{name:<15} {value}" for name, value in rows)


def _side(shard: Shard) -> str:
    density = f", {shard.bytes / shard.tokens:.3f} bytes a token" if shard.tokens else ""
    return f"{shard.documents:,} documents, {shard.tokens:,} tokens{density}"
