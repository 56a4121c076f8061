#!/usr/bin/env bash
# Which exchange follows a stream that changes, and which forgets (conf/experiment/drift.yaml)? The stream is Python's
# standard library, then prose (the topics of Python's help), then code that the stream has not had yet. All exchanges
# train on equal tokens at an equal rate of intake, once without replay of the past and once with a quarter of each batch
# from it.
#
#   jobs/bench/drift.sh [SETTING=VALUE ...]
#
# It needs jobs/setup.sh --dev, Open MPI and the machine for itself: less than 30 minutes on two cores. The sizes below
# are variables of the environment too (SEEDS=0,1 RATE=60 jobs/bench/drift.sh). Everything is in runs/drift; runs that are
# finished are not made again, so the same command goes on where it was stopped. Remove runs/drift after another size.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
export PATH=$PWD/.venv/bin:$PATH
SEEDS=${SEEDS:-0,1,2}       # at least three, or nothing is tested
DOCUMENTS=${DOCUMENTS:-200} # of about 1,000 characters in code and prose; the last text has twice as many
RATE=${RATE:-22}            # documents a second, below the speed of the slowest exchange
BUDGET=${BUDGET:-190000}    # tokens, without replay; with it as many more as bring the run to the same place of the stream
REPLAY=${REPLAY:-0.25}      # share of each batch from the past
work=runs/drift
mkdir -p "$work"

python - "$work" "$DOCUMENTS" <<'END_OF_PYTHON'
import json, os, random, sys, sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from pydoc_data.topics import topics

OUT, COUNT = Path(sys.argv[1]), int(sys.argv[2])
ROOT = Path(sysconfig.get_path("stdlib"))
LEFT_OUT = {"test", "tests", "idlelib", "lib2to3", "pydoc_data", "site-packages", "dist-packages"}
EACH = 1000  # characters of a document


def code() -> Iterator[str]:
    for path in sorted(ROOT.rglob("*.py")):
        if not LEFT_OUT & set(path.relative_to(ROOT).parts):
            yield path.read_text(errors="replace")


def pieces(texts: Iterable[str]) -> list[str]:
    """Different pieces of whole lines, in an order by lot, so that a text is the same everywhere but at its borders."""
    found: dict[str, None] = {}
    for text in texts:
        piece = ""
        for line in text.splitlines(keepends=True):
            if piece and len(piece) + len(line) > EACH:
                found[piece], piece = None, ""
            piece += line
    order = sorted(found)
    random.Random(0).shuffle(order)
    return order


codes, proses = pieces(code()), pieces(topics.values())
if len(codes) < 3 * COUNT or len(proses) < COUNT:
    sys.exit(f"there are {len(codes):,} documents of code and {len(proses):,} of prose here: give a smaller DOCUMENTS")
for name, texts in ("code", codes[:COUNT]), ("prose", proses[:COUNT]), ("more-code", codes[COUNT : 3 * COUNT]):
    part = OUT / f"{name}.part"
    part.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    os.replace(part, OUT / f"{name}.jsonl")
END_OF_PYTHON

stream=("text.path=[$work/code.jsonl,$work/prose.jsonl,$work/more-code.jsonl]" "text.rate=$RATE")
for replay in 0 "$REPLAY"; do
  budget=$(python -c "print(round($BUDGET / (1 - $replay)))")
  echo "== replay=$replay: $budget tokens"
  sweep=(experiment=drift launch=horovodrun "${stream[@]}" "runs_dir=$work" "launch.sweep=replay-$replay" "seed=$SEEDS"
    "text.replay=$replay" "budget_tokens=$budget")
  hvdllm train -m "${sweep[@]}" "$@"
  hvdllm train -m "${sweep[@]}" launch.controller=mpi exchange=parameter_server "$@"
  echo "== the report of replay=$replay"
  hvdllm report "$work/replay-$replay" --out "$work/replay-$replay.html"
done

echo "== with replay against without"
hvdllm report "$work/replay-0" "$work/replay-$REPLAY" --by exchange,text.replay,budget_tokens --out "$work/report.html"
