"""Ranks on several models of processor, whose norms of equal numbers differ in the last bits: replicas stay equal."""

import threading
from typing import Any

import pytest
import rig
import torch

from hvdllm.exchange import parts as exchanges
from hvdllm.optim import parts as optims

SGD = optims.SGD(lr=0.02, momentum=0.9, clip=0.1)
EXCHANGES = {
    "allreduce": exchanges.AllReduce(),
    "delayed": exchanges.Delayed(warmup_tokens=0),
    "local_sgd": exchanges.LocalSGD(local_steps=2, inner="allreduce", group=2),
}


@pytest.fixture
def rounds_differently(monkeypatch: pytest.MonkeyPatch) -> None:
    norm = torch.linalg.vector_norm

    def by_rank(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        odd = threading.current_thread().name.endswith("rank-1")
        return norm(x, *args, **kwargs) * (1 + 1e-9 * odd)

    monkeypatch.setattr(torch.linalg, "vector_norm", by_rank)


@pytest.mark.parametrize("name", EXCHANGES)
@pytest.mark.parametrize("told", [True, False])
def test_one_ranks_norm_clips_for_all(name: str, told: bool, rounds_differently: None) -> None:
    first, second = rig.train(EXCHANGES[name], 2, 6, optim=SGD, unlike=told)
    assert first.final.equal(second.final) is told, "without it they drift apart"
