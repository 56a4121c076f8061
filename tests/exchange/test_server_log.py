"""The log's arithmetic alone, word by word. Seen to catch: a bound off by one to either side, a worker woken without a
second look, marks told to some ranks only or behind the next grant, grants while a rank is in an act, asks lost, a need
of no clock or of part of one, a mark in mid-clock, a lease that counts acts or waiting."""

from __future__ import annotations

from typing import Any

from hvdllm.exchange.base import Milestones
from hvdllm.exchange.server_log import Standing, UpdateLog

PUSH: dict[str, Any] = {"kind": "push", "n": 10, "loss": 1.0, "norm": 2.0, "seen": [0.0, 0]}
BEGIN = {"kind": "begin"}


def log(staleness: int | None, workers: int = 2, ranks: int = 2, **milestones: Any) -> UpdateLog:
    return UpdateLog(workers, ranks, staleness, Milestones(**milestones), Standing(clocks=[0] * workers))


def say(log: UpdateLog, rank: int, said: dict[str, Any], now: float = 0.0) -> list[tuple[int, dict[str, Any]]]:
    log.hear(rank, said, now)
    return log.answers()


def test_tickets_are_numbered_and_tokens_counted_push_by_push() -> None:
    here = log(None)
    assert say(here, 0, PUSH) == [(0, {"ticket": 1, "committed": 10})]
    assert say(here, 0, BEGIN) == [(0, {"need": 1})], "its own pushes at least"
    assert say(here, 1, {**PUSH, "n": 5}) == [(1, {"ticket": 2, "committed": 15})]
    assert here.standing.tokens == 15 and here.standing.steps == 2 and here.standing.clocks == [1, 1]


def test_at_staleness_0_tokens_count_by_whole_clocks() -> None:
    here = log(0)
    assert say(here, 0, PUSH) == [(0, {"ticket": 1, "committed": 10})]
    assert say(here, 0, BEGIN) == [] and here.standing.tokens == 0
    assert say(here, 1, PUSH) == [(1, {"ticket": 2, "committed": 20}), (0, {"need": 2})]
    assert here.standing.tokens == 20 and here.standing.steps == 1
    assert say(here, 0, PUSH) == [(0, {"ticket": 3, "committed": 30})], "rank 0 is one clock ahead"
    assert say(here, 1, BEGIN) == [(1, {"need": 2})], "of whole clocks: its own part of the next is still to come"


def test_whoever_waits_is_looked_at_again_after_every_word() -> None:
    """s = 1, three workers: one push of the slowest lets those go that are one ahead of it, and no others."""
    here = log(1, 3, 3)
    for rank, clock in ((0, 2), (1, 2)):
        for _ in range(clock):
            say(here, rank, PUSH)
    assert say(here, 0, BEGIN) == [] and say(here, 1, PUSH) == [(1, {"ticket": 5, "committed": 50})]
    assert say(here, 1, BEGIN) == []
    assert say(here, 2, PUSH) == [(2, {"ticket": 6, "committed": 60}), (0, {"need": 6})], "rank 1 is two ahead"


def test_a_light_mark_is_told_with_the_next_answer_and_stops_nobody() -> None:
    here = log(None, logs=(20,))
    say(here, 0, PUSH)
    (told, mark), (again, grant) = [*say(here, 0, PUSH), *say(here, 0, BEGIN)]
    assert told == again == 0 and mark["ticket"] == 2
    assert grant["mark"]["tokens"] == 20 and not grant["mark"]["frozen"] and grant["mark"]["mark"] == 1
    assert say(here, 0, BEGIN) == [(0, {"need": 2})], "rank 1 has not heard of it yet"
    assert say(here, 0, PUSH)[0][1]["ticket"] == 3
    assert say(here, 1, PUSH)[0][1]["mark"]["tokens"] == 20


def test_a_frozen_mark_grants_nothing_until_all_have_left() -> None:
    here = log(None, 2, 3, acts=(20,))  # rank 2 only serves
    say(here, 2, {"kind": "serve"})
    say(here, 0, PUSH)
    answers = say(here, 1, PUSH)
    assert [rank for rank, _ in answers] == [1, 2] and answers[1][1]["mark"]["frozen"]
    assert say(here, 0, BEGIN) == [(0, {"mark": answers[1][1]["mark"]})]
    say(here, 2, {"kind": "left"})
    say(here, 0, {"kind": "left"})
    assert say(here, 0, BEGIN) == [], "rank 1 has not even heard of it"
    assert say(here, 1, BEGIN)[0][1]["mark"]["mark"] == 1
    assert say(here, 1, {"kind": "left"}) == [(0, {"need": 1})]


def test_asks_make_a_mark_at_once_and_are_told_once() -> None:
    here = log(None, 2, 2)
    say(here, 0, PUSH)
    say(here, 0, {"kind": "ask", "save": True})
    mark = say(here, 0, PUSH)[0][1]["mark"]
    assert mark["save"] and not mark["stop"] and mark["tokens"] == 10, "what it wanted to push has no ticket"
    say(here, 1, {**PUSH, "stop": True})
    for rank in (0, 1):
        say(here, rank, {"kind": "left"})
    assert say(here, 0, PUSH) == [(0, {"ticket": 2, "committed": 20})], "no mark of nothing: it has no loss, no record"
    again = say(here, 0, PUSH)[0][1]["mark"]
    assert again["stop"] and not again["save"] and again["mark"] == 2, "what was asked in a mark is of the next"


def test_at_staleness_0_a_mark_waits_for_a_whole_clock_but_not_where_a_gradient_is_bad() -> None:
    here = log(0)
    say(here, 0, PUSH)
    assert say(here, 0, {"kind": "begin", "save": True}) == []
    assert say(here, 1, PUSH)[1][1]["mark"]["tokens"] == 20
    here = log(0)
    say(here, 0, PUSH)
    assert say(here, 1, {"kind": "bad", "norm": float("inf")})[0][1]["mark"]["bad"] == float("inf")


def test_a_report_sums_what_was_pushed_since_the_mark_before() -> None:
    here = log(None, logs=(20,))
    for rank, seen in ((0, [0.0, 0]), (1, [0.5, 0])):
        say(here, rank, {**PUSH, "seen": seen, "compute_s": 2.0})
    first = say(here, 0, {**BEGIN, "compute_s": 1.0})[0][1]["mark"]
    assert first["report"]["loss_sum"] == 2.0 and first["report"]["loss_tokens"] == 20
    assert first["report"]["compute_s"] == [2.0, 2.0] and first["report"]["grad_norm"] == 2.0
    assert first["staleness"] == [0.25, 1], "pushes between what it read and its own: 0 and 0.5, at most 1"


def test_the_lease_names_who_owes_a_word() -> None:
    here = log(1, 2, 2, acts=(20,))
    assert here.silent(0.0, 5.0) is None
    say(here, 0, PUSH, now=3.0)
    say(here, 0, BEGIN, now=3.0)
    assert here.silent(5.0, 5.0) is None
    assert here.silent(5.1, 5.0) == 1
    say(here, 1, PUSH, now=6.0)  # a frozen mark: rank 0 is told nothing before it asks
    assert here.silent(8.1, 5.0) == 0, "it has been computing since second 3"
    say(here, 0, PUSH, now=8.2)
    assert here.silent(99.0, 5.0) == 1, "who has been told stands in its acts, rank 1 has not been"
    say(here, 1, BEGIN, now=99.5)
    assert here.silent(1000.0, 5.0) is None
    for rank in (0, 1):
        say(here, rank, {"kind": "left"}, now=1000.0)
    assert here.silent(1004.0, 5.0) is None and here.silent(1005.1, 5.0) == 0
    here = log(0)
    here.silent(0.0, 5.0)
    say(here, 0, PUSH, now=1.0)
    say(here, 0, BEGIN, now=1.0)
    say(here, 1, PUSH, now=50.0)
    assert here.silent(54.0, 5.0) is None, "rank 0 waited until then"
