"""`hvdllm sample RUN TEXT`: lets a run's model continue a text."""

from __future__ import annotations

import argparse
import sys

from hvdllm.paths import argument


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
    given = parser.parse_args(argv)
    for name, least in (("tokens", 1), ("temperature", 0), ("top_k", 0), ("seed", 0)):
        if getattr(given, name) < least:
            parser.error(f"--{name.replace('_', '-')} must be at least {least}")

    from hvdllm.task.causal_lm import continue_text
    from hvdllm.trainer.restore import language, restore

    found = language(restore(given.run, given.step, lambda text: print(text, file=sys.stderr)))
    text = continue_text(
        found.model,
        found.tokenizer,
        given.text,
        tokens=given.tokens,
        seed=given.seed,
        temperature=given.temperature,
        top_k=given.top_k or None,
        around=found.task.around,
    )
    print(text)
    return 0
