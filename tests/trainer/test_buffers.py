"""Buffers: averaged over the ranks that train, kept in checkpoints, and read with care."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from hvdllm.cli.main import main
from hvdllm.errors import UserError
from hvdllm.tables import Table
from hvdllm.trainer import buffers
from hvdllm.world import virtual
from hvdllm.world.single import SingleWorld


def model(offset: float = 0.0) -> nn.Module:
    made = nn.Sequential(nn.Conv2d(1, 3, 1), nn.BatchNorm2d(3)).double()
    made[1].running_mean.copy_(torch.tensor([1.0, 2.0, 3.0]) + offset)  # type: ignore[operator]
    made[1].num_batches_tracked.fill_(int(10 + offset))  # type: ignore[operator]
    made.register_buffer("table", torch.full((2,), offset), persistent=False)
    return made


def averaged(trains: tuple[bool, ...]) -> list[dict[str, torch.Tensor]]:
    def rank(world: Any) -> dict[str, torch.Tensor]:
        made = model(float(world.rank))
        buffers.average(made, world, trains[world.rank])
        return {name: buffer.clone() for name, buffer in made.named_buffers()}

    return virtual.run(len(trains), rank)


def test_buffers_become_the_mean_over_the_ranks_that_train() -> None:
    """Seen to catch: a sum, a server that counts, a table that is no state and is changed."""
    for trains, mean in (((True, True, True), 1.0), ((True, False, True), 1.0), ((False, True, True), 1.5)):
        for rank, found in enumerate(averaged(trains)):
            assert found["1.running_mean"].tolist() == [1 + mean, 2 + mean, 3 + mean]
            assert found["1.num_batches_tracked"].item() == round(10 + mean)
            assert found["table"].tolist() == [rank, rank]
    assert [found["1.running_mean"][0].item() for found in averaged((False, False))] == [1, 2], "nobody has computed"


def test_a_model_without_buffers_sends_nothing() -> None:
    class Silent(SingleWorld):
        size = 2

        def sum(self, x: torch.Tensor, name: str) -> Any:
            raise AssertionError

    buffers.average(nn.Linear(2, 2), Silent(), True)


def test_what_a_checkpoint_holds_is_checked() -> None:
    kept = buffers.tensors(model(4.0))
    fresh = model()
    assert buffers.load(fresh, {**kept, "q.1": torch.ones(1)}, "here").keys() == {"q.1"}
    assert all(torch.equal(a, b) for a, b in zip(buffers.tensors(fresh).values(), kept.values(), strict=True))
    name = "buffer.1.running_mean"
    for wrong, match in (
        ({k: v for k, v in kept.items() if k != name}, "is in one of them alone"),
        ({**kept, "buffer.other": torch.ones(1)}, "is in one of them alone"),
        ({**kept, name: torch.ones(4)}, "has another form"),
        ({**kept, name: torch.ones(3, dtype=torch.int64)}, "has another form"),
        ({**kept, name: torch.full((3,), torch.nan)}, "not finite"),
    ):
        with pytest.raises(UserError, match=match):
            buffers.load(model(), wrong, "here")


def test_a_table_is_kept_with_its_optimizer_and_never_averaged() -> None:
    table = Table(3, 2, 0.1, True)
    table.weight.copy_(torch.arange(6.0).view(3, 2))
    table.squares.copy_(torch.arange(3.0))  # type: ignore[union-attr]
    made = nn.ModuleDict({"users": table})
    kept = {name: x.clone() for name, x in buffers.tensors(made).items()}
    assert kept.keys() == {"table.users", "squares.users"}
    assert buffers.tensors(made, optimizer=False).keys() == {"table.users"}
    assert not buffers.named(made), "ranks have equal tables, there is nothing to average"
    fresh = Table(3, 2, 0.1, True)
    assert not buffers.load(nn.ModuleDict({"users": fresh}), kept, "here")
    assert torch.equal(fresh.weight, table.weight) and torch.equal(fresh.squares, table.squares)  # type: ignore[arg-type]
    plain = nn.ModuleDict({"users": Table(3, 2, 0.1, False)})
    assert not buffers.load(plain, kept, "here", optimizer=False), "sums of squares are left where they are"
    for model, wrong, match in (
        (plain, kept, "the squares `users` is in one of them alone"),
        (made, {"table.users": kept["table.users"]}, "the squares `users` is in one of them alone"),
        (made, {**kept, "table.users": torch.ones(4, 2)}, "the table `users` has another form"),
        (made, {**kept, "squares.users": torch.full((3,), torch.inf)}, "the squares `users` has numbers that are not"),
    ):
        with pytest.raises(UserError, match=match):
            buffers.load(model, wrong, "here")


def test_a_resumed_run_with_batch_norm_goes_on_exactly(tmp_path: Path) -> None:
    """Weights and buffers of a run in two lives are those of a run in one. Seen to fail without buffers."""
    words = [
        "task=images", "model.norm=batch", "model.width=4", "model.stages=1", "batch_tokens=16", "eval_tokens=20",
        "save_every=64", "eval_every=64", "log_every=0", "audit_every=0", "device=cpu", "device.threads=1",
        "world=virtual", "world.size=2", f"runs_dir={tmp_path}",
    ]  # fmt: skip
    horizon = "schedule.horizon=128"
    assert main(["train", *words, horizon, "name=one", "budget_tokens=128"]) == 0
    assert main(["train", *words, horizon, "name=two", "budget_tokens=64"]) == 0
    assert main(["train", *words, horizon, "name=two", "budget_tokens=128"]) == 0
    one, two = ((tmp_path / name / "final/model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two and b"running_mean" in one
