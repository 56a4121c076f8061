"""Who is waited for, and when it is said. Seen to catch: no margin, a rank named although nobody stood still, one whose
own standing still is as long (a slow network), a sentence at every record, and one after a single record."""

from __future__ import annotations

import random

import pytest

from hvdllm.trainer.straggler import RECORDS, Straggler, waited_for


@pytest.mark.parametrize(
    ("compute", "blocked", "rank"),
    [
        ([1.0, 4.0], [3.0, 0.0], 1),
        ([4.0, 1.0, 1.1, 0.9], [0.1, 3.1, 3.0, 3.2], 0),
        ([1.0, 4.0], [0.0, 0.0], None),  # nobody waits: timed, or asynchronous
        ([4.0, 4.0], [0.0, 0.0], None),  # by speed: all compute as long
        ([1.0, 1.1], [0.1, 0.0], None),  # below the margin
        ([1.0, 4.0], [5.0, 5.0], None),  # the network, alike for all
        ([1.0, 4.0], [8.0, 5.0], 1),  # the network, and a wait on top
        ([1.0, 1.0, 4.0, 4.1], [3.1, 3.1, 0.1, 0.0], 3),  # two are slow: the slower one
        ([0.0, 0.0], [0.0, 0.0], None),
        ([1.0], [0.0], None),
        ([], [], None),
    ],
)
def test_of_one_record(compute: list[float], blocked: list[float], rank: int | None) -> None:
    assert waited_for(compute, blocked) == rank


SLOW, EVEN = ([1.0, 1.0, 4.0], [3.0, 3.0, 0.0]), ([1.0, 1.0, 1.0], [0.1, 0.1, 0.1])


def test_it_is_said_once_and_again_when_it_changes() -> None:
    one = Straggler()
    said = [one.note(*SLOW) for _ in range(20)]
    assert said[:5] == [None] * 5 and said[6:] == [None] * 14 and one.named == 2
    assert said[5] == (
        "rank 2 delays the others: it computes 4.0 times as long as they do, and they waited for it in 6 of the last 6 "
        "records"
    )
    said = [one.note(*EVEN) for _ in range(RECORDS)]
    assert [s for s in said if s] == ["rank 2 no longer delays the others"] and one.named is None
    other = ([4.0, 1.0, 1.0], [0.0, 3.0, 3.0])
    [one.note(*SLOW) for _ in range(RECORDS)]
    said = [one.note(*other) for _ in range(RECORDS)]
    assert [s[:6] for s in said if s] == ["rank 2", "rank 0"] and one.named == 0


def test_a_stumble_is_no_straggler() -> None:
    one, draw = Straggler(), random.Random(3)
    for _ in range(300):
        slow = draw.randrange(8)  # another one every time, as a busy host has it
        compute = [4.0 if rank == slow and draw.random() < 0.8 else 1.0 for rank in range(8)]
        assert one.note(compute, [4.0 - c for c in compute]) is None


def test_a_rest_now_and_then_is_no_excuse_and_every_second_record_is_chance() -> None:
    one, other = Straggler(), Straggler()
    assert any([one.note(*(EVEN if k % 9 == 0 else SLOW)) for k in range(20)])
    assert not any([other.note(*(EVEN if k % 2 == 0 else SLOW)) for k in range(20)])


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("noise", [0.1, 0.3])
def test_equal_ranks_with_short_steps_are_never_named(ranks: int, noise: float) -> None:
    """The slowest keeps the others waiting in nearly every record, now this one and now that. Seen to catch: the count
    of records alone, which of two ranks names one again and again."""
    draw, one = random.Random(5), Straggler()
    for _ in range(2000):
        compute = [draw.lognormvariate(0, noise) for _ in range(ranks)]
        assert one.note(compute, [max(compute) - own for own in compute]) is None


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_slow_rank_is_named_through_the_noise_and_once(ranks: int) -> None:
    draw, one, said = random.Random(6), Straggler(), []
    for _ in range(200):
        compute = [(2.0 if rank == 1 else 1.0) * draw.lognormvariate(0, 0.1) for rank in range(ranks)]
        said.append(one.note(compute, [max(compute) - own for own in compute]))
    assert [text[:6] for text in said if text] == ["rank 1"] and any(said[:12])
