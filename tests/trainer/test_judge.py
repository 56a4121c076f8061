"""Which rank stands still, judged on a clock that the test turns."""

from __future__ import annotations

from hvdllm.pulse import Place
from hvdllm.trainer.judge import Beat, Judge

AFTER = 60.0


class Ranks:
    """Three ranks that beat every second. Rank 0 waits, rank 1 trains, rank 2 waits, until a test says otherwise."""

    def __init__(self) -> None:
        self.judge, self.now = Judge(AFTER, 1.0, AFTER / 2), 0.0
        waits = Place("exchange", 7, 0, "`grad.0`", AFTER)
        self.places = {0: waits, 1: Place("forward", 7, 0, None, AFTER), 2: waits}
        self.counts = dict.fromkeys(self.places, 0)
        self.left: set[int] = set()

    def pass_(self, seconds: int, silent: tuple[int, ...] = (), moving: tuple[int, ...] = ()) -> None:
        for _ in range(seconds):
            self.now += 1.0
            for rank, place in self.places.items():
                self.counts[rank] += rank not in silent
                if rank in moving:
                    self.places[rank] = Place(
                        place.phase, place.step, place.moves + 1, place.waits, place.limit_s
                    )  # fmt: skip
            self.judge.look(self.beats(), self.now)

    def beats(self) -> dict[int, Beat]:
        return {rank: Beat(self.counts[rank], place, rank in self.left) for rank, place in self.places.items()}

    def named(self) -> tuple[int, bool] | None:
        hang = self.judge.hang(self.now)
        return (hang.rank, hang.silent) if hang is not None else None


def test_a_rank_that_does_not_go_on_is_named_with_who_waits_for_what() -> None:
    ranks = Ranks()
    ranks.pass_(60)
    assert ranks.named() is None
    ranks.pass_(1)
    assert ranks.named() == (1, False)
    hang = ranks.judge.hang(ranks.now)
    assert hang is not None and hang.waiting == {0: "`grad.0`", 2: "`grad.0`"} and hang.seconds == 60.0


def test_a_rank_that_is_silent_is_named_wherever_it_is() -> None:
    """Also in a phase that may last long, and also while it waits."""
    ranks = Ranks()
    ranks.places[1] = Place("save", 7, 0, None, 1620.0)
    ranks.pass_(5)
    ranks.pass_(60, silent=(1,))
    assert ranks.named() == (1, True)
    ranks = Ranks()
    ranks.places[1] = ranks.places[0]
    ranks.pass_(5)
    ranks.pass_(60, silent=(1,))
    assert ranks.named() == (1, True)


def test_a_host_that_pauses_for_45_seconds_goes_on() -> None:
    ranks = Ranks()
    for _ in range(5):
        ranks.pass_(45, silent=(1,))
        assert ranks.named() is None
        ranks.pass_(1, moving=(0, 1, 2))


def test_who_makes_progress_is_not_named_however_slow_the_others_think_it_is() -> None:
    ranks = Ranks()
    ranks.pass_(600, moving=(1,))
    assert ranks.named() is None


def test_a_long_phase_may_last_as_long_as_it_says() -> None:
    ranks = Ranks()
    ranks.places[1] = Place("save", 7, 0, None, 1620.0)
    ranks.pass_(1620)
    assert ranks.named() is None
    ranks.pass_(1)
    assert ranks.named() == (1, False)


def test_nobody_is_named_for_whom_nobody_waits() -> None:
    ranks = Ranks()
    for rank in (0, 2):
        ranks.places[rank] = Place("forward", 7, 0, None, AFTER)
    ranks.pass_(200, moving=(0, 2))
    assert ranks.named() is None


def test_where_all_wait_nobody_is_named() -> None:
    """A sum over a slow link may take minutes; world.timeout_s limits it."""
    ranks = Ranks()
    ranks.places[1] = ranks.places[0]
    ranks.pass_(300)
    assert ranks.named() is None


def test_a_rank_that_has_left_is_not_named() -> None:
    ranks = Ranks()
    ranks.left.add(1)
    ranks.pass_(10)
    ranks.pass_(100, silent=(1,))
    assert ranks.named() is None


def test_a_judge_that_was_stopped_itself_trusts_nothing_that_it_knew() -> None:
    ranks = Ranks()
    ranks.pass_(55)
    ranks.now += 45.0  # without a look
    ranks.pass_(59)
    assert ranks.named() is None
    ranks.pass_(2)
    assert ranks.named() == (1, False)


def test_a_user_is_told_once_until_the_rank_has_moved() -> None:
    ranks = Ranks()
    ranks.pass_(61)
    assert ranks.named() == (1, False)
    ranks.judge.told(1)
    ranks.pass_(300)
    assert ranks.named() is None
    ranks.pass_(1, moving=(1,))
    ranks.pass_(60)
    assert ranks.named() == (1, False)


def test_a_rank_of_which_nothing_was_heard_is_not_judged() -> None:
    """Where hosts do not share the folder."""
    ranks = Ranks()
    del ranks.places[1]
    ranks.pass_(300)
    assert ranks.named() is None
