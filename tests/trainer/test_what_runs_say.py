"""Numbers of whole runs that no loss curve shows: which text an evaluation reads, MFU, where a trunk's optimizer
stands, what dropout is drawn from."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from launch import BATCH, records, words_of
from safetensors import safe_open

from hvdllm.cli.main import main
from hvdllm.flat import Flat
from hvdllm.models.gpt import GPT
from hvdllm.task.stream import Batch
from hvdllm.trainer import words as said
from hvdllm.trainer.backward import Loss, _not_finite, backward


def test_an_evaluation_reads_the_validation_text(tmp_path: Path) -> None:
    """Trained on ascending letters, which it learns; validated on descending ones, which it has never seen."""
    (tmp_path / "train.txt").write_text("abcdefghijklmnopqrstuvwxyz" * 4000)
    (tmp_path / "valid.txt").write_text("zyxwvutsrqponmlkjihgfedcba" * 400)
    words = [
        word for word in words_of(tmp_path, "a", 50, f"eval_every={25 * BATCH}") if not word.startswith("text.path")
    ]
    words += [f"text.path={tmp_path}/train.txt", f"text.validation={tmp_path}/valid.txt", "optim.lr=1e-2"]
    assert main(["train", *words]) == 0
    run = tmp_path / "runs" / "a"
    learnt, seen = records(run, "commit")[-1]["loss"], records(run, "eval")[-1]
    assert learnt < 1.0 and seen["loss"] > 3 * learnt
    assert seen["bits_per_byte"] == pytest.approx(seen["loss"] / math.log(2), rel=1e-6), "a token is a byte here"


@pytest.mark.parametrize("ranks", [1, 4])
def test_mfu_is_of_all_devices(ranks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    peak = 1e12
    monkeypatch.setattr(said.size, "peak_flops", lambda device, precision: peak)
    words = words_of(tmp_path, "a", 4, "world=virtual", f"world.size={ranks}")
    assert main(["train", *words]) == 0
    run = tmp_path / "runs" / "a"
    end, first = records(run, "end")[-1], records(run, "run")[0]
    expected = end["tokens"] * first["flops_per_token"] / (end["seconds"] * ranks * peak)
    assert end["mfu"] == pytest.approx(expected, rel=0.05), "seconds end a moment apart"


def test_a_trunks_optimizer_goes_on_counting(tmp_path: Path) -> None:
    """Six steps of the trunk, one more: Adam's corrections are those of step 7, not of step 1, where they would make
    the update of moments that are trained already several times as long."""
    assert main(["train", *words_of(tmp_path, "trunk", 6, f"save_every={6 * BATCH}")]) == 0
    more = [f"init_from={tmp_path}/runs/trunk", "init_optimizer=true", f"save_every={BATCH}", "optim.weight_decay=0"]
    lr = 1e-3
    assert main(["train", *words_of(tmp_path, "on", 1, *more, f"optim.lr={lr}", "schedule.warmup=0")]) == 0

    def tensors(run: str, step: int) -> dict[str, torch.Tensor]:
        (file,) = (tmp_path / "runs" / run / "checkpoints" / str(step)).glob("*.safetensors")
        with safe_open(file, framework="pt") as found:
            return {key: found.get_tensor(key) for key in found.keys()}  # noqa: SIM118 - not a dict

    before, after = tensors("trunk", 6), tensors("on", 1)
    name = next(key.removeprefix("m/") for key in after if key.startswith("m/") and "mlp" in key and "weight" in key)
    m, v = after[f"m/{name}"], after[f"v/{name}"]
    expected = lr * (m / (1 - 0.9**7)) / ((v / (1 - 0.95**7)).sqrt() + 1e-8)
    torch.testing.assert_close(before[f"model/{name}"] - after[f"model/{name}"], expected, rtol=1e-3, atol=1e-6)


def dropped(seed: int, rank: int, place: tuple[int, int]) -> float:
    from hvdllm.config.compose import compose
    from hvdllm.models.parts import Model
    from hvdllm.task.causal_lm import CausalLM

    torch.manual_seed(3)
    model = GPT(Model(layers=1, width=16, heads=2, context=8, dropout=0.5), 64)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.5)
    task = CausalLM(compose([]), 64)
    loss = Loss(task, model, precision="fp32", device=torch.device("cpu"), seed=seed, rank=rank, dropout=True)
    tokens = torch.arange(16).view(2, 8)
    return float(loss(tokens, tokens, place).item())


@pytest.mark.parametrize(
    "other",
    [(1, 0, (0, 0)), (0, 1, (0, 0)), (0, 0, (1, 0)), (0, 0, (0, 1))],
    ids=["seed", "rank", "round", "micro-batch"],
)
def test_dropout_is_another_for_each_seed_rank_round_and_micro_batch_and_the_same_when_repeated(other: Any) -> None:
    assert dropped(*other) == dropped(*other) and dropped(*other) != dropped(0, 0, (0, 0))


def test_a_loss_that_is_not_finite_makes_its_gradients_so() -> None:
    """Also one whose own gradient is finite: only gradients are seen by all ranks."""
    net = torch.nn.Linear(3, 1)

    def loss(inputs: Any, targets: Any, place: Any) -> torch.Tensor:
        return net(inputs).sum() + targets.sum()

    for target, finite in ((0.0, True), (float("nan"), False), (float("inf"), False)):
        net.zero_grad()
        batch = Batch(torch.ones(2, 3), torch.full((2,), target), 2, last=True)
        backward(loss, batch)  # type: ignore[arg-type]
        assert net.weight.grad is not None and bool(net.weight.grad.isfinite().all()) == finite


def test_of_several_gradients_that_are_not_finite_the_last_one_is_named() -> None:
    """It is the one that the backward pass came to first."""
    flat = Flat(torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3), torch.nn.Linear(3, 2)), 1, 1)
    assert _not_finite(flat) is None
    for name in ("0.weight", "1.weight"):
        flat.view(name, flat.g)[0, 0] = float("nan")
    assert _not_finite(flat) == "1.weight"
