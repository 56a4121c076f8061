"""hvdllm.Session: a model, data and loss of one's own, with the records, checkpoints and resume of `hvdllm train`."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import launch
import numpy as np
import pytest
import torch
from torch import nn

import hvdllm
from hvdllm import runs
from hvdllm.cli.main import main
from hvdllm.errors import RunError, UserError
from hvdllm.report.read import History, read

WORDS = ["device=cpu", "device.threads=1", "audit_every=0", "precision=fp64", "schedule=constant", "log_every=8"]


def data(count: int = 40, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 3, generator=draw, dtype=torch.float64)
    return [{"x": row, "y": row.sum() + 1} for row in x]


def model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()


def squares(net: nn.Module, batch: Any) -> torch.Tensor:
    return (net(batch["x"])[:, 0] - batch["y"]).square().sum()


def session(tmp_path: Path, *words: str, net: nn.Module | None = None, **more: Any) -> hvdllm.Session:
    given: dict[str, Any] = {"data": data(), "batch": 8, "budget": 80, "optim": "sgd", "loss": squares}
    settings = [*WORDS, f"runs_dir={tmp_path}", "optim.lr=0.05", *words]
    return hvdllm.Session(net or model(), settings=settings, **given | more)


def weights(net: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in net.parameters()])


def test_it_trains_as_a_plain_loop_does(tmp_path: Path) -> None:
    """The mean over the global batch, in the order of the seed. Seen to catch: a mean of means, another order."""
    from hvdllm.order.epochs import permutation

    ours, plain = model(), model()
    one = session(tmp_path, "optim.weight_decay=0", "optim.clip=0", "name=a", net=ours)
    commits = list(one)
    assert [commit.tokens for commit in commits] == list(range(8, 81, 8)) and not one.stopped
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.05, momentum=one.config.optim.momentum)
    items = data()
    order = np.concatenate([permutation(40, 0, epoch) for epoch in (0, 1)])
    for step in range(10):
        batch = torch.utils.data.default_collate([items[int(k)] for k in order[8 * step : 8 * step + 8]])
        optimizer.zero_grad()
        (squares(plain, batch) / 8).backward()
        optimizer.step()
    torch.testing.assert_close(weights(ours), weights(plain), rtol=1e-9, atol=1e-12)


def test_its_folder_is_that_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = {"error": lambda net, batch: (net(batch["x"])[:, 0] - batch["y"]).abs().sum()}
    held = data(12, 1)
    net = model()
    list(session(tmp_path, "name=a", "eval_every=40", net=net, validation=held, metrics=metrics, unit="rows"))
    evals = [record for record in runs.records(tmp_path / "a") if record["kind"] == "eval"]
    batch = torch.utils.data.default_collate(held)
    with torch.no_grad():
        assert evals[-1]["loss"] == pytest.approx(squares(net, batch).item() / 12)
        assert evals[-1]["error"] == pytest.approx(metrics["error"](net, batch).item() / 12)
    assert len(evals) == 2 and isinstance(read(tmp_path / "a"), History)
    said = capsys.readouterr().out
    assert "80 rows" in said and "a row" in said and "next:" not in said
    for command in ("evaluate", "sample"):
        assert main([command, str(tmp_path / "a")]) == 2
        assert "hvdllm.Session trained" in capsys.readouterr().err
    assert main(["train", "task=own"]) == 2 and "hvdllm.Session" in capsys.readouterr().err


def test_a_stopped_run_goes_on_and_a_finished_one_gives_its_weights(tmp_path: Path) -> None:
    whole = model()
    list(session(tmp_path, "name=whole", net=whole))
    one = session(tmp_path, "name=parts", "save_every=1000")
    for commit in one:
        if commit.step == 4:
            one.stop()
    assert one.stopped and commit.tokens < 80
    net = model(7)  # its weights come from the checkpoint
    rest = list(session(tmp_path, "name=parts", "save_every=1000", net=net))
    assert rest[-1].tokens == 80 and torch.equal(weights(net), weights(whole))
    again = model(8)
    assert list(session(tmp_path, "name=parts", net=again)) == [] and torch.equal(weights(again), weights(whole))


def test_units_weigh_items(tmp_path: Path) -> None:
    """An item may count several units: the gradient is divided by their number."""
    items = [{"x": torch.tensor([[float(k)]] * 3, dtype=torch.float64), "n": 1 + k % 3} for k in range(8)]
    net = nn.Linear(1, 1, bias=False).double()
    nn.init.constant_(net.weight, 1.0)

    def loss(net: nn.Module, batch: Any) -> torch.Tensor:
        counted = torch.arange(3)[None] < batch["n"][:, None]
        return (net(batch["x"])[..., 0] * counted).sum()

    words = ["optim.momentum=0", "optim.weight_decay=0", "optim.clip=0", "name=a", "optim.lr=1"]
    made = session(
        tmp_path, *words, net=net, loss=loss, data=items, batch=15, budget=15, count=lambda item: item["n"], units=1.875
    )
    (commit,) = made
    total = sum(item["n"] for item in items)
    mean = sum(float(k) * item["n"] for k, item in enumerate(items)) / total
    assert commit.tokens == total == 15 and net.weight.item() == pytest.approx(1 - mean)


def test_what_cannot_work_is_one_sentence(tmp_path: Path) -> None:
    frozen = model().requires_grad_(False)
    for match, more in (
        ("no parameters that require a gradient", {"net": frozen}), ("data of at least one item", {"data": []}),
        ("data has 40 items, fewer than the 64", {"batch": 64}), ("there is no exchange=ring", {"exchange": "ring"}),
        ("it must be the SUM", {"loss": lambda net, batch: net(batch["x"])}),
    ):  # fmt: skip
        with pytest.raises(UserError, match=match):
            list(session(tmp_path, "name=b", **more))
    list(session(tmp_path, "name=c"))
    with pytest.raises(UserError, match=r"task\.size was 40 and is now 39"):
        list(session(tmp_path, "name=c", data=data(39), budget=160))


def test_a_loss_that_is_not_finite_ends_the_run_and_changes_nothing(tmp_path: Path) -> None:
    items = data()
    items[5]["y"] = torch.tensor(float("nan"), dtype=torch.float64)
    with pytest.raises(RunError, match="is not finite on rank 0"):
        list(session(tmp_path, "name=a", data=items))


def test_importing_hvdllm_needs_no_torch() -> None:
    code = "import hvdllm, sys; assert 'torch' not in sys.modules; hvdllm.Session; assert 'torch' in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="no attribute"):
        hvdllm.Sessions  # type: ignore[attr-defined]  # noqa: B018


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


PAGE = Path(hvdllm.__file__).parent / "task" / "README.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)


@pytest.mark.parametrize("number", range(len(EXAMPLES)), ids=["session", "loop", "hook"])
def test_an_example_of_the_page_runs(number: int, tmp_path: Path) -> None:
    script = tmp_path / "mine.py"
    script.write_text(EXAMPLES[number])
    alone = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    done = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True, timeout=launch.LIMIT_S,
        env={**os.environ, "OMP_NUM_THREADS": "1", **(alone if "dist.init" in EXAMPLES[number] else {})},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    if number == 0:
        assert len(EXAMPLES[0].splitlines()) <= 35 and "update 100: 6,400 items" in done.stdout
        last = [record for record in runs.records(tmp_path / "runs" / "mine") if record["kind"] == "eval"][-1]
        assert last["accuracy"] > 0.6


SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from test_session import model, session, weights
net = model(int(sys.argv[2]) * 0 + __import__("os").getpid() % 7)
for commit in session(Path(sys.argv[1]), "name=two", "exchange.bucket_mb=null", net=net, exchange=sys.argv[3]):
    pass
print("weights", weights(net).sum().item())
"""


@pytest.mark.ranks
def test_ranks_of_torchrun_train_together(tmp_path: Path) -> None:
    """All get the weights of rank 0, and keep them equal."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(tests=str(Path(__file__).parent)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    done = subprocess.run(
        [*command, str(tmp_path), "0", "allreduce"], capture_output=True, text=True, timeout=launch.LIMIT_S
    )
    sums = {line for line in done.stdout.splitlines() if line.startswith("weights")}
    assert done.returncode == 0 and len(sums) == 1, done.stderr[-2000:]


def test_a_rate_without_an_end_and_publications(tmp_path: Path) -> None:
    one = session(
        tmp_path, "schedule=infinite", "schedule.warmup_tokens=16", "schedule.settle_tokens=16",
        "schedule.rewarm_at=[48]", "publish_every=40", "name=a",
    )  # fmt: skip
    rates = [commit.lr / 0.05 for commit in one]
    assert rates == pytest.approx([0.5, 1, 0.65, 0.3, 0.3, 0.3, 0.65, 1, 0.65, 0.3])
    from safetensors.torch import load_file

    ours, final = (load_file(tmp_path / "a" / name / "model.safetensors") for name in ("published/latest", "final"))
    assert all(torch.equal(ours[name], final[name]) for name in final)
