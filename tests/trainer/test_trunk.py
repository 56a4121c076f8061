"""init_from: what comes along, what begins anew, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from launch import BATCH, records, runs, weights, words_of
from safetensors import safe_open

from hvdllm.cli.main import main

STEPS = 6


@pytest.fixture(scope="module")
def trunk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps with checkpoints at three and six, and its final/."""
    tmp = tmp_path_factory.mktemp("trunk")
    assert main(["train", *words_of(tmp, "trunk", STEPS, f"save_every={3 * BATCH}")]) == 0
    return tmp


def moments(checkpoint: Path) -> dict[str, torch.Tensor]:
    with safe_open(next(checkpoint.glob("*.safetensors")), framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys() if key.startswith(("m/", "v/"))}  # noqa: SIM118


def of(trunk: Path, name: str, *more: str) -> list[str]:
    return words_of(trunk, name, 0, f"save_every={BATCH}", *more)


@pytest.mark.parametrize("source", ["", "/checkpoints/6", "/final"])
def test_with_rate_zero_the_weights_are_the_trunks(trunk: Path, source: str) -> None:
    run = trunk / "runs" / f"same{source.replace('/', '-')}"
    words = [*of(trunk, run.name), f"init_from={trunk}/runs/trunk{source}", "optim.lr=0", "budget_tokens=1", "seed=5"]
    assert main(["train", *words]) == 0
    a, b = weights(run), weights(trunk / "runs" / "trunk")
    assert all(a[name].equal(b[name]) for name in b)
    (first,) = records(run, "run")
    assert first["trunk"]["path"].startswith(f"{trunk}/runs/trunk")
    assert first["trunk"]["steps"] == (0 if source == "/final" else STEPS)
    assert records(run, "commit")[0]["tokens"] == BATCH, "tokens begin anew"


def test_an_earlier_checkpoint_is_another_beginning(trunk: Path) -> None:
    words = [*of(trunk, "early"), f"init_from={trunk}/runs/trunk/checkpoints/3", "optim.lr=0", "budget_tokens=1"]
    assert main(["train", *words]) == 0
    a, b = weights(trunk / "runs" / "early"), weights(trunk / "runs" / "trunk")
    assert any(not a[name].equal(b[name]) for name in b)


@pytest.mark.parametrize(
    ("exchange", "optimizer"),
    [
        *(
            pytest.param(exchange, True, id=exchange)
            for exchange in ("allreduce", "sharded", "acco", "delayed", "diloco")
        ),
        pytest.param("sharded", False, id="sharded-without"),
        *(
            pytest.param(exchange, False, id=f"{exchange}-without", marks=pytest.mark.thorough)
            for exchange in ("allreduce", "acco", "delayed", "diloco")
        ),
    ],
)
def test_the_optimizer_comes_along_if_asked(trunk: Path, exchange: str, optimizer: bool) -> None:
    """One step of rate 0 from the trunk's moments is beta m + (1 - beta) g; from none it is (1 - beta) g."""
    kept = {}
    for name, beta in (("half", 0.5), ("none", 0.0)):
        run = f"{exchange}-{optimizer}-{name}"
        words = [
            *of(trunk, run), f"init_from={trunk}/runs/trunk", f"init_optimizer={optimizer}", "world=virtual",
            "world.size=2", f"exchange={exchange}", "optim.lr=0", "optim.clip=0", f"optim.beta1={beta}",
            "budget_tokens=1", f"batch_tokens={BATCH}", *["exchange.local_steps=1"] * (exchange == "diloco"),
        ]  # fmt: skip
        assert main(["train", *words]) == 0
        (checkpoint,) = (trunk / "runs" / run / "checkpoints").iterdir()
        kept[name] = {}
        for file in sorted(checkpoint.glob("*.safetensors")):
            with safe_open(file, framework="pt") as tensors:
                for key in tensors.keys():  # noqa: SIM118 - not a dict
                    if (short := key.removeprefix("local.update.")).startswith("m/"):
                        kept[name][short] = tensors.get_tensor(key)
    was = moments(trunk / "runs" / "trunk" / "checkpoints" / "6")
    whole = [key for key in kept["half"] if key in was and kept["half"][key].shape == was[key].shape]
    assert whole
    for key in whole:
        expected = 0.5 * kept["none"][key] + (0.5 * was[key] if optimizer else 0)
        torch.testing.assert_close(kept["half"][key], expected, rtol=1e-4, atol=1e-9)


def test_resumed_it_goes_on_and_does_not_begin_again(trunk: Path) -> None:
    words = [*of(trunk, "on"), f"init_from={trunk}/runs/trunk"]
    assert main(["train", *words, f"budget_tokens={2 * BATCH}"]) == 0
    assert main(["train", *words, f"budget_tokens={4 * BATCH}", "schedule.horizon=null"]) == 0
    assert main(["train", *of(trunk, "once"), f"init_from={trunk}/runs/trunk", f"budget_tokens={4 * BATCH}"]) == 0
    a, b = weights(trunk / "runs" / "on"), weights(trunk / "runs" / "once")
    assert all(a[name].equal(b[name]) for name in b)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["init_from={trunk}/nowhere"], "there is no run and no checkpoint"),
        (["init_from={trunk}/runs/trunk", "model.width=64"], "does not fit this model"),
        (["init_from={trunk}/runs/trunk", "text.tokenizer=bpe", "text.vocab=300"], "its tokenizer is not that of"),
        (["init_from={trunk}/runs/trunk", "optim=sgd", "init_optimizer=true"], "its optimizer is adamw, not sgd"),
        (["init_from={trunk}/runs/trunk/final", "init_optimizer=true"], "there is no optimizer in final/"),
        (["init_optimizer=true"], "init_optimizer=true needs init_from"),
    ],
)
def test_refused(trunk: Path, words: list[str], said: str, capfd: pytest.CaptureFixture[str]) -> None:
    given: dict[str, Any] = {word.partition("=")[0]: word.format(trunk=trunk) for word in words}
    base = [word for word in of(trunk, "refused", "budget_tokens=1") if word.partition("=")[0] not in given]
    assert main(["train", *base, *given.values()]) == 2
    err = capfd.readouterr().err
    assert said in err and err.count("\n") == 1
    assert not (trunk / "runs" / "refused").exists()


@pytest.mark.ranks
def test_on_real_ranks(trunk: Path) -> None:
    """From a single-rank trunk to two sharded ranks, with the optimizer."""
    words = [*of(trunk, "two"), f"init_from={trunk}/runs/trunk", "init_optimizer=true", "exchange=sharded"]
    words += [f"budget_tokens={2 * BATCH}"]
    runs([{"words": words}], 2, trunk)
    assert len(records(trunk / "runs" / "two", "commit")) == 2
    assert records(trunk / "runs" / "two", "run")[0]["world"] == 2


LOCAL = ("local_sgd", "diloco", "streaming_diloco")


@pytest.mark.parametrize("exchange", [*LOCAL, "fedavg"])
def test_ranks_that_train_on_their_own_all_begin_with_the_trunk(exchange: str, trunk: Path) -> None:
    """Seen to catch: a trunk that only the anchor, or nobody, began with."""
    text = ["exchange.clients=1"] if exchange == "fedavg" else []
    run = f"same-{exchange}"
    words = [*of(trunk, run), f"init_from={trunk}/runs/trunk", f"exchange={exchange}", "optim.lr=0", *text]
    ranks = [] if text else ["world=virtual", "world.size=2"]
    assert main(["train", *words, *ranks, f"budget_tokens={2 * BATCH}", f"batch_tokens={BATCH}"]) == 0
    a, b = weights(trunk / "runs" / run), weights(trunk / "runs" / "trunk")
    assert all(a[name].equal(b[name]) for name in b)


@pytest.mark.parametrize("exchange", LOCAL)
def test_the_optimizer_comes_along_to_each_of_them(exchange: str, trunk: Path) -> None:
    """Under beta1 = 1 (nearly) and rate 0 moments stay what they were."""
    run = f"moments-{exchange}"
    words = [
        *of(trunk, run), f"init_from={trunk}/runs/trunk", "init_optimizer=true", f"exchange={exchange}", "optim.lr=0",
        "world=virtual", "world.size=2", "optim.beta1=0.9999999", "budget_tokens=1", f"batch_tokens={BATCH}",
        "exchange.local_steps=4", *(["exchange.fragments=1"] if exchange == "streaming_diloco" else []),
    ]  # fmt: skip
    assert main(["train", *words]) == 0
    was = moments(trunk / "runs" / "trunk" / "checkpoints" / "6")
    newest = max((trunk / "runs" / run / "checkpoints").iterdir(), key=lambda path: int(path.name))
    files = sorted(newest.glob("*.safetensors"))
    assert len(files) == 2
    for path in files:
        with safe_open(path, framework="pt") as file:
            names = [name for name in file.keys() if ".update.m/" in name]  # noqa: SIM118 - not a dict
            own = {name.removeprefix("local.update."): file.get_tensor(name) for name in names}
        assert own and any(values.any() for values in own.values())
        for name, values in own.items():
            torch.testing.assert_close(values, was[name], rtol=1e-3, atol=1e-5)
