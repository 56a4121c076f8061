"""`hvdllm evaluate RUN`: computes a run's validation loss again, by the same definition as the run itself.

With `--lm-eval TASK` it asks lm-evaluation-harness instead, which has tasks of its own and needs no text of the run.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING

from hvdllm.paths import argument

if TYPE_CHECKING:
    from collections.abc import Callable

    from hvdllm.task.base import Kind, Prepared
    from hvdllm.trainer.restore import Restored


def run(argv: list[str]) -> int:
    """Runs the command, and returns its exit code. Raises UserError."""
    parser = argparse.ArgumentParser("hvdllm evaluate", description="A run's validation loss, again.")
    parser.add_argument("run", type=argument, help="folder of the run, runs/<name>")
    parser.add_argument(
        "words",
        nargs="*",
        metavar="text.path=…",
        help="where its files of text are, if they are not prepared here; "
        "of a run on a stream the folder of its log, if that is not RUN/log",
    )
    parser.add_argument("--step", type=int, help="the checkpoint of this step; default: the newest whole one")
    parser.add_argument("--data-dir", help="folder of prepared token shards, where it is another than the run's")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a sentence")
    parser.add_argument(
        "--lm-eval",
        nargs="+",
        metavar="TASK",
        help="instead, tasks of lm-evaluation-harness (pip install lm-eval), or .yaml files that describe one",
    )
    parser.add_argument("--limit", type=int, help="examples of each task of --lm-eval; default: all")
    given = parser.parse_args(argv)
    if given.limit is not None and (given.limit < 1 or given.lm_eval is None):
        parser.error("--limit must be at least 1, and belongs to --lm-eval")
    if given.lm_eval is not None and (given.words or given.data_dir is not None):
        parser.error("--lm-eval reads no text of the run: leave the words and --data-dir out")

    from hvdllm.errors import UserError
    from hvdllm.trainer.evaluate import evaluate_run, told
    from hvdllm.trainer.restore import language, restore
    from hvdllm.trainer.words import each
    from hvdllm.world.single import SingleWorld

    def say(text: str) -> None:
        print(text, file=sys.stderr)

    found = restore(given.run, given.step, say)
    if given.lm_eval is not None:
        from hvdllm.trainer.harness import evaluate_tasks

        tasks = evaluate_tasks(language(found), given.lm_eval, given.limit)
        said = json.dumps({"checkpoint": str(found.source), "tasks": tasks}) if given.json else table(tasks)
        print(said)
        return 0
    data = streamed(found, given) if found.config.text.endless else prepared(found, given, say)
    result = evaluate_run(found.config, found.model, data, found.device, SingleWorld())
    if result is None:
        raise UserError(f"{given.run} has nothing that is held out yet: no slice of its stream is whole")
    if given.json:
        values = {"checkpoint": str(found.source), **result.metrics}
        print(json.dumps(values | {"tokens": result.tokens}))
    else:
        said = told(data.task, result)
        loss = f"validation loss {result.loss:.4f} {each(found.config, data.task)}"
        print(f"{found.source}: {loss}{', ' * bool(said)}{said} ({result.tokens:,} {data.task.unit})")
    return 0


def prepared(found: Restored, given: argparse.Namespace, say: Callable[[str], None]) -> Prepared:
    """The data that a run was trained on. Raises UserError if they are not here."""
    from dataclasses import replace

    from hvdllm import registry, runs
    from hvdllm.config.words import of
    from hvdllm.errors import UserError
    from hvdllm.trainer.resume import asked

    words = [of("resume", str(given.run)), *given.words]
    config, _ = asked(words if given.data_dir is None else [*words, of("data_dir", given.data_dir)])
    trained = next((r.get("data_hash") for r in runs.records(given.run) if r.get("kind") == "run"), None)
    kind: Kind = registry.built(registry.of("task", found.config.task))
    data = kind.prepare(
        replace(found.config, task=config.task, text=config.text, data_dir=config.data_dir),
        say=say,
        whole=True,
        wanted=trained if isinstance(trained, str) else None,
    )
    if trained not in (None, data.data_hash):
        raise UserError(
            f"the data here are not those {given.run} was trained on (text=stdlib differs between Python versions): "
            "evaluate it where it was trained, name its files (text.path=… or task.path=…), or give --data-dir the "
            "shards of that machine"
        )
    return data


def streamed(found: Restored, given: argparse.Namespace) -> Prepared:
    """The slices of the stream that a run was trained on, from its log. Raises UserError if that is not here."""
    from hvdllm.config.words import key_of, value_of
    from hvdllm.errors import UserError
    from hvdllm.paths import path_of
    from hvdllm.task.causal_lm import CausalLM
    from hvdllm.trainer.restore import read_again

    if given.data_dir is not None or any(key_of(word) != "text.path" for word in given.words):
        raise UserError(f"{given.run} was trained on a stream, whose slices are in its log: give text.path= or nothing")
    path = path_of(value_of(given.words[-1]), "text.path=") if given.words else None
    assert isinstance(found.task, CausalLM)
    return read_again(found.config, found.task, given.run, found.source, path)


def table(tasks: dict[str, dict[str, float]]) -> str:
    """One line a metric of each task, with its standard error where there is one."""
    lines = []
    for task, metrics in tasks.items():
        for name, value in metrics.items():
            if not name.endswith("_stderr"):
                error = metrics.get(f"{name}_stderr")
                lines.append(f"{task:<24} {name:<16} {value:.4f}" + ("" if error is None else f" ± {error:.4f}"))
    return "\n".join(lines)
