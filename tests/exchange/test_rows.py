"""Tables whose gradients are rows: what every rank adds up, how they are stepped, and that a table is never sent."""

from __future__ import annotations

import math
from typing import Any

import pytest
import rig
import torch
from checks import PLAIN, rate
from torch import nn

from hvdllm import registry
from hvdllm.config.check import check
from hvdllm.config.compose import compose
from hvdllm.errors import UserError
from hvdllm.exchange import parts as exchanges
from hvdllm.exchange import rows
from hvdllm.exchange.base import NotFinite
from hvdllm.exchange.wire import parts as wires
from hvdllm.flat import Flat
from hvdllm.optim import parts as optims
from hvdllm.tables import EPS, RowSums, Table, summed
from hvdllm.trainer.backward import explain
from hvdllm.world.detect import Place
from hvdllm.world.single import SingleWorld

ROWS, WIDTH, LR = 9, 4, 0.2


class Net(nn.Module):
    """Adds a row of a table, which the first feature chooses, to what goes through a linear layer."""

    def __init__(self, table: nn.Module) -> None:
        super().__init__()
        self.table, self.layer = table, nn.Linear(WIDTH, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x + self.table(row_of(x))).tanh()


def row_of(x: torch.Tensor) -> torch.Tensor:
    """Some rows are chosen often, others never."""
    return (x[:, 0].abs() * 3).long().clamp(max=ROWS - 1)


def made(adaptive: bool | None, models: list[Net]) -> Any:
    """A maker of equal models, which are added to a list. adaptive: None for an ordinary embedding."""

    def make() -> Net:
        torch.manual_seed(5)
        table = nn.Embedding(ROWS, WIDTH) if adaptive is None else Table(ROWS, WIDTH, LR, adaptive)
        model = Net(table)
        draw = torch.Generator().manual_seed(1)
        for p in model.parameters():
            p.data.copy_(torch.randn(p.shape, generator=draw))
        models.append(model.double())
        return model

    return make


def trained(n: int, steps: int, adaptive: bool | None, **more: Any) -> tuple[list[rig.Rig], list[Net]]:
    models: list[Net] = []
    given = {"optim": PLAIN, "rate": rate, **more}
    out = rig.train(exchanges.AllReduce(), n, steps, model=made(adaptive, models), **given)
    return out, models


def tables(models: list[Net]) -> list[torch.Tensor]:
    return [model.table.weight.detach() for model in models]


# ------------------------------------------------------------------ sums and steps
def test_equal_rows_are_added_in_the_order_in_which_they_stand() -> None:
    table = Table(ROWS, 2, LR, True)
    numbers = torch.tensor([4, 0, 4, 7, 0, 4])
    values = torch.randn(6, 2, generator=torch.Generator().manual_seed(0))
    found = summed(table, numbers, values)
    expected = {0: values[1] + values[4], 4: values[0] + values[2] + values[5], 7: values[3]}
    assert found.rows.tolist() == [0, 4, 7, 0, 0, 0] and not found.values[3:].any()
    for place, row in enumerate((0, 4, 7)):
        assert torch.equal(found.values[place], expected[row])
    assert summed(table, numbers[:0], values[:0]).values.shape == (0, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_packed_comes_back_bit_by_bit(dtype: torch.dtype) -> None:
    numbers, values = torch.tensor([2**31 - 66, 0, 5]), torch.randn(3, 4).to(dtype)
    values[1, 2] = math.nan
    back = rows.unpacked(rows.packed(numbers, values), dtype)
    assert torch.equal(back[0], numbers) and torch.equal(back[1].nan_to_num(9), values.nan_to_num(9))


def test_row_wise_adagrad_is_the_published_rule_and_a_bad_number_changes_nothing() -> None:
    table = Table(ROWS, WIDTH, LR, True)
    table.weight.copy_(torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(3)))
    x, s, good = table.weight.clone(), torch.zeros(ROWS), torch.zeros(())
    for step in range(3):
        values = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(step))
        values[3] = 0  # a place that is left over
        sums = RowSums(table, torch.tensor([0, 3, 5 + step, 0]), values)
        before = (table.weight.clone(), table.squares.clone())  # type: ignore[union-attr]
        bad = RowSums(table, sums.rows, values * math.nan)
        table.step(bad, torch.tensor(8.0), 0.5, torch.ones(()))
        assert torch.equal(table.weight, before[0]) and torch.equal(table.squares, before[1])  # type: ignore[arg-type]
        table.step(sums, torch.tensor(8.0), 0.5, good)
        for row, value in zip(sums.rows[:3].tolist(), values[:3] / 8, strict=True):
            s[row] += value.square().mean()
            x[row] -= 0.5 * LR * value / (s[row].sqrt() + EPS)
    torch.testing.assert_close(table.weight.detach(), x)
    assert torch.equal(table.weight[1], x[1]), "rows that were not touched stay as they are"


# ------------------------------------------------------------------ ranks
@pytest.mark.parametrize("n", [2, 3, 4])
def test_ranks_compute_what_one_process_computes_and_are_bit_equal(n: int) -> None:
    """Each rank has another number of examples, and some rows are those of several ranks. Seen to catch: rows that a
    micro-batch leaves behind, which are then added twice, and a noise scale of a part of the gradients."""
    (_, one), (out, many) = trained(1, 7, True), trained(n, 7, True)
    for model in many:
        assert torch.equal(model.table.weight, many[0].table.weight)
        assert torch.equal(model.table.squares, many[0].table.squares)
        torch.testing.assert_close(model.table.weight, one[0].table.weight, rtol=0, atol=1e-12)
        torch.testing.assert_close(model.table.squares, one[0].table.squares, rtol=0, atol=1e-12)
    assert all(commit.before.noise_scale is None for commit in out[0].commits[1:]), "squares are not of all gradients"


@pytest.mark.parametrize("clip", [0.0, 0.05])
def test_plain_descent_on_rows_is_plain_descent_on_the_table(clip: float) -> None:
    """The whole norm clips both. Seen to fail when rows did not enter the norm."""
    optim = optims.SGD(lr=LR, momentum=0.0, weight_decay=0.0, clip=clip, nesterov=False)
    (dense, whole), (sparse, by_rows) = (trained(2, 6, adaptive, optim=optim) for adaptive in (None, False))
    torch.testing.assert_close(by_rows[0].table.weight, whole[0].table.weight.detach(), rtol=0, atol=1e-12)
    for a, b in zip(dense[0].commits[1:], sparse[0].commits[1:], strict=True):
        assert b.before.grad_norm == pytest.approx(a.before.grad_norm, rel=1e-10)
    begun: list[Net] = []
    made(False, begun)()
    assert not torch.allclose(by_rows[0].table.weight, begun[0].table.weight)


def test_a_bad_number_of_one_rank_changes_no_table() -> None:
    """Seen to fail when the step of the table did not look at the mask."""
    out, models = trained(2, 9, True, bad=(1, 7), catch=True)
    (step,) = {each.bad.step for each in out if each.bad is not None}
    _, before = trained(2, step - 1, True)
    for model in models:
        assert torch.equal(model.table.weight, before[0].table.weight) and step > 1


def test_on_a_lossy_wire_rows_travel_exactly_and_replicas_stay_equal() -> None:
    _, models = trained(2, 5, True, wire=wires.Int8())
    assert torch.equal(*tables(models))


def test_rows_travel_and_no_table() -> None:
    """Bytes of a rank and update: those of the dense part and, for each of its clicks, a number and a row."""
    sent = {}
    for adaptive in (None, True):
        for steps in (3, 5):
            out, _ = trained(2, steps, adaptive)
            sent[adaptive, steps] = [each.sent for each in out]
    fed = sum(each.fed for each in trained(2, 5, True)[0]) - sum(each.fed for each in trained(2, 3, True)[0])
    assert fed == 2 * rig.NOMINAL
    more = {adaptive: sum(sent[adaptive, 5]) - sum(sent[adaptive, 3]) for adaptive in (None, True)}
    per_click = (1 + WIDTH) * 8  # fp64
    bucket = 128 * math.ceil(ROWS * WIDTH * 8 / 128)  # padded to 64 bytes a rank; of it each rank sends 2 (N-1)/N
    dense = 2 * 2 * bucket  # two updates of two ranks
    assert more[None] - more[True] == dense - fed * per_click


def test_a_table_whose_gradient_is_not_finite_is_named() -> None:
    """Where all other gradients are finite. Seen to fail when only the flat map was searched."""

    class Overflows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.bias = Table(ROWS, WIDTH, LR, True), nn.Parameter(torch.zeros(1))
            self.table.weight.fill_(2e-38)

        def forward(self, x: torch.Tensor, t: torch.Tensor, place: tuple[int, int]) -> torch.Tensor:
            return (self.table(row_of(x)) * 1e30 * 1e30).sum() + self.bias.sum()

    class Dealt:
        def share(self, number: int, parts: int = 1) -> list[Any]:
            return rig.batches(*(each.float() for each in rig.examples(number, parts)), number, 8)

    model = Overflows()
    flat = Flat(model, 1, math.inf)
    error = explain(NotFinite(1, [0], math.inf), Dealt(), model, flat, SingleWorld())  # type: ignore[arg-type]
    assert "the gradient of `table` is not finite on rank 0 (micro-batch 1 of 3" in str(error)


# ------------------------------------------------------------------ what goes together
@pytest.mark.parametrize("name", registry.parts("exchange"))
def test_an_exchange_without_a_path_for_rows_says_so(name: str) -> None:
    words = ["task=ratings", "task.sparse=true", f"exchange={name}", "world=virtual", "world.size=2"]
    if registry.parts("exchange")[name].facts.sparse:
        check(compose(words), Place())
        return
    with pytest.raises(UserError) as error:
        check(compose(words), Place())
    if name not in ("ddp", "horovod"):  # these run in another world
        assert f"task.sparse=true with exchange={name}: it sends whole gradients" in str(error.value)
        assert "take exchange=allreduce, or task.sparse=false" in str(error.value) and "\n" not in str(error.value)


def test_adasum_and_settings_that_nothing_reads_are_refused() -> None:
    for words, match in (
        (["task.sparse=true", "exchange.reduction=adasum"], "adasum works on whole tensors, not on rows"),
        (["task.table_lr=1"], "are read where task.sparse=true"),
        (["task.table_optim=sgd"], "are read where task.sparse=true"),
    ):
        with pytest.raises(UserError, match=match):
            check(compose(["task=ratings", *words]), Place())
