"""`hvdllm sample RUN TEXT`: lets a run's model continue a text."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from hvdllm.paths import argument

LOOK_S = 0.5  # seconds between two looks for a publication


def run(argv: list[str]) -> int:
    """Runs the command, and returns its exit code. Raises UserError."""
    parser = argparse.ArgumentParser("hvdllm sample", description="Lets a run's model continue a text.")
    parser.add_argument("run", type=argument, help="folder of the run, runs/<name>")
    parser.add_argument(
        "text", nargs="?", default="", help="what to continue, or to answer after text=chat; default: a new document"
    )
    parser.add_argument("--tokens", type=int, default=200, help="tokens to write at most (200)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token, 1 as learnt (0.8)")
    parser.add_argument("--top-k", type=int, default=50, help="draw from this many likeliest tokens; 0: from all (50)")
    parser.add_argument("--seed", type=int, default=0, help="another seed, another text (0)")
    parser.add_argument("--step", type=int, help="the checkpoint of this step; default: the newest whole one")
    parser.add_argument(
        "--follow", action="store_true", help="write a sample of each publication (publish_every), until Ctrl-C"
    )
    given = parser.parse_args(argv)
    for name, least in (("tokens", 1), ("temperature", 0), ("top_k", 0), ("seed", 0)):
        if getattr(given, name) < least:
            parser.error(f"--{name.replace('_', '-')} must be at least {least}")

    from hvdllm.errors import UserError
    from hvdllm.task.causal_lm import continue_text
    from hvdllm.trainer.restore import Language, language, restore

    def say(text: str) -> None:
        print(text, file=sys.stderr)

    def written(found: Language) -> str:
        return continue_text(
            found.model,
            found.tokenizer,
            given.text,
            tokens=given.tokens,
            seed=given.seed,
            temperature=given.temperature,
            top_k=given.top_k or None,
            around=found.task.around,
        )

    if not given.follow:
        print(written(language(restore(given.run, given.step, say))))
        return 0
    if given.step is not None:
        parser.error("--follow shows publications, and --step names a checkpoint: give one of them")
    if not (given.run / "config.yaml").exists():
        raise UserError(f"{given.run} is not the folder of a run: it has no config.yaml")
    try:
        for path in publications(given.run):
            said = list[str]()  # printed only if it is not about files that have just been deleted
            try:
                text = written(language(restore(given.run, None, said.append, path)))
            except (OSError, UserError):
                if latest(given.run) in (path, None):
                    raise
                continue  # a later publication has taken its place while it was read
            for each in said:
                say(each)
            print(f"--- {int(path.name.partition('-')[0]):,} tokens\n{text}\n", flush=True)
    except KeyboardInterrupt:
        return 0
    raise UserError(f"{given.run} is gone: it was removed or moved")


def latest(run: Path) -> Path | None:
    """The newest publication of a run, or None if there is none."""
    from hvdllm.checkpoint.write import PUBLICATION

    with contextlib.suppress(OSError):
        name = os.readlink(run / "published" / "latest")
        if PUBLICATION.fullmatch(name):
            return run / "published" / name
    return None


def publications(run: Path) -> Iterator[Path]:
    """The newest publication of a run, and each later one as it comes. Ends only if the run's folder is gone."""
    last = None
    while run.is_dir():
        if (found := latest(run)) not in (last, None):
            last = found
            assert found is not None
            yield found
        else:
            time.sleep(LOOK_S)
