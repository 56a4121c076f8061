"""Conversations weigh what the assistant says, so ranks have uneven weights in every round: against one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from hvdllm import registry
from hvdllm.config.compose import compose
from hvdllm.settings import Config
from hvdllm.task.causal_lm import CausalLM
from hvdllm.task.stream import Stream
from hvdllm.text.chat import BEGINS, COUNTS, Around
from hvdllm.text.conversations import Conversations
from hvdllm.text.tokenize import BYTES, Tokenizer
from hvdllm.trainer.assemble import assemble, items_a_batch
from hvdllm.trainer.backward import Loss, backward
from hvdllm.world import virtual

STEPS = 4
WORDS = [
    "text=chat", "text.path=x", "precision=fp64", "model.layers=1", "model.width=16", "model.heads=2",
    "model.context=24", "micro_batch=2", "batch_tokens=60", "optim.clip=1", "optim.lr=0.01", "exchange.bucket_mb=0.01",
    "eval_every=0", "save_every=0", "sample_every=0", "audit_every=0", "schedule=constant",
]  # fmt: skip
PARTS = registry.parts("exchange")
IDENTICAL = [
    name
    for name, part in PARTS.items()
    if part.facts.identical and part.facts.carries in (registry.SUMS, registry.PIECES) and name != "acco_timed"
]


def conversations() -> Conversations:
    """Of 3 to 30 tokens, of which one to nearly all count."""
    draw, out = np.random.RandomState(0), []
    for _ in range(40):
        ids = draw.randint(256, size=draw.randint(3, 30)).astype(np.uint32)
        ids[draw.randint(1, len(ids)) if draw.rand() < 0.7 else -1 :] |= COUNTS
        ids[0] |= BEGINS
        out.append(ids)
    return Conversations(np.concatenate(out), 24, end=256)


def task_of(config: Config) -> CausalLM:
    return CausalLM(config, 257, Tokenizer(BYTES), around=Around("", "", "", special=False))


def train(config: Config, size: int) -> tuple[list[dict[str, torch.Tensor]], list[list[int]]]:
    """The weights of each rank after STEPS commits, and how many targets each counted in its rounds."""

    def body(world: Any) -> tuple[dict[str, torch.Tensor], list[int]]:
        task, items, cpu = task_of(config), conversations(), torch.device("cpu")
        model = task.build()
        loss = Loss(task, model, precision="fp64", device=cpu, seed=0, rank=world.rank, dropout=False)
        parts = assemble(config, model, loss, world, lambda tokens: 1.0)
        batch = items_a_batch(config, items)
        stream = Stream(items, batch=batch, micro_batch=2, seed=0, rank=world.rank, size=size, device=cpu)
        counted, commits = [0], 0
        for each in parts.exchange.feed(stream):
            counted[-1] += each.tokens
            counted += [0] * each.last
            commits += parts.exchange.advance(each, backward(parts.module, each)) is not None
            if commits == STEPS:
                break
        parts.exchange.settle()
        stream.close()
        return {name: p.detach().clone() for name, p in model.named_parameters()}, counted[:-1]

    found = virtual.run(size, body)
    return [weights for weights, _ in found], [counted for _, counted in found]


def plain(config: Config) -> dict[str, torch.Tensor]:
    """One process: the mean over all counted targets of the global batch, by torch's own loss and optimizer."""
    model, items = task_of(config).build(), conversations()
    decayed = [p for p in model.parameters() if p.dim() >= 2]
    rest = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": decayed, "weight_decay": config.optim.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    betas = (config.optim.beta1, config.optim.beta2)
    optimizer = torch.optim.AdamW(groups, lr=config.optim.lr, betas=betas, eps=config.optim.eps)
    batch = items_a_batch(config, items)
    stream = Stream(items, batch=batch, micro_batch=batch, seed=0, rank=0, size=1, device=torch.device("cpu"))
    for step in range(STEPS):
        total = sum(
            F.cross_entropy(model(one.inputs).flatten(0, 1), one.targets.flatten(), ignore_index=-1, reduction="sum")
            for one in stream.share(step)
        )
        counted = sum(int((one.targets >= 0).sum()) for one in stream.share(step))
        optimizer.zero_grad()
        assert isinstance(total, torch.Tensor)
        (total / counted).backward()
        norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
        for p in model.parameters():  # torch's clip_grad_norm_ adds 1e-6 to the norm
            assert p.grad is not None
            p.grad *= min(1.0, config.optim.clip / float(norm))
        optimizer.step()
    return {name: p.detach() for name, p in model.named_parameters()}


def close(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    for name in b:
        torch.testing.assert_close(a[name], b[name], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("exchange", ["allreduce", "sharded"])
def test_synchronous_exchanges_equal_a_plain_loop(exchange: str, size: int) -> None:
    config = compose([*WORDS, f"exchange={exchange}"])
    ranks, counted = train(config, size)
    assert size == 1 or any(len({each[k] for each in counted}) > 1 for k in range(STEPS)), "the weights are uneven"
    for weights in ranks:
        close(weights, plain(config))


@pytest.mark.parametrize("exchange", IDENTICAL)
def test_any_number_of_ranks_equals_one(exchange: str) -> None:
    """Also where gradients are late (delayed, acco): an update is made of the same for any number of ranks."""
    config = compose([*WORDS, f"exchange={exchange}"])
    one = train(config, 1)[0][0]
    ranks, _ = train(config, 3)
    for weights in ranks:
        assert all(torch.equal(weights[name], ranks[0][name]) for name in weights), "replicas are bit-equal"
        close(weights, one)


def test_a_run_on_three_logical_ranks_records_what_one_does(tmp_path: Path) -> None:
    import json

    from hvdllm.cli.main import main

    rows = [{"prompt": f"Say {i}", "completion": "x" * (1 + 5 * (i % 7))} for i in range(40)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = []
    for size in (1, 3):
        words = [*WORDS, f"text.path={tmp_path}/a.jsonl", f"data_dir={tmp_path}/data", f"runs_dir={tmp_path}/runs"]
        words += ["text.tokenizer=bytes", f"name=of{size}", "world=virtual", f"world.size={size}", "budget_tokens=300"]
        words += ["model.context=64", "log_every=1", "audit_every=1", "eval_every=100", "batch_tokens=100"]
        assert main(["train", *words]) == 0
        lines = (tmp_path / "runs" / f"of{size}" / "metrics.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in lines]
        found.append([(r["kind"], r["tokens"], r["loss"]) for r in records if r["kind"] in ("commit", "eval")])
    assert [each[:2] for each in found[0]] == [each[:2] for each in found[1]] and len(found[0]) >= 6
    assert [each[2] for each in found[0]] == pytest.approx([each[2] for each in found[1]], rel=1e-9)
