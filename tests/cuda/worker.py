"""Runs cases for test_cuda.py, each a line of JSON on its input, and answers each with one: {"error", "findings"} or
{"refused"}, where a setting is said to be wrong.

    python worker.py FOLDER COMPILER

A case is a whole run by trainer/life.py: data, model, exchange, wire, update, evaluation, sample, checkpoint, end; as
rank 0 of several, on device 1 of two, so that what lies on device 0 by mistake is seen.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
import sys
import traceback
from pathlib import Path
from typing import Any

import fake_cuda

FOLDER = Path(sys.argv[1])
fake_cuda.load(FOLDER, sys.argv[2])

import bugs  # noqa: E402
import fake_ranks  # noqa: E402

from hvdllm.checkpoint import write  # noqa: E402
from hvdllm.config import compose  # noqa: E402
from hvdllm.errors import UserError  # noqa: E402
from hvdllm.exchange.wire import hierarchical  # noqa: E402
from hvdllm.trainer import life  # noqa: E402
from hvdllm.world.detect import Place  # noqa: E402
from hvdllm.world.single import SingleWorld  # noqa: E402

BASE = [
    "device=cuda", "device.share=true",  # with ranks that are not there
    "text=files", f"text.path={FOLDER}/text", "text.tokenizer=bytes", f"data_dir={FOLDER}/data",
    f"runs_dir={FOLDER}/runs", "model.layers=1", "model.width=16", "model.heads=2", "model.kv_heads=1",
    "model.context=8", "batch_tokens=32", "eval_tokens=32", "sample_tokens=1", "log_every=32",
    "text.validation_share=0.1", "budget_tokens=160", "save_every=0", "eval_every=0", "sample_every=0", "audit_every=0",
    "resume=never", "name=case", "track=none",
]  # fmt: skip


class Show:
    def progress(self, values: Any) -> None: ...

    def header(self, lines: Any) -> None: ...

    def finish(self, end: Any, run: Any, sample: Any) -> None: ...

    def say(self, text: str) -> None: ...


def train(world: str, size: int, words: list[str]) -> None:
    """With `resume=must` once without it, and then further."""
    if "resume=must" in words:
        train(world, size, [word for word in words if word != "resume=must"])
        words = [*words, "budget_tokens=256"]
    words = [f"micro_batch={1 if size > 1 else 4}", *words]
    other = any(word.startswith("task=") for word in words)  # whose model is no GPT
    base = [word for word in BASE if not (other and word.startswith("model."))]
    config = compose.compose([*base, *words])
    if world == "virtual":
        from hvdllm.world import virtual
        from hvdllm.world.hub import Links

        links = Links(1e9) if config.world.tokens_per_s else None
        virtual.run(size, lambda one: life.run(config, words, Place(), one, Show()), links=links)
        return
    if world == "single":
        alone = SingleWorld()
        alone.local_rank = 1
        life.run(config, words, Place(), alone, Show())
        return
    place = Place("torchrun" if world == "torch" else "horovodrun", 0, size, 1, 2)
    several: Any
    if world == "torch":
        from hvdllm.world.torch import TorchWorld

        several = TorchWorld(place, 60.0, "cuda")
    else:
        from hvdllm.world.hvd import HorovodWorld

        groups = config.wire.hierarchical or getattr(config.exchange, "inner", "none") != "none"
        several = HorovodWorld(place, 60.0, groups=groups)
    life.run(config, words, place, several, Show())
    several.close()


def case(world: str, size: int, words: list[str], bug: str | None) -> dict[str, Any]:
    shutil.rmtree(FOLDER / "runs", ignore_errors=True)
    fake_ranks.put_horovod(size)
    fake_ranks.put_distributed(size)
    for module in [module for name, module in sys.modules.items() if name.startswith("hvdllm.")]:
        if module.__name__.startswith("hvdllm.config."):  # holds no tensors
            continue
        for value in list(vars(module).values()):
            if hasattr(value, "cache_clear"):
                value.cache_clear()
    error = None
    with fake_cuda.watch() as books:
        try:
            with bugs.planted(bug):
                train(world, size, words)
        except UserError as refused:
            return {"refused": str(refused)}
        except BaseException:
            error = traceback.format_exc()
    return {"error": error, "findings": sorted(books.findings.values()), "kernels": books.kernels}


def main() -> None:
    finish = write._finish

    def finishing(folder: Path, step: int, values: Any, hashes: dict[str, Any], keep: int) -> Any:
        """Ranks that do not exist write no files, and say that they are on the first one's place."""
        if not logical:
            hashes = {name: found for name, found in hashes.items() if name.startswith("rank-00000")}
        return finish(folder, step, values, hashes, keep)

    write._finish = finishing  # type: ignore[assignment]
    save = write.save_file
    write.save_file = lambda tensors, path: save({name: x.clone() for name, x in tensors.items()}, path)  # seen to read
    hierarchical._layout = lambda world: (2, world.size // 2)
    logical = False  # are the ranks of this case threads?
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        asked = json.loads(line)
        logical = asked["world"] == "virtual"
        found = case(**asked)
        gc.freeze()  # a case ends with a collection, and the modules that it has imported are most of what is looked at
        answers.write(json.dumps(found) + "\n")
        answers.flush()
    os._exit(0)  # autograd's threads of the fake devices do not end by themselves


main()
