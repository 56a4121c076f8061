"""`hvdllm COMMAND ...`: finds the command, and turns what it raises into one sentence and an exit code.

Exit codes: 0 done; 75 a run was stopped and has saved (errors.STOPPED); 1 the run failed; 2 the request cannot work;
130 ended by a second Ctrl-C.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import os
import sys
import time
import traceback

from hvdllm import __version__, screen
from hvdllm.cli.spared import spared
from hvdllm.errors import PeerError, RunError, UserError

COMMANDS = {
    "train": "train a model: alone, or as a rank under horovodrun, mpirun or srun",
    "prepare": "make the token shards that train would make by itself",
    "sample": "let a run's model continue a text",
    "evaluate": "a run's validation loss, again",
    "bench": "measure: a step, a start, or every exchange on a network shaped for it",
    "report": "compare runs: pictures, tables and a verdict",
    "track": "send to W&B what was tracked offline",
    "doctor": "what this machine has, and what to do about what it has not",
}
FOLDERS = ("sample", "evaluate", "report", "track")  # of runs, made with parts that a module of the user's may have
WAIT_S = 10.0  # that other ranks give the launcher to end them, so that rank 0's sentence is not lost


def main(argv: list[str] | None = None) -> int:
    """Runs a command. argv: without the program's name."""
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
        # What is written to the screen is all that most commands do; a run has its folder.
        return 1 if code == 0 and out.lost and words[:1] != ["train"] else code


def obey(parser: argparse.ArgumentParser, words: list[str]) -> int:
    """The command, and how it ended. Returns the exit code."""
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
    except UserError as error:
        return _end(str(error), 2, once=True)
    except RunError as error:
        return _end(str(error), 1, once=error.everywhere)
    except PeerError as error:
        return _end(str(error), 1, once=False, quiet=True)
    except KeyboardInterrupt:
        return _end("ended at once; the last checkpoint counts", 130, once=False)
    except OSError as error:  # of this machine, and where it enters nobody had a better sentence
        where = f"{error.filename}: " if error.filename else ""
        return _end(f"{where}{error.strerror or error}", 1, once=False)
    except MemoryError:
        return _end("there is not enough memory here: a smaller model, micro_batch or text would fit", 1, once=False)
    except Exception:
        traceback.print_exc()
        return _end("this is a bug in hvdllm; the lines above say where", 1, once=False)


def _end(sentence: str, code: int, *, once: bool, quiet: bool = False) -> int:
    """Says the sentence and ends the process, past Horovod's own end, which would wait for the other ranks.

    once: all ranks raised the same, rank 0 says it and the others wait to be ended by the launcher. quiet: another
    rank says why. Should nobody end this rank within WAIT_S, it says what it knows.
    """
    from hvdllm.world.detect import Place, place
    from hvdllm.world.signals import TERMINATED, deafen

    deafen()
    try:
        here = place()
    except UserError:  # ranks that know nothing of each other still have numbers
        rank = next((int(os.environ[v]) for v in ("SLURM_PROCID", "RANK", "PMIX_RANK") if v in os.environ), 0)
        here = Place("srun", rank, rank + 1)
    who = f"hvdllm: rank {here.rank}: " if here.size > 1 and not once else "hvdllm: "
    if (once and here.rank > 0) or quiet:
        if TERMINATED.is_set():  # by the launcher, while this rank still took it for an ask
            os._exit(code)
        time.sleep(WAIT_S)
    if not (once and here.rank > 0 and here.launcher == "srun"):  # srun may end nobody: rank 0 has spoken
        print(f"{who}{screen.one_line(sentence)}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    if here.size > 1:
        os._exit(code)
    return code


if __name__ == "__main__":
    sys.exit(main())
