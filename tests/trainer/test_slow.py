"""A slowed rank computes what it would have computed, later."""

from __future__ import annotations

import time

import pytest
import torch
from torch import nn

from hvdllm.trainer.slow import Simulated, Slow


class Model(nn.Module):
    """Counts its forwards by rows, with dropout, and its backwards."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 2)
        self.rows: list[int] = []
        self.backs = 0

    def forward(self, inputs: torch.Tensor, targets: torch.Tensor, place: tuple[int, int]) -> torch.Tensor:
        self.rows.append(len(inputs))
        hidden = torch.dropout(self.first(inputs), 0.5, True)
        if hidden.requires_grad:
            hidden.register_hook(self._back)
        return (self.second(hidden) - targets).square().sum()

    def _back(self, grad: torch.Tensor) -> None:
        self.backs += 1


def gradients(factor: float, asleep: bool = False) -> tuple[list[torch.Tensor], Model, int]:
    """Of three micro-batches, with the random state afterwards; hooks of gradients called."""
    model, calls = Model(), [0]

    def hook(_: torch.Tensor) -> None:
        calls[0] += 1

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(hook)
    module: nn.Module = Slow(model, model, factor, asleep) if factor > 1 else model
    torch.manual_seed(7)
    for k, rows in enumerate((6, 6, 4)):
        x = torch.linspace(k, k + 1, 4 * rows).view(rows, 4)
        module(x, torch.ones(rows, 2), (k, 0)).backward()
    return [*(p.grad for p in model.parameters() if p.grad is not None), torch.rand(3)], model, calls[0]


@pytest.mark.parametrize("asleep", [False, True])
def test_gradients_hooks_and_random_numbers_are_those_of_the_module_alone(asleep: bool) -> None:
    """Caught: backward() in the place of autograd.grad, random numbers drawn from the run's."""
    plain, _, calls = gradients(1.0)
    slowed, _, again = gradients(3.5, asleep)
    assert len(plain) == len(slowed) == 5 and all(a.equal(b) for a, b in zip(plain, slowed, strict=True))
    assert calls == again == 12


def test_it_does_that_much_more_work() -> None:
    """Caught: a fraction that is dropped, forwards without their backward."""
    _, model, _ = gradients(3.5)
    assert sum(model.rows) == 16 * 3.5 and model.rows[:4] == [6, 6, 3, 6]
    assert model.backs == len(model.rows)
    _, model, _ = gradients(1.1)  # .6 of a sequence, 1.2, .6: owed until it is one
    assert model.rows == [6, 1, 6, 4]


def test_asleep_it_sleeps_by_the_last_one(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    _, model, _ = gradients(3.0, asleep=True)
    assert model.rows == [6, 6, 4] and slept[0] == 0 and min(slept[1:]) > 0


def test_on_a_simulated_clock_it_spends_tokens_over_speed() -> None:
    spent: list[float] = []
    module = Simulated(Model(), spent.append, 8.0, 0.0, 0, 0)
    for rows in (6, 2):
        module(torch.ones(rows, 4), torch.ones(rows, 2), (0, 0))
    assert spent == [1.5, 0.5], "twelve targets and four at 8 a second"


def test_jitter_is_heavy_tailed_of_mean_one_and_a_function_of_the_place() -> None:
    def draws(seed: int, rank: int) -> list[float]:
        module = Simulated(nn.Identity(), lambda s: None, 1.0, 1.0, seed, rank)
        return [module._hiccup((k, 0)) - 1 for k in range(4000)]

    one = draws(0, 0)
    assert one == draws(0, 0) and one != draws(1, 0) and one != draws(0, 1)
    assert min(one) >= 0 and sorted(one)[2000] == pytest.approx(2**0.5 - 1, rel=0.1)
    assert sum(one) / 4000 == pytest.approx(1, rel=0.15) and max(one) > 20
