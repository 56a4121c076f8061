"""The CUDA branches run without a GPU: whole runs on fake CUDA tensors (fake_cuda.py), with stand-ins for the
collectives of Horovod and NCCL (fake_ranks.py), since no machine of the tests has a GPU. Not yet run on a GPU.

What is run comes from the tables of exchanges and wires, so a new one is run too. `bugs.py` plants bugs that the check
must find.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from bugs import BUGS

from hvdllm import registry

HERE = Path(__file__).parent
# Settings that let something happen in the few rounds of a run.
MORE = {
    "delayed": "exchange.warmup_tokens=64",
    "local_sgd": "exchange.local_steps=2",
    "diloco": "exchange.local_steps=2",
    "streaming_diloco": "exchange.local_steps=4 exchange.fragments=2 exchange.delay=1 exchange.bucket_mb=0.003",
    "fedavg": "exchange.clients=2 exchange.local_steps=2",
    "topk": "wire.warmup_tokens=64",
    "sign": "wire.warmup_tokens=64",
    "powersgd": "wire.warmup_tokens=64 wire.min_compression=1",
}
# Ranks that carry what an exchange needs; of all others both.
ONLY = {"ddp": ("torch",), "horovod": ("hvd",), "parameter_server": ("virtual", "single")}
WORLD = {"virtual": "world=virtual world.size=2"}
LATE = "exchange=diloco exchange.local_steps=2 exchange.overlap=true exchange.outer_lr=0.2"
ACTS = "save_every=96 eval_every=96 sample_every=96 audit_every=96"
INNER = "exchange=local_sgd exchange.local_steps=2 exchange.inner=allreduce exchange.group=2 budget_tokens=512"
ROWS = "task=ratings task.users=70 task.clicks=900 task.sparse=true model.width=4"  # of tables, which ranks gather
FURTHER = [
    ("hvd", f"{LATE} exchange.host_memory=true"), ("torch", f"exchange=acco wire=int8 {ACTS}"),
    ("hvd", "exchange=sharded wire.hierarchical=true"), ("torch", "exchange=sharded wire.hierarchical=true"),
    ("hvd", "exchange=acco wire.hierarchical=true wire=int8"), ("torch", INNER),
    ("hvd", f"exchange=delayed exchange.warmup_tokens=64 wire=int8 {ACTS} resume=must"),
    ("torch", "exchange=acco exchange.timed=true"), ("hvd", "exchange=allreduce exchange.reduction=adasum"),
    ("virtual", "world=virtual world.size=2 world.tokens_per_s=2000 exchange=acco wire=int8"),
    ("single", f"exchange=diloco exchange.local_steps=2 exchange.host_memory=true {ACTS}"),
    ("single", "exchange=parameter_server exchange.staleness=0"), ("single", "optim=nadam trace_steps=2:4"),
    ("hvd", f"{ROWS} {ACTS} resume=must"), ("torch", ROWS), ("single", ROWS),
    ("single", "model.checkpointing=true precision=bf16 model.tied=false model.mlp=swiglu model.dropout=0.1"),
]  # fmt: skip
THOROUGH = [
    ("torch", f"{LATE} exchange.host_memory=true"), ("hvd", f"exchange=acco wire=int8 {ACTS}"),
    ("virtual", f"world=virtual world.size=2 exchange=acco wire=int8 {ACTS} resume=must"),
    ("torch", f"exchange=delayed exchange.warmup_tokens=64 wire=topk wire.momentum=0.9 {ACTS} resume=must"),
    ("single", f"{LATE} {ACTS} resume=must"), ("single", "optim=sgd optim.momentum=0.9"),
    ("hvd", "exchange=delayed exchange.compensation=0.1 exchange.warmup_tokens=64"),
    ("torch", "exchange=ddp exchange.sync=micro_batch"),
]  # fmt: skip


def of(group: str, name: str) -> str:
    return f"{group}={name} {MORE.get(name, '')}".strip()


def cases() -> Iterator[Any]:
    """(world, words, must): each exchange with the plain wire on one world, each wire below one exchange on either; all
    pairs on all worlds by `--all`. must: it may not be refused, as some pairs are."""
    wires = registry.kinds("wire")
    for exchange in registry.kinds("exchange"):
        for world in ONLY.get(exchange, ("hvd", "torch")):
            for wire in wires:
                words = " ".join([WORLD.get(world, ""), of("exchange", exchange), of("wire", wire)]).strip()
                chosen = wire == "fp32" and (world == "hvd" or exchange in ONLY)
                chosen = chosen or (exchange, world) in (("delayed", "hvd"), ("acco", "torch"))
                chosen = chosen or (exchange, wire, world) == ("delayed", "powersgd", "torch")
                yield case(world, words, chosen, must=wire == "fp32")
    yield from (case(*each, chosen=True) for each in FURTHER)
    yield from (case(*each, chosen=False) for each in THOROUGH)


def case(world: str, words: str, chosen: bool, must: bool = True) -> Any:
    return pytest.param(world, words, must, marks=[] if chosen else [pytest.mark.thorough], id=f"{world} {words}")


class Worker:
    """A process that has fake devices; a new one where the last has died."""

    def __init__(self, folder: Path, compiler: str) -> None:
        self.command = [sys.executable, str(HERE / "worker.py"), str(folder), compiler]
        self.said = folder / "stderr.txt"
        self.process: subprocess.Popen[str] | None = None

    def run(self, world: str, words: str, bug: str | None = None) -> dict[str, Any]:
        if self.process is None or self.process.poll() is not None:
            with open(self.said, "w") as said:
                self.process = subprocess.Popen(
                    self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said, text=True,
                    env=os.environ | {"OMP_NUM_THREADS": "1"},
                )  # fmt: skip
        assert self.process.stdin and self.process.stdout
        size = {"single": 1}.get(world, 4 if "hierarchical" in words or "exchange.group" in words else 2)
        asked = {"world": world, "size": size, "words": words.split(), "bug": bug}
        self.process.stdin.write(json.dumps(asked) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        assert answer, self.said.read_text()[-3000:]
        found: dict[str, Any] = json.loads(answer)
        return found

    def close(self) -> None:
        if self.process is not None:
            self.process.communicate()


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        pytest.skip("no C++ compiler is here, and the fake devices need one: install g++ or set CXX")
    if torch.version.cuda:
        pytest.skip("this torch has real CUDA, whose place the fake devices would take: run it with a build for CPUs")
    folder = tmp_path_factory.mktemp("cuda")
    shutil.copytree(HERE.parents[1] / "hvdllm" / "optim", folder / "text", ignore=shutil.ignore_patterns("__pycache__"))
    worker = Worker(folder, compiler)
    yield worker
    worker.close()


@pytest.mark.parametrize(("world", "words", "must"), list(cases()))
def test_a_run_is_clean(worker: Worker, world: str, words: str, must: bool) -> None:
    found = worker.run(world, words)
    if "refused" in found and not must:
        pytest.skip(found["refused"])
    assert "refused" not in found, found["refused"]
    assert found["error"] is None, found["error"]
    assert not found["findings"], "\n".join(found["findings"])
    assert found["kernels"] > 500, "it hardly ran"


@pytest.mark.parametrize("name", BUGS)
def test_a_planted_bug_is_found(worker: Worker, name: str) -> None:
    bug = BUGS[name]
    found = worker.run(bug.world, " ".join(bug.words), name)
    assert found["error"] or found["findings"]
