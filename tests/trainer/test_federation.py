"""Whole runs of exchange=fedavg on logical ranks: the same clients read the same text whatever trains them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from hvdllm import runs
from hvdllm.cli.main import main

ROUND = 3 * 2 * 2 * 16  # clients, steps, windows of a step, context


@pytest.fixture
def desk(tmp_path: Path) -> Path:
    """Thirty files of other words each, from 30 to 3,000 bytes; one file; three of which two are short."""
    draw = np.random.RandomState(0)
    sizes = {"many": (30 * 100 ** (draw.rand(30))).astype(int), "one": [4000], "short": [4000, 5, 4000]}
    for folder, lengths in sizes.items():
        (tmp_path / folder).mkdir()
        for number, length in enumerate(lengths):
            words = draw.randint(0, 7, length) + ord("a") + number % 19
            (tmp_path / folder / f"{number:02d}.txt").write_text("".join(map(chr, words.tolist())))
    return tmp_path


def train(desk: Path, name: str, size: int, *words: str, text: str = "many") -> int:
    return main([
        "train", f"runs_dir={desk}/runs", f"data_dir={desk}/data", f"name={name}", "text=files", "precision=fp64",
        f"text.path={desk}/{text}", "text.tokenizer=bytes", "text.validation_share=0", "world=virtual", "eval_every=0",
        f"world.size={size}", "exchange=fedavg", "exchange.clients=5", "exchange.sampled=3", "exchange.local_steps=2",
        "exchange.pulses=1", "model=tiny", "model.layers=1", "model.width=16", "model.heads=2", "model.context=16",
        "batch_tokens=112", "sample_every=0", "audit_every=0", f"log_every={ROUND}", "device.threads=1", *words,
    ])  # fmt: skip


def weights(desk: Path, name: str) -> torch.Tensor:
    tensors = load_file(desk / "runs" / name / "final" / "model.safetensors")
    return torch.cat([tensors[key].reshape(-1) for key in sorted(tensors)])


def test_ranks_of_any_number_train_the_same_federation_and_take_over_from_each_other(desk: Path) -> None:
    words = ["exchange.alpha=0.5", "schedule=constant", "schedule.horizon=2000", f"save_every={ROUND}"]
    for size in (1, 2, 3):
        assert train(desk, f"of{size}", size, f"budget_tokens={4 * ROUND}", *words) == 0
        commits = [r for r in runs.records(desk / "runs" / f"of{size}") if r["kind"] == "commit"]
        assert [r["tokens"] for r in commits] == [ROUND * k for k in (1, 2, 3, 4)]
        torch.testing.assert_close(weights(desk, f"of{size}"), weights(desk, "of1"), rtol=0, atol=1e-9)
    for first, then in ((3, 2), (1, 3), (2, 2)):
        name = f"from{first}to{then}"
        assert train(desk, name, first, f"budget_tokens={2 * ROUND}", *words) == 0
        assert train(desk, name, then, f"budget_tokens={4 * ROUND}", *words) == 0
        torch.testing.assert_close(weights(desk, name), weights(desk, "of1"), rtol=0, atol=1e-9)
        log = (desk / "runs" / name / "log.txt").read_text()
        assert (f"{first} ranks saved it, {then} go on: the round that they were in begins anew" in log) == (
            first != then
        )


def test_clients_without_text_are_said(desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(desk, "few", 2, "exchange.sampled=null", f"budget_tokens={ROUND}", "save_every=0", text="short") == 0
    said = capsys.readouterr()
    assert "3 of 5 clients have no sequences and are never drawn" in said.out + said.err


@pytest.mark.parametrize(
    ("text", "words", "says"),
    [
        ("short", (), "exchange.sampled=3: only 2 of the 5 clients have any sequences; give exchange.sampled=2"),
        ("one", ("exchange.sampled=2",), "one of the 5 clients gets all of the data"),
    ],
)
def test_too_few_with_text_are_refused_before_the_start(
    text: str, words: tuple[str, ...], says: str, desk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(desk, "none", 2, f"budget_tokens={ROUND}", *words, text=text) == 2
    assert says in capsys.readouterr().err and not (desk / "runs" / "none").exists()
