import threading
from collections.abc import Iterator
from itertools import islice, pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hvdllm.errors import UserError
from hvdllm.order import clients as room
from hvdllm.order.clients import Clients, owners
from hvdllm.order.epochs import drawn
from hvdllm.task.stream import Federation, Stream
from hvdllm.text import windows
from hvdllm.text.windows import Windows

END, CONTEXT = 0, 4


def text(lengths: list[int], seed: int = 0) -> np.ndarray:
    """Documents of so many tokens, their number in each, an end token between them."""
    parts = [np.full(length, 1 + number) for number, length in enumerate(lengths)]
    joined = [each for part in parts for each in (part, np.array([END]))][:-1]
    return np.concatenate(joined).astype(np.uint32)


def some(count: int, seed: int = 0) -> list[int]:
    """Lengths of documents, most short and few long."""
    return (np.random.RandomState(seed).pareto(1.5, count) * 10 + 1).astype(int).tolist()


def federation(lengths: list[int], count: int, alpha: float | None = None, **given: int) -> Federation:
    made = {"batch": 6, "micro_batch": 2, "seed": 1, "rank": 0, "size": 1} | given
    items = Windows(text(lengths), CONTEXT, END)
    return Stream(items, device=torch.device("cpu"), **made).clients(count, alpha)  # type: ignore[arg-type]


def dealt(tokens: np.ndarray, end: int | None, count: int, alpha: float | None, seed: int) -> Clients:
    return Clients(Windows(tokens, CONTEXT, end).documents(), CONTEXT, count, alpha, seed)


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    assert [t.name for t in threading.enumerate() if t.name.startswith("hvdllm-stream")] == []


# ------------------------------------------------------------------ whose a window is
@settings(max_examples=50)
@given(st.lists(st.integers(1, 40), min_size=3, max_size=30), st.integers(2, 5), st.sampled_from([None, 0.3, 10.0]))
def test_a_document_is_of_one_client_and_a_window_of_the_document_it_begins_in(
    lengths: list[int], count: int, alpha: float | None
) -> None:
    tokens = text(lengths)
    try:
        found = dealt(tokens, END, count, alpha, 3)
    except UserError:
        return
    windows = max(0, (len(tokens) - 1) // CONTEXT)
    assert sorted(np.concatenate(found._items).tolist()) == list(range(windows))
    assert found.tokens == [len(each) * CONTEXT for each in found._items]
    where: dict[int, set[int]] = {}
    for client, each in enumerate(found._items):
        for window in each.tolist():
            begin = window * CONTEXT
            while tokens[begin] == END:  # an end token is of the document that it ends
                begin -= 1
            where.setdefault(int(tokens[begin]), set()).add(client)
    assert all(len(owned) == 1 for owned in where.values())


def test_ends_are_found_across_the_parts_that_are_scanned(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = text(some(40))
    whole = dealt(tokens, END, 3, None, 0)
    monkeypatch.setattr(windows, "SCAN", 7)
    assert [a.tolist() for a in dealt(tokens, END, 3, None, 0)._items] == [a.tolist() for a in whole._items]


def test_shares_are_equal_without_alpha_and_as_drawn_with_it() -> None:
    """To within the longest document. Seen to catch shares that are ignored, and documents dealt in turn."""
    lengths = some(400)
    windows = (len(text(lengths)) - 1) // CONTEXT
    longest = max(lengths) // CONTEXT + 2
    even = dealt(text(lengths), END, 5, None, 2)
    assert max(even.tokens) - min(even.tokens) <= longest * CONTEXT
    spread = []
    for alpha in (0.1, 1.0, 100.0):
        draw = drawn(2, room.DEAL)
        shares = draw.dirichlet(np.full(5, alpha))
        found = dealt(text(lengths), END, 5, alpha, 2).tokens
        for share, count in zip(shares, found, strict=True):
            assert abs(share * windows - count / CONTEXT) <= longest
        spread.append(max(found) - min(found))
    assert spread[0] > spread[1] > spread[2]


def test_a_share_of_nothing_gets_nothing() -> None:
    owner = owners(np.array([3, 1, 0, 2, 5]), np.array([0.5, 0.0, 0.5]), drawn(0))
    assert set(owner[[0, 1, 3, 4]]) == {0, 2}


def test_the_deal_depends_on_the_seed_alone_and_is_frozen() -> None:
    """Written down once: another NumPy or machine must deal and draw the same."""
    lengths = [9, 30, 4, 17, 26, 8, 12, 21]
    deals = [dealt(text(lengths), END, 3, 0.5, seed).tokens for seed in (0, 1, 0)]
    assert deals[0] == deals[2] != deals[1]
    found = dealt(text(lengths), END, 3, None, 0)
    assert found.tokens == FROZEN[0]
    assert [found.sample(t, 2) for t in range(4)] == FROZEN[1]
    assert found.visits(1, np.arange(6))[0].tolist() == FROZEN[2]


FROZEN = ([32, 60, 40], [[1, 2], [0, 2], [0, 1], [1, 2]], [8, 6, 9, 3, 7, 10])


def test_one_document_is_no_federation() -> None:
    with pytest.raises(UserError, match=r"one of the 3 clients gets all of the data.*raise exchange.alpha"):
        dealt(text([100]), END, 3, None, 0)
    with pytest.raises(UserError, match="one of the 2 clients"):
        dealt(text([30, 30]), None, 2, None, 0)
    assert dealt(text([100]), END, 1, None, 0).tokens == [96]


# ------------------------------------------------------------------ who is drawn
def test_who_is_drawn_is_a_function_of_seed_and_round() -> None:
    """Seen to catch clients without text that are drawn, and the same draw in every round."""
    found = dealt(text([40, 2, 40, 40, 40, 40, 1]), END, 12, None, 5)
    assert 0 in found.tokens and len(found.known) >= 4
    draws = [found.sample(t, 3) for t in range(40)]
    assert draws == [found.sample(t, 3) for t in range(40)]
    assert all(len(set(draw)) == 3 and set(draw) <= set(found.known) and draw == sorted(draw) for draw in draws)
    assert {client for draw in draws for client in draw} == set(found.known)
    assert len({tuple(draw) for draw in draws}) > 3
    assert found.sample(7, None) == found.known
    other = dealt(text([40, 2, 40, 40, 40, 40, 1]), END, 12, None, 6)
    assert [other.sample(t, 3) for t in range(40)] != draws


# ------------------------------------------------------------------ what a client reads
def read(
    one: Federation, plan: list[tuple[int, int]], of: int = 2, rank: int = 0, size: int = 1
) -> list[list[list[int]]]:
    """Of each step: the windows' tokens, in order."""
    turns = one.walk(iter(plan), of, rank, size)
    out = [[row.tolist() for b in each if b.inputs is not None for row in b.inputs] for each in turns.rounds()]
    one.stream.close()
    return out


def test_a_client_reads_every_window_once_an_epoch_in_an_order_of_its_own() -> None:
    one = federation(some(60), 3)
    for client in range(3):
        count = one.tokens[client] // CONTEXT
        positions = one.clients.visits(client, np.arange(3 * count))[0]
        epochs = [positions[k * count : (k + 1) * count].tolist() for k in range(3)]
        assert all(sorted(epoch) == one.clients._items[client].tolist() for epoch in epochs)
        assert all(a != b for a, b in pairwise(epochs))
        assert read(one, [(client, k) for k in range(2)]) == [
            one.stream.items.take(positions[3 * k : 3 * k + 3], None)[0].tolist() for k in range(2)
        ]


def test_a_step_is_a_function_of_client_and_number_whatever_came_before() -> None:
    one = federation(some(60), 3)
    plan = [(0, 0), (0, 1), (2, 5), (1, 3), (0, 2)]
    straight = read(one, plan)
    assert read(one, plan[3:]) == straight[3:]
    turns = one.walk(iter(()), 2, 0, 1)
    assert [
        [row.tolist() for b in turns.share(step * 3 + client) for row in b.inputs] for client, step in plan
    ] == straight  # type: ignore[union-attr]
    walked = list(one.walk(iter(plan), 2, 0, 1).rounds())
    assert [each[0].round for each in walked] == [step * 3 + client for client, step in plan]
    assert all([b.last for b in each] == [False] * (len(each) - 1) + [True] for each in walked)
    one.stream.close()


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_ranks_that_share_a_client_share_its_step(size: int) -> None:
    plan = [(0, 0), (1, 4), (1, 5), (2, 0)]
    alone = read(federation(some(60), 3), plan)
    shared = [read(federation(some(60), 3, rank=r, size=size), plan, rank=r, size=size) for r in range(size)]
    for k, whole in enumerate(alone):
        assert [row for each in shared for row in each[k]] == whole and len(whole) == 3


def test_the_plan_is_read_ahead_of_but_not_forever() -> None:
    seen: list[int] = []

    def plan() -> Iterator[tuple[int, int]]:
        for step in range(1000):
            seen.append(step)
            yield 0, step

    one = federation(some(60), 3)
    taken = list(islice(one.walk(plan(), 2, 0, 1).rounds(), 2))
    assert len(taken) == 2 and 2 < len(seen) < 10
    one.stream.close()
    with pytest.raises(ValueError, match="not cut into 2 parts"):
        next(one.walk(plan(), 2, 0, 1).rounds(2))
