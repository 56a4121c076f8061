"""Every exchange trains every task, on logical ranks; where it is exact, any number of ranks learns the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hvdllm import registry, runs
from hvdllm.cli.main import main

TASKS = {
    "masked_lm": (
        "text=files", "text.path={text}", "text.tokenizer=bytes", "model.layers=1", "model.width=16", "model.heads=2",
        "model.context=32", "batch_tokens=40", "budget_tokens=640", "optim.lr=0.01",
    ),
    "images": (
        "model.width=4", "model.stages=2", "batch_tokens=24", "budget_tokens=384", "optim.lr=0.01", "task.shift=0",
    ),
}  # fmt: skip
# What makes a short run of an exchange: it meets at least once, and as many clients as there are ranks.
SHORT = {
    "local_sgd": ("exchange.local_steps=2",), "diloco": ("exchange.local_steps=2",),
    "streaming_diloco": ("exchange.local_steps=4", "exchange.fragments=2"),
    "fedavg": ("exchange.local_steps=2", "exchange.clients=4", "exchange.sampled=2"),
}  # fmt: skip
EXCHANGES = [name for name, part in registry.parts("exchange").items() if part.facts.carries not in registry.LIBRARIES]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    for number in range(40):
        (folder / f"{number}.txt").write_text(f"the quick brown fox {number} jumps over the lazy dog " * 6)
    return folder


def trained(tmp_path: Path, text: Path, task: str, *words: str) -> list[dict[str, Any]]:
    given = [word.format(text=text) for word in TASKS[task]]
    main_words = [
        "train", f"task={task}", *given, "name=a", f"runs_dir={tmp_path}", f"data_dir={text}-data", "device=cpu",
        "device.threads=1", "log_every=1", "save_every=0", "sample_every=0", "eval_tokens=64", "eval_every=1000000",
        "precision=fp64", "schedule=constant", "world=virtual", *words,
    ]  # fmt: skip
    assert main(main_words) == 0
    return list(runs.records(tmp_path / "a"))


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("exchange", EXCHANGES)
def test_a_task_is_learnt_with_every_exchange(tmp_path: Path, text: Path, exchange: str, task: str) -> None:
    size = 3 if exchange == "parameter_server" else 2
    words = (f"exchange={exchange}", f"world.size={size}", *SHORT.get(exchange, ()))
    records = trained(tmp_path, text, task, *words)
    losses = [record["loss"] for record in records if record["kind"] == "commit"]
    assert len(losses) >= 2 and losses[-1] < losses[0]
    (found,) = [record for record in records if record["kind"] == "eval"]
    assert found["loss"] > 0 and 0 <= found["accuracy"] <= 1
    (end,) = [record for record in records if record["kind"] == "end"]
    assert end["reason"] == "budget" and end["unit"] == registry.parts("task")[task].facts.unit


@pytest.mark.parametrize("task", TASKS)
def test_any_number_of_ranks_learns_the_same(tmp_path: Path, text: Path, task: str) -> None:
    """Seen to catch: masks or shifts that depend on the rank, a mean of means."""
    losses = []
    for size in (1, 3):
        records = trained(tmp_path / str(size), text, task, f"world.size={size}")
        losses.append([record["loss"] for record in records if record["kind"] in ("commit", "eval")])
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)


def test_a_finished_run_says_what_it_counts(tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        trained(tmp_path, text, "images", "world=single", "eval_every=0", "budget_tokens=24")
    said = capsys.readouterr()
    assert "has finished: 24 images of 24" in said.out + said.err
