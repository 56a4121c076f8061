"""Replay of the past weighted by loss: a pure function of what is written down, in shares that follow the losses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from log_kit import SHORT, fill, trained, values

from hvdllm.cli.main import main
from hvdllm.errors import UserError
from hvdllm.online.rounds import Layout, Losses, Round, windows_of

LAYOUT = Layout(context=4, slice=10, held=2)


def test_shares_follow_the_losses_and_no_held_out_window_is_drawn() -> None:
    """Seen to catch: a part that begins at its slice among all windows, and not among the fresh ones."""
    losses = {0: 4.0, 1: 1.0, 4: 2.0}  # slices 2 and 3 count as 1, and those from 5 on as 4
    round = Round(first=50, count=4, stride=1, next=54, past=20_000)
    rows, fresh = windows_of(round, 3, LAYOUT, 0, losses)
    past = rows[~fresh]
    counts = np.bincount(past, minlength=70)
    weights = np.zeros(70)
    for window in LAYOUT.window(np.arange(50)):
        weights[window] = {0: 4.0, 1: 1.0, 2: 1.0, 3: 1.0}.get(window // 10, 2.0)
    assert (counts[weights == 0] == 0).all()
    expected = weights / weights.sum() * 20_000
    assert (np.abs(counts - expected) < 6 * np.sqrt(np.maximum(expected, 1))).all()


@pytest.mark.parametrize("losses", [{0: 1.0}, {3: 2.0, 9: 1e-9}, {0: 1e300, 1: 1e-300}, {7: 0.5}])
@pytest.mark.parametrize("first", [1, 7, 8, 9, 64])
def test_draws_lie_in_the_past_and_are_pure(losses: dict[int, float], first: int) -> None:
    round = Round(first, 3, 1, first + 3, 400)
    rows, fresh = windows_of(round, 5, LAYOUT, 1, losses)
    assert set(rows[~fresh]) <= set(LAYOUT.window(np.arange(first)).tolist())
    assert (rows == windows_of(round, 5, LAYOUT, 1, dict(reversed(losses.items())))[0]).all()
    assert first == 1 or (rows != windows_of(round, 6, LAYOUT, 1, losses)[0]).any()


def test_losses_count_from_a_round_on_and_stay_as_they_were_written(tmp_path: Path) -> None:
    mine, theirs = Losses(tmp_path), Losses(tmp_path)
    assert theirs.of(9) is None
    mine.add(4, 7, {0: 1.5})
    assert [theirs.of(k) for k in (6, 7, 99)] == [None, {0: 1.5}, {0: 1.5}]
    mine.add(8, 11, {0: 2.5, 1: 0.1})
    assert [theirs.of(k) for k in (6, 10, 11)] == [None, {0: 1.5}, {0: 2.5, 1: 0.1}]
    with open(mine.path, "a") as file:
        file.write('[12, 15, {"0"')  # cut by a kill
    again = Losses(tmp_path)
    again.add(8, 12, {0: 9.0})  # a life that goes on from before
    assert again.of(12) == {0: 2.5, 1: 0.1}
    again.add(12, 15, {0: 3.0})
    assert [Losses(tmp_path).of(k) for k in (14, 15)] == [{0: 2.5, 1: 0.1}, {0: 3.0}]
    assert theirs.of(15) == {0: 3.0}


@pytest.mark.parametrize("line", ["[1, 2]", '[1, 2, {"0": 0}]', '[1, 2, {"0": NaN}]', "{}", '[1, 2, {"x": 1}]', "[[]"])
def test_a_damaged_file_is_a_sentence(tmp_path: Path, line: str) -> None:
    (tmp_path / "losses.jsonl").write_text(line + "\n")
    with pytest.raises(UserError, match=r"losses.jsonl cannot be read .*: copy the log again"):
        Losses(tmp_path).of(5)


@pytest.mark.parametrize(
    "exchange",
    [
        "allreduce",
        *(pytest.param(name, marks=pytest.mark.thorough) for name in ("acco", "local_sgd")),
        "parameter_server",
    ],
)
def test_a_resumed_run_draws_the_same(tmp_path: Path, exchange: str) -> None:
    """Seen to catch: losses that a second life writes anew, for rounds that the first had already decided."""
    fill(tmp_path / "log", 300)
    size = 3 if exchange == "parameter_server" else 2
    more = [f"exchange={exchange}", "world=virtual", f"world.size={size}", *SHORT.get(exchange, ()), "text.replay=0.5"]
    more += ["exchange.staleness=0"] * (exchange == "parameter_server")
    whole = trained(tmp_path, *more, "text.replay_by=loss", "budget_tokens=7680")
    trained(tmp_path, *more, "text.replay_by=loss", "budget_tokens=2880", name="b")
    again = trained(tmp_path, *more, "text.replay_by=loss", "budget_tokens=7680", name="b")
    for key in ("tokens", "loss", "prequential"):
        assert values(again, key) == values(whole, key)
    uniform = trained(tmp_path, *more, "budget_tokens=7680", name="c")
    if exchange != "parameter_server":  # it decides so far ahead that the losses count from later rounds on
        assert values(uniform, "loss") != values(whole, "loss")
    assert (tmp_path / "a" / "log" / "losses.jsonl").exists() and not (tmp_path / "c" / "log" / "losses.jsonl").exists()


def test_any_number_of_ranks_draws_the_same(tmp_path: Path) -> None:
    fill(tmp_path / "log", 300)
    more = ["text.replay=0.5", "text.replay_by=loss", "budget_tokens=5760"]
    one = trained(tmp_path, *more)
    three = trained(tmp_path, *more, "world=virtual", "world.size=3", name="b")
    assert values(three) == pytest.approx(values(one), rel=1e-9)


@pytest.mark.parametrize("words", [["text.replay=0"], ["text.replay=0.5", "eval_every=0"]])
def test_weights_that_would_never_count_are_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "text=stream", "text.replay_by=loss", *words]) == 2
    assert "give text.replay and eval_every" in capsys.readouterr().err
