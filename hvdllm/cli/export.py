"""`hvdllm export RUN OUT`: writes a run's model as a folder that the library transformers loads."""

from __future__ import annotations

import argparse
import sys

from hvdllm.paths import argument


def run(argv: list[str]) -> int:
    """Runs the command, and returns its exit code. Raises UserError or RunError."""
    parser = argparse.ArgumentParser(
        "hvdllm export",
        description="Writes a run's model as a folder of transformers, for AutoModelForCausalLM.from_pretrained(OUT), "
        "or AutoModelForMaskedLM after task=masked_lm.",
    )
    parser.add_argument("run", type=argument, help="folder of the run, runs/<name>")
    parser.add_argument("out", type=argument, help="folder to write; one of an earlier export is replaced")
    parser.add_argument("--step", type=int, help="the checkpoint of this step; default: the newest whole one")
    parser.add_argument(
        "--positions",
        type=int,
        help="most tokens of a sequence that the folder names, where positions are rotary; default: model.context",
    )
    parser.add_argument(
        "--adapter", action="store_true", help="of a run with model.lora_rank, its adapters alone, in peft's format"
    )
    given = parser.parse_args(argv)
    if given.positions is not None and given.positions < 1:
        parser.error("--positions must be at least 1")
    if given.positions is not None and given.adapter:
        parser.error("--positions is for a whole model: adapters say nothing of positions, leave it out")

    from hvdllm.models.gpt import GPT
    from hvdllm.models.lora import merge
    from hvdllm.trainer.export import export, export_adapter
    from hvdllm.trainer.restore import language, restore

    found = restore(given.run, given.step, lambda text: print(text, file=sys.stderr))
    if given.adapter:
        export_adapter(language(found), given.out)
        print(f"{given.out}: adapters of {found.source}")
        return 0
    if isinstance(found.model, GPT):
        merge(found.model)
    kind = export(found, given.out, given.positions)
    print(f"{given.out}: {kind}, {sum(p.numel() for p in found.model.parameters()):,} parameters, of {found.source}")
    return 0
