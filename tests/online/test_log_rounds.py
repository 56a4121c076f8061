"""Rounds: each fresh window once, held-out ones never, and what a backlog leaves out is counted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from hvdllm.errors import UserError
from hvdllm.online.rounds import FORM, Layout, Plan, Round, Rounds, windows_of

LAYOUT = Layout(context=4, slice=10, held=2)


def test_windows_that_are_held_out_are_never_trained_on_and_all_others_once() -> None:
    """Seen to catch: a slice that ends one window too early, a held-out window that counts as fresh."""
    for tokens in range(0, 200):
        fresh = LAYOUT.fresh(tokens)
        found = set(LAYOUT.window(np.arange(fresh)).tolist())
        windows = set(range(max(0, tokens - 1) // 4))
        held = {w for s in range(20) for w in LAYOUT.held_out(s).tolist()}
        assert found == windows - held and len(found) == fresh
        assert all(set(LAYOUT.held_out(s).tolist()) <= windows for s in range(LAYOUT.slices(tokens)))


def trained(plan: Plan, arrivals: list[int], seed: int = 0) -> tuple[list[Round], list[int]]:
    """The rounds that are made while windows arrive, and the fresh windows that are trained on."""
    rounds: list[Round] = []
    for fresh in arrivals:
        while (found := plan.whole(rounds[-1].next if rounds else 0, fresh)) is not None:
            rounds.append(found)
    return rounds, [int(w) for t, r in enumerate(rounds) for w in windows_of(r, t, LAYOUT, seed)[0][: r.count]]


def test_all_takes_each_window_once_in_order() -> None:
    _, windows = trained(Plan(8, 1), list(range(0, 100, 7)))
    assert windows == LAYOUT.window(np.arange(96)).tolist()


@pytest.mark.parametrize("backlog", ["newest", "sample"])
def test_a_backlog_is_left_out_as_the_policy_says(backlog: str) -> None:
    plan = Plan(8, 1, backlog=backlog, behind=20)
    rounds, windows = trained(plan, [10, 100])
    assert rounds[0] == Round(0, 8, 1, 8, 0)
    if backlog == "newest":
        assert rounds[1] == Round(92, 8, 1, 100, 0)
    else:
        assert rounds[1] == Round(8, 8, 11, 100, 0)
    assert len(set(windows)) == len(windows) == 16
    assert plan.whole(8, 28) == Round(8, 8, 1, 16, 0)  # no more than may wait


def test_a_share_of_each_round_is_from_the_past_and_a_pure_function() -> None:
    plan = Plan(8, 1, replay=0.25)
    rounds, _ = trained(plan, [60])
    assert [r.past for r in rounds] == [0] + [2] * 9 and all(r.count == 6 for r in rounds)
    for number, round in enumerate(rounds):
        rows, fresh = windows_of(round, number, LAYOUT, seed=5)
        again, _ = windows_of(round, number, LAYOUT, seed=5)
        assert (rows == again).all() and fresh.sum() == 6
        assert set(rows[~fresh].tolist()) <= set(LAYOUT.window(np.arange(round.first)).tolist())
    drawn = {tuple(windows_of(r, t, LAYOUT, seed)[0][6:]) for t, r in enumerate(rounds) for seed in (5, 6)}
    assert len(drawn) > 10


def test_a_short_round_has_at_least_a_window_a_rank_and_equal_parts() -> None:
    plan = Plan(8, least=4, parts=2)
    assert [plan.short(0, fresh) and plan.short(0, fresh).items for fresh in range(8)] == [None] * 4 + [4, 4, 6, 6]
    assert plan.short(10, 100) == Round(10, 8, 1, 18, 0)


def test_rounds_are_read_as_they_were_written(tmp_path: Path) -> None:
    mine, theirs = Rounds(tmp_path), Rounds(tmp_path)
    assert theirs.get(0) is None and theirs.count() == 0
    made = [Round(8 * t, 8, 1, 8 * t + 8, 0) for t in range(200)]
    for number, round in enumerate(made):
        mine.add(number, round)
        assert theirs.get(number) == round and theirs.get(number + 1) is None
    assert Rounds(tmp_path).count() == 200 and Rounds(tmp_path).get(137) == made[137]
    data = mine.path.read_bytes()
    mine.path.write_bytes(data[:-3])  # cut by a kill
    assert Rounds(tmp_path).count() == 199 and Rounds(tmp_path).get(199) is None
    mine.path.write_bytes(data[: 5 * FORM.size] + bytes(FORM.size) + data[6 * FORM.size :])
    with pytest.raises(UserError, match="round 5 is not what was written"):
        Rounds(tmp_path).get(5)


@pytest.mark.parametrize(
    "numbers", [(0, 2**40, 1, 2**41, 0), (0, 4, 1, 4, 2**40), (-8, 4, 1, 4, 0), (0, 4, 0, 4, 0), (0, 4, 1, 2, 0)]
)
def test_a_round_that_nobody_decided_so_takes_no_memory(tmp_path: Path, numbers: tuple[int, ...]) -> None:
    rounds = Rounds(tmp_path)
    rounds.add(0, Round(*numbers))
    rounds.add(1, Round(4, 4, 1, 8, 0))
    with pytest.raises(UserError, match="round 0 is not what was written"):
        Rounds(tmp_path).get(0)


def test_a_slice_counts_once_all_of_it_has_arrived() -> None:
    """Seen to catch: a slice whose fresh windows are all trained on while its held-out ones are still to come."""
    for tokens in range(5, 200):
        fresh = LAYOUT.fresh(tokens)
        for following in range(1, fresh + 1):
            place = LAYOUT.place(Round(0, 1, 1, following, 0))
            assert place <= (tokens - 1) // LAYOUT.context, "a window before it has not arrived"
            assert LAYOUT.window(np.arange(following))[-1] == place - 1
