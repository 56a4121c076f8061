#!/usr/bin/env bash
# ACCO's fine-tuning comparison with all else equal (conf/experiment/acco_finetune.yaml): ACCO against DDP as its paper ran
# it (a sum after every micro-batch, in fp32), against DDP as its users should run it, and against our all-reduce. A small
# model is trained on the source of Python's standard library, and then tuned on questions about that library: "What does
# os.path.join do?", answered by the first paragraph of its docstring.
#
#   jobs/bench/acco_finetune.sh [SETTING=VALUE ...]
#
# It needs jobs/setup.sh --dev, root and iproute2, and the machine for itself: about 25 minutes on two cores. The sizes
# below are variables of the environment too (SEEDS=0 UPDATES=20 BASE=100000 jobs/bench/acco_finetune.sh). Everything is in
# runs/acco-finetune; what is there already is used again, so the same command goes on where it was stopped.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
export PATH=$PWD/.venv/bin:$PATH
BASE=${BASE:-1200000}       # tokens on which the base is trained
SEEDS=${SEEDS:-0,1,2,3,4}   # at least three, or nothing is tested
UPDATES=${UPDATES:-100}     # of the fine-tuning
SEQUENCES=${SEQUENCES:-8}   # conversations a micro-batch; an update takes two of each of the two ranks
LINK=${LINK:-200mbit}       # at which a sum in fp32 takes about as long as the computing of an update
TARGET=${TARGET:-4.1}       # validation loss to reach, named before the runs
work=runs/acco-finetune talk=runs/acco-finetune/talk.jsonl
mkdir -p "$work"

[ -e "$talk" ] || python - "$talk" <<'END_OF_PYTHON'
import ast, json, os, sys, sysconfig
from pathlib import Path

ROOT, OUT = Path(sysconfig.get_path("stdlib")), Path(sys.argv[1])
LEFT_OUT = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages"}
answers: dict[str, str] = {}


def walk(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, name: str) -> None:
    if text := ast.get_docstring(node):
        answers[name] = " ".join(text.split("\n\n")[0].split())
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            walk(child, f"{name}.{child.name}")


for path in sorted(ROOT.rglob("*.py")):
    parts = path.relative_to(ROOT).with_suffix("").parts
    if not LEFT_OUT & set(parts) and not parts[-1].startswith("test"):
        walk(ast.parse(path.read_bytes()), ".".join(part for part in parts if part != "__init__"))
lines = [json.dumps({"prompt": f"What does {name} do?", "completion": text}) for name, text in answers.items() if text]
OUT.with_suffix(".part").write_text("\n".join(lines) + "\n")
os.replace(OUT.with_suffix(".part"), OUT)
print(f"{len(lines):,} questions")
END_OF_PYTHON

echo "== the base"
horovodrun --gloo -np 2 hvdllm train name=base runs_dir="$work" budget_tokens="$BASE" save_every="$BASE" eval_every="$BASE" sample_every=0 |
  tail -n 12
base=("text.path=$talk" "text.tokenizer=$work/base/tokenizer.json" "init_from=$work/base")

# Batches are items that count batch_tokens in the mean: exactly two micro-batches of each of two ranks, for every exchange.
batch=$(python - $((4 * SEQUENCES)) "${base[@]}" <<'END_OF_PYTHON'
import sys

from hvdllm.config.compose import compose
from hvdllm.task.causal_lm import prepare
from hvdllm.trainer.assemble import items_a_batch

items, words = int(sys.argv[1]), ["experiment=acco_finetune", *sys.argv[2:]]
train = prepare(compose(words), say=lambda text: print(text, file=sys.stderr), whole=True, wanted=None).train
batch = round(items * train.units)
assert all(items_a_batch(compose([*words, f"batch_tokens={batch}", f"exchange={e}"]), train) == items for e in ("acco", "ddp"))
print(batch)
END_OF_PYTHON
)

echo "== the sweep: $UPDATES updates of about $batch tokens"
budget=$((UPDATES * batch))
hvdllm train -m experiment=acco_finetune "${base[@]}" runs_dir="$work" launch.sweep=sweep launch.link="$LINK" seed="$SEEDS" \
  micro_batch="$SEQUENCES" batch_tokens="$batch" budget_tokens="$budget" eval_every=$((budget / 10)) log_every=$((10 * batch)) \
  target_loss="$TARGET" "$@"

echo "== the report"
hvdllm report "$work/sweep" --by exchange,wire --reference acco --out "$work/report.html"
