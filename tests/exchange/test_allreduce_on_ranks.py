"""exchange=allreduce against a plain loop of a few lines, with one process and real ranks, ragged counts, clipping.

Each rank has different data, so an exchange that does nothing, or divides by its own tokens, fails.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from launch import BATCH, CONTEXT, SEQUENCES, losses, records, runs, same_bits, weights, words_of

from hvdllm.config import compose
from hvdllm.models.gpt import GPT, init_weights
from hvdllm.models.size import pad_vocab
from hvdllm.task.stream import Stream
from hvdllm.text import shards
from hvdllm.text.parts import Files
from hvdllm.text.windows import Windows

pytestmark = pytest.mark.ranks
STEPS, LONG, CLIP = 20, 50, 1.9
FP64 = [
    "precision=fp64",
    "model.positions=learned",
    "model.norm=layernorm",
    "model.bias=true",
    "schedule=cosine",
    "optim.clip=1.9",
]


@pytest.fixture(scope="module")
def tmp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One fp64 and one fp32 run each at 1 to 4 ranks, and at 3 ranks one more with jittered launches."""
    tmp = tmp_path_factory.mktemp("oracle")
    for n in (1, 2, 3, 4):
        specs = [
            {"words": words_of(tmp, f"fp64-{n}", STEPS, *FP64)},
            {"words": words_of(tmp, f"fp32-{n}", LONG)},
        ]
        if n == 3:
            specs.append({"words": words_of(tmp, "fp32-3-jitter", LONG), "do": {"jitter": True}})
        runs(specs, n, tmp)
    return tmp


def plain_loop(tmp: Path) -> tuple[dict[str, torch.Tensor], list[float], list[float]]:
    """Weights, losses and norms before clipping of STEPS large batches with torch.optim.AdamW."""
    config = compose.compose(words_of(tmp, "plain", STEPS, *FP64))
    assert isinstance(config.text, Files)
    corpus = shards.prepare(config.text, tmp / "data", say=print)
    stream = Stream(
        Windows(corpus.train, CONTEXT), batch=SEQUENCES, micro_batch=SEQUENCES, seed=0, rank=0, size=1,
        device=torch.device("cpu"),
    )  # fmt: skip
    assert len(stream.items) < STEPS * SEQUENCES, "the run goes on into a second epoch"
    model = GPT(config.model, pad_vocab(corpus.tokenizer.vocab)).double()
    init_weights(model, 0)
    parameters = dict(model.named_parameters())
    groups = [
        {"params": [p for p in parameters.values() if p.dim() >= 2], "weight_decay": 0.1},
        {"params": [p for p in parameters.values() if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=3e-3, betas=(0.9, 0.95), eps=1e-8, foreach=False)
    said: tuple[list[float], list[float]] = ([], [])
    for step in range(STEPS):
        (batch,) = stream.share(step)
        loss = F.cross_entropy(model(batch.inputs).flatten(0, 1), batch.targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        norm = torch.cat([p.grad.flatten() for p in parameters.values()]).norm()
        for p in parameters.values():
            p.grad *= min(1.0, 1.9 / norm.item())
        # Warm-up over a twentieth of the run, here one step; then half a cosine down to a tenth.
        progress = torch.tensor((step + 1 - 0.05 * STEPS) / (0.95 * STEPS), dtype=torch.float64)
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * (0.1 + 0.9 * (1 + torch.cos(torch.pi * progress).item()) / 2)
        optimizer.step()
        said[0].append(loss.item())
        said[1].append(norm.item())
    return {name: p.detach() for name, p in parameters.items()}, *said


def test_fp64_weights_equal_a_plain_loop(tmp: Path) -> None:
    final, loss, norm = plain_loop(tmp)
    assert max(norm) > 1.9 > min(norm), "clipping is active, and not always"
    for n in (1, 2, 3, 4):
        run = tmp / "runs" / f"fp64-{n}"
        assert weights(run).keys() == final.keys()
        for name, w in weights(run).items():
            torch.testing.assert_close(w, final[name], rtol=0, atol=1e-9, msg=lambda m, n=n, k=name: f"{n}, {k}: {m}")
        assert losses(run) == pytest.approx(loss, rel=1e-9), n
        assert [r["grad_norm"] for r in records(run, "commit")] == pytest.approx(norm, rel=1e-9), n
        assert [r["tokens"] for r in records(run, "commit")] == [BATCH * k for k in range(1, STEPS + 1)]


def test_fp32_losses_agree_over_world_sizes(tmp: Path) -> None:
    alone = losses(tmp / "runs" / "fp32-1")
    assert len(alone) == LONG and alone[-1] < 0.8 * alone[0], "it learns"
    for n in (2, 3, 4):
        assert losses(tmp / "runs" / f"fp32-{n}") == pytest.approx(alone, rel=1e-5), n


def test_two_runs_at_three_ranks_are_bit_equal_whatever_the_timing(tmp: Path) -> None:
    assert same_bits(tmp / "runs" / "fp32-3", tmp / "runs" / "fp32-3-jitter")


def test_micro_batches_were_ragged_and_travelled_in_several_buckets(tmp: Path) -> None:
    """22 sequences in micro-batches of 3: 8 of them alone, 4 + 4, 3 + 3 + 3 and 2 + 2 + 2 + 2."""
    for n, count in ((1, 8), (2, 8), (3, 9), (4, 8)):
        first = records(tmp / "runs" / f"fp32-{n}", "commit")[0]
        assert first["micro_batches"] == count
        assert (first["bytes_sent"] > 0) == (n > 1)
    size = sum(w.nbytes for w in weights(tmp / "runs" / "fp32-1").values())
    assert size > 3 * 0.02 * 2**20
