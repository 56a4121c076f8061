"""Where a rank says it is, and how long it may stand there."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from hvdllm import pulse
from hvdllm.faults import Fault, Injected
from hvdllm.online.waiting import Pauses, Waiting
from hvdllm.pulse import DRIVEN, FIRST, NEARLY, Pulse
from hvdllm.trainer.evaluate import evaluate
from hvdllm.world.base import Asks
from hvdllm.world.single import SingleWorld


class Clock:
    now = 100.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(pulse.time, "monotonic", lambda: clock.now)
    return clock


@pytest.fixture
def mine() -> Iterator[Pulse]:
    made = Pulse(60.0, 1800.0)
    pulse.begin(made)
    yield made
    pulse.begin(None)


def elsewhere(work: object) -> None:
    thread = threading.Thread(target=work)  # type: ignore[arg-type]
    thread.start()
    thread.join()


def test_without_a_run_marks_do_nothing() -> None:
    pulse.enter("forward")
    pulse.stepped(3)
    pulse.waits("x")
    with pulse.waiting("x"), pulse.during("save"):
        pass
    assert pulse.ends("x", pulse.SELF) is None


def test_a_rank_is_where_its_loop_is(mine: Pulse) -> None:
    pulse.enter("forward")
    pulse.stepped(3)
    before = mine.place()
    elsewhere(lambda: pulse.enter("update"))
    place = mine.place()
    assert (place.phase, place.step, place.waits) == ("forward", 3, None) and place.moves > before.moves
    with pulse.during("save"):
        assert mine.place().phase == "save"
    assert mine.place().phase == "forward"


def test_waits_are_named_and_nested(mine: Pulse) -> None:
    with pulse.waiting("a letter"):
        with pulse.waiting("`grad.0`"):
            assert mine.place().waits == "`grad.0`"
        assert mine.place().waits == "a letter"
    assert mine.place().waits is None
    pulse.waits("the sums of its library")
    assert mine.place().waits == "the sums of its library"
    pulse.enter("exchange")
    assert mine.place().waits is None


def test_who_waits_for_its_driver_waits_for_others_only_if_that_does(mine: Pulse) -> None:
    at = threading.Event(), threading.Event()

    def drive() -> None:
        pulse.driver()
        with pulse.waiting("`param.0`"):
            at[0].set()
            at[1].wait()

    thread = threading.Thread(target=drive)
    with pulse.waiting(DRIVEN):
        assert mine.place().waits is None
        thread.start()
        at[0].wait()
        assert mine.place().waits == "`param.0`"
        at[1].set()
        thread.join()
        assert mine.place().waits is None


def test_a_rank_whose_server_makes_an_update_does_not_wait_for_others(mine: Pulse) -> None:
    at = threading.Event(), threading.Event()

    def serve() -> None:
        pulse.enter("update")
        at[0].set()
        at[1].wait()
        pulse.enter("exchange")

    thread = threading.Thread(target=serve)
    with pulse.waiting("a letter in `weights`"):
        assert mine.place().waits == "a letter in `weights`"
        thread.start()
        at[0].wait()
        assert (mine.place().phase, mine.place().waits) == ("update", None)
        at[1].set()
        thread.join()
        assert mine.place().waits == "a letter in `weights`"


def test_no_phase_may_last_longer_than_ranks_wait() -> None:
    rhythm = Pulse(60.0, 100.0)
    rhythm.enter("forward")
    assert rhythm.place().limit_s == NEARLY * 100


def test_a_first_step_may_take_longer_and_so_may_what_took_long_before(clock: Clock, mine: Pulse) -> None:
    pulse.enter("forward")
    assert mine.place().limit_s == FIRST * 60
    clock.now += 2
    pulse.enter("exchange")
    pulse.stepped(1)
    pulse.enter("forward")
    assert mine.place().limit_s == 60
    clock.now += 50
    pulse.enter("exchange")
    assert mine.place().limit_s == 60
    pulse.enter("forward")
    assert mine.place().limit_s == 250
    pulse.enter("evaluation")
    assert mine.place().limit_s == FIRST * 60
    pulse.enter("shutdown")
    assert mine.place().limit_s == 60


@pytest.mark.parametrize("phase", ["save", "waiting for text", "preparing data", "start"])
def test_long_phases_have_nearly_the_time_that_ranks_wait_at_all(phase: str, mine: Pulse) -> None:
    pulse.enter(phase)
    assert mine.place().limit_s == NEARLY * 1800


def test_what_was_waited_is_no_time_that_a_phase_needs(clock: Clock, mine: Pulse) -> None:
    pulse.enter("exchange")
    with pulse.waiting("`grad.0`"):
        clock.now += 1000
    pulse.stepped(1)
    pulse.enter("forward")
    pulse.enter("exchange")
    assert mine.place().limit_s == 60


def test_who_waits_for_text_says_so(mine: Pulse, tmp_path: Path) -> None:
    seen: list[tuple[str, int]] = []
    waiting = Waiting(
        Asks(), Pauses(tmp_path, "life", 0), 0, 1, lambda seconds: seen.append((mine.place().phase, mine.moves))
    )  # fmt: skip
    pulse.stepped(5)
    assert waiting.until(lambda waited_s: len(seen) > 2, lambda: False)
    waiting.stand(0.0)
    phases, moves = zip(*seen, strict=True)
    assert phases == ("waiting for text",) * 4 and mine.place().limit_s == NEARLY * 1800
    assert len(set(moves)) == 4, "a stream may be quiet for longer than that"


def test_an_evaluation_moves_with_every_batch(mine: Pulse) -> None:
    pulse.stepped(5)
    moves: list[int] = []

    class Counting:
        measures = 2

        def measure(self, *_: object) -> torch.Tensor:
            moves.append(mine.place().moves)
            return torch.ones(2)

        def metrics(self, sums: list[float]) -> dict[str, float]:
            return {"loss": sums[0]}

    batches = [(torch.ones(1), torch.ones(1))] * 3
    task: Any = Counting()
    evaluate(task, torch.nn.Linear(1, 1), batches, "fp32", torch.device("cpu"), SingleWorld())
    assert len(moves) == len(set(moves)) == 3 and mine.place().phase == "evaluation"


def test_a_fault_breaks_once(capsys: pytest.CaptureFixture[str]) -> None:
    pulse.begin(Pulse(60.0, 1800.0, Fault(0, 2, "data", "exception")))
    try:
        pulse.enter("data")
        pulse.stepped(1)
        with pytest.raises(Injected):
            pulse.enter("data")
        pulse.enter("data")
    finally:
        pulse.begin(None)
    assert "debug.fault, exception in phase data" in capsys.readouterr().err
