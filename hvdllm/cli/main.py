"""`hvdllm COMMAND ...`: finds the command, and turns what it raises into one sentence and an exit code.

Exit codes: 0 if all is done; 75 if a run was stopped and has saved (errors.STOPPED); 1 if the run failed; 2 if the
request cannot work; 130 after a second Ctrl-C.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import os
import sys
import time
import traceback

from hvdllm import __version__, pulse, screen
from hvdllm.cli.spared import spared
from hvdllm.errors import PeerError, RunError, UserError

COMMANDS = {
    "train": "train a model: alone, or as a rank under horovodrun, mpirun or srun",
    "prepare": "make the token shards that train would make by itself",
    "sample": "let a run's model continue a text",
    "evaluate": "a run's validation loss, again",
    "checkpoint": "the checkpoints of a run: list them, or verify that they are whole",
    "cooldown": "branch a finished model off a run on a stream",
    "export": "write a run's model for the library transformers",
    "bench": "measure: a step, a start, or every exchange on a network shaped for it",
    "report": "compare runs: pictures, tables and a verdict",
    "track": "send to W&B what was tracked offline",
    "doctor": "what this machine has, and what to do about what it has not",
}
FOLDERS = (
    "sample",
    "evaluate",
    "cooldown",
    "export",
    "report",
    "track",
)  # commands on runs, which may use parts of the user's modules
WAIT_S = 10.0  # seconds that other ranks wait for the launcher to end them, so that rank 0's sentence is not lost


def main(argv: list[str] | None = None) -> int:
    """Runs a command, and returns its exit code. argv: the words after the program's name, or None for sys.argv."""
    words = sys.argv[1:] if argv is None else argv
    lines = "\n".join(f"  {name:10} {text}" for name, text in COMMANDS.items())
    parser = argparse.ArgumentParser(
        "hvdllm",
        description="Trains transformer language models over Horovod, with the exchange of gradients in plain sight.",
        epilog=f"commands:\n{lines}\n\n`hvdllm COMMAND --help` says more. Try `hvdllm train`.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"hvdllm {__version__}")
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help=argparse.SUPPRESS)
    parser.add_argument("words", nargs=argparse.REMAINDER, metavar="...", help=argparse.SUPPRESS)
    with spared() as out, screen.guarded():
        code = obey(parser, words)
        out.flush()
        # Most commands do nothing but print, so lost output is a failure. A run still has its folder.
        return 1 if code == 0 and out.lost and words[:1] != ["train"] else code


def obey(parser: argparse.ArgumentParser, words: list[str]) -> int:
    """Runs the command, says how it failed if it did, and returns the exit code."""
    try:
        if not words:
            parser.print_help()
            return 2
        if words[0] not in COMMANDS and not words[0].startswith("-"):
            near = difflib.get_close_matches(words[0], COMMANDS, 1)
            hint = f", did you mean {near[0]}?" if near else "; `hvdllm --help` says what each does"
            raise UserError(f"there is no command {words[0]}: choose one of {', '.join(COMMANDS)}{hint}")
        given = parser.parse_args(words[:1])
        rest = words[1:]
        if given.command in FOLDERS and any(word.startswith("plugins=") for word in rest):
            from hvdllm.cli.flags import plugged

            rest = plugged(rest)
        code: int = importlib.import_module(f"hvdllm.cli.{given.command}").run(rest)
        return code
    except (Exception, KeyboardInterrupt) as error:
        return ended(error)


def ended(error: BaseException) -> int:
    """Says in one sentence why this process ends, and ends it at once if it is one of several ranks.

    Returns the exit code for an error, if this process is the only one.
    """
    if isinstance(error, UserError):
        return _end(str(error), 2, once=True)
    if isinstance(error, RunError):
        return _end(str(error), 1, once=error.everywhere)
    if isinstance(error, PeerError):
        return _end(str(error), 1, once=False, quiet=True)
    if isinstance(error, KeyboardInterrupt):
        return _end("ended at once; the last checkpoint counts", 130, once=False)
    if isinstance(error, OSError):  # an error of this machine for which no other place has a better sentence
        where = f"{error.filename}: " if error.filename else ""
        return _end(f"{where}{error.strerror or error}", 1, once=False)
    if isinstance(error, MemoryError):
        return _end("there is not enough memory here: a smaller model, micro_batch or text would fit", 1, once=False)
    traceback.print_exception(error)
    named = f"{type(error).__name__}: {error}"
    return _end("this is a bug in hvdllm; the lines above say where", 1, once=False, why=named)


def _end(sentence: str, code: int, *, once: bool, quiet: bool = False, why: str = "") -> int:
    """Prints the sentence and ends a rank at once, without Horovod's shutdown, which would wait for the other ranks.

    Args:
        sentence: why it ends.
        code: the exit code.
        once: all ranks raised the same, so rank 0 says it, and the others wait for the launcher to end them.
        quiet: another rank says why, so this one waits, too.
        why: what the other ranks are told of, if not the sentence.

    A rank that waits prints its sentence after WAIT_S seconds if it has not been ended. In a run the heartbeat ends it
    earlier, once it is known which rank has failed.

    Returns the exit code if this process is not one of several ranks.
    """
    from hvdllm.world.detect import Place, place
    from hvdllm.world.signals import TERMINATED, deafen

    try:
        here = place()
    except UserError:  # the ranks cannot find each other, but they have numbers
        rank = next((int(os.environ[v]) for v in ("SLURM_PROCID", "RANK", "PMIX_RANK") if v in os.environ), 0)
        here = Place("srun", rank, rank + 1)
    line: str | None = None
    if here.size > 1 and code == 1:
        failed = pulse.ANOTHER if quiet or (once and here.rank > 0) else pulse.ALL if once else pulse.SELF
        line = pulse.ends(why or sentence, failed)
    if line is None:
        deafen()
    who = f"hvdllm: rank {here.rank}: " if here.size > 1 and not once else "hvdllm: "
    if (once and here.rank > 0) or quiet:
        if TERMINATED.is_set() and line is None:  # the launcher has sent SIGTERM already
            os._exit(code)
        time.sleep(WAIT_S)  # SIGTERM does not end a rank that is watched: it may have something to say
    if not (once and here.rank > 0 and here.launcher == "srun"):  # srun may end no rank, but rank 0 has said it
        said = f"{who}{screen.brief(screen.one_line(sentence))}"
        for each in filter(None, (said if why or not line else "", line)):
            print(each, file=sys.stderr, flush=True)
    sys.stdout.flush()
    if here.size > 1:
        os._exit(code)
    return code


if __name__ == "__main__":
    sys.exit(main())
