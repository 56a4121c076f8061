"""Phase x exchange x mode on real ranks: breaks one rank, and looks at how the job ends and what its user reads last.

    python tests/fault_matrix.py all|pairs [EXCHANGE ...]

all: every phase with every mode for each exchange; pairs: a sample in which any two of phase, exchange and mode meet.
See jobs/bench/fault_matrix.sh.
"""

from __future__ import annotations

import itertools
import random
import re
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from launch import BATCH, HVDLLM, LIMIT_S, Job, records, words_of
from no_hang import launcher, settings

from hvdllm import registry
from hvdllm.faults import MODES, ONCE, PHASES

STEPS, STEP, BROKEN = 8, 4, 1
LOCAL = 5  # times as many steps where ranks meet every 8 local ones
AFTER_S = 4.0  # hang_after
LONGEST_S = 16.0  # world.timeout_s, of which a phase that may last long takes nearly all
STILL = ("stop", "hang")


@dataclass(frozen=True)
class Case:
    """One cell of the matrix. The broken rank is 1; 0 where a disk is full, since rank 0 writes the records."""

    exchange: str
    phase: str
    mode: str

    @property
    def rank(self) -> int:
        return 0 if self.mode == "disk" else BROKEN

    @property
    def fault(self) -> str:
        step = "" if self.phase in ONCE else f"step={STEP},"
        return f"rank={self.rank},{step}phase={self.phase},mode={self.mode}"


@dataclass(frozen=True)
class Outcome:
    """How a case ended.

    code: of the launcher
    last: the last line of what hvdllm said
    seconds: from the fault to the end of the last process
    problem: what is wrong with that, or ""
    """

    code: int
    last: str
    seconds: float
    problem: str


def run(case: Case, tmp: Path, name: str) -> Outcome:
    every = [f"save_every={2 * BATCH}", f"eval_every={2 * BATCH}", "eval_tokens=64", "micro_batch=11"]
    limits = [f"hang_after={AFTER_S:g}", f"world.timeout_s={LONGEST_S:g}"]
    fault = ["debug=faults", f'debug.fault="{case.fault}"']
    steps = STEPS * (LOCAL if registry.parts("exchange")[case.exchange].facts.local else 1)
    words = words_of(tmp, name, steps, *every, *limits, *fault, *settings(case.exchange))
    with Job([*HVDLLM, "train", *words], launcher(case.exchange), 2) as job:
        mark = f"hvdllm: rank {case.rank}: debug.fault"
        job.until(lambda: mark in job.out)
        since = time.monotonic()
        try:
            job.process.wait(LIMIT_S)
            job.until_gone()
        except Exception:
            return Outcome(-1, "", LIMIT_S, "it does not end")
        seconds, out, code = time.monotonic() - since, job.out, job.process.returncode or 0
    said = [found[1] for found in re.finditer(r"(hvdllm: (?!rank \d+: debug\.fault).*)", out)]
    last = said[-1] if said else ""
    return Outcome(code, last, seconds, problem(case, code, last, out, tmp / "runs" / name))


def problem(case: Case, code: int, last: str, out: str, run: Path) -> str:
    """What is wrong with this end, or ""."""
    if case.mode == "disk":
        ended = [record["reason"] for record in records(run, "end")]
        named = re.search("cannot (write|be written)", last)
        wrong = named is None and ended != ["budget"]
        return "the full disk is not named" if wrong else ""
    if code == 0:
        return "the launcher returns 0"
    if f"rank {case.rank} on host" not in last:
        return f"the last line does not name the rank: {last or out[-300:]!r}"
    right = {
        "exception": "Injected: debug.fault raised this", "memory": "there is not enough memory here",
        "kill": "without a word: it was killed", "exit": "without a word", "stop": "no longer answers",
        "hang": "does not go on",
    }[case.mode]  # fmt: skip
    if right not in last:
        return f"the last line does not say `{right}`: {last}"
    beside = case.phase == "update"  # ACCO and the server make it beside the loop, whose phase is told
    if f"phase {case.phase}" not in last and not beside:
        return f"the last line does not name the phase: {last}"
    if case.mode in STILL and not (run / "stacks-rank-0.txt").exists():
        return "rank 0 has written no stacks"
    if case.mode == "hang" and "in commit" not in (run / f"stacks-rank-{case.rank}.txt").read_text():
        return "the stack of the rank that hangs does not show where"
    return ""


def pairs(exchanges: list[str], seed: int = 0) -> list[Case]:
    """Few cases in which any phase and exchange, phase and mode, exchange and mode meet: greedily, those first that
    bring the most new pairs."""
    every = [Case(*each) for each in itertools.product(exchanges, PHASES, MODES)]
    random.Random(seed).shuffle(every)

    def met(case: Case) -> set[tuple[str, str]]:
        return {(case.exchange, case.phase), (case.phase, case.mode), (case.exchange, case.mode)}

    missing, chosen = {pair for case in every for pair in met(case)}, []
    while missing:
        best = max(every, key=lambda case: len(met(case) & missing))
        missing -= met(best)
        chosen.append(best)
    return chosen


def main(argv: list[str]) -> int:
    exchanges = argv[1:] or list(registry.parts("exchange"))
    cases = pairs(exchanges) if argv[0] == "pairs" else None
    cases = cases or [Case(*each) for each in itertools.product(exchanges, PHASES, MODES)]
    found: dict[Case, Outcome] = {}
    with tempfile.TemporaryDirectory() as tmp:
        for number, case in enumerate(sorted(cases, key=lambda case: exchanges.index(case.exchange))):
            found[case] = outcome = run(case, Path(tmp), f"run-{number}")
            said = f"FAILED: {outcome.problem}" if outcome.problem else "ok"
            print(f"{case.exchange:20} {case.phase:10} {case.mode:9} {outcome.seconds:5.1f} s  {said}", flush=True)
    print("\n" + table(found))
    return int(any(outcome.problem for outcome in found.values()))


def table(found: dict[Case, Outcome]) -> str:
    """Markdown: how many of each phase and mode ended rightly, and the longest time to the end."""
    lines = [f"| phase | {' | '.join(MODES)} |", "|---" * (1 + len(MODES)) + "|"]
    for phase in PHASES:
        cells = []
        for mode in MODES:
            some = [each for case, each in found.items() if (case.phase, case.mode) == (phase, mode)]
            right = sum(not each.problem for each in some)
            longest = max((each.seconds for each in some), default=0.0)
            cells.append(f"{right}/{len(some)}, {longest:.0f} s" if some else "")
        lines.append(f"| {phase} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
