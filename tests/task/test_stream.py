"""The batch stream: the same samples in the same order for any number of ranks, from any position."""

import itertools
import threading
import time
from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hvdllm.errors import UserError
from hvdllm.order.epochs import deal, permutation
from hvdllm.task.stream import Batch, Stream
from hvdllm.task.stream import held_out as validation
from hvdllm.text.windows import Windows

CPU = torch.device("cpu")


def tokens_of(windows: int, context: int, rest: int = 0) -> np.ndarray:
    """Tokens that all differ, so that a window is known by its first."""
    return np.arange(windows * context + 1 + rest, dtype=np.uint32)


def stream(windows: int = 10, context: int = 4, **settings: object) -> Stream:
    given: dict[str, object] = {"batch": 4, "micro_batch": 2, "seed": 1, "rank": 0, "size": 1, "device": CPU}
    return Stream(Windows(tokens_of(windows, context), context), **given | settings)  # type: ignore[arg-type]


def rows(batches: list[Batch], context: int = 4) -> list[int]:
    """Which windows the batches hold, in order."""
    return [int(row[0]) // context for each in batches if each.inputs is not None for row in each.inputs]


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    assert [t.name for t in threading.enumerate() if t.name.startswith("hvdllm-stream")] == []


# ------------------------------------------------------------------ ranks
@given(
    st.integers(1, 40).flatmap(lambda windows: st.tuples(st.just(windows), st.integers(1, windows))),
    st.integers(1, 9),
    st.integers(0, 3),
    st.integers(0, 30),
)
def test_ranks_together_hold_the_global_batch(sizes: tuple[int, int], micro_batch: int, seed: int, number: int) -> None:
    windows, batch = sizes
    alone = rows(stream(windows, batch=batch, micro_batch=windows, seed=seed).share(number))
    assert len(alone) == batch
    for size in (1, 2, 3, 4, 7):
        shares = [
            stream(windows, batch=batch, micro_batch=micro_batch, seed=seed, rank=rank, size=size).share(number)
            for rank in range(size)
        ]
        assert [row for share in shares for row in rows(share)] == alone
        counts = [len(rows(share)) for share in shares]
        assert max(counts) - min(counts) <= 1
        for share, count in zip(shares, counts, strict=True):
            assert [each.last for each in share] == [False] * (len(share) - 1) + [True]
            assert [(each.round, each.index) for each in share] == [(number, index) for index in range(len(share))]
            assert len(share) == max(1, -(-count // micro_batch))
            assert [each.tokens for each in share] == [
                0 if each.inputs is None else each.inputs.numel() for each in share
            ]
            assert sum(each.tokens for each in share) == count * 4


def test_64_sequences_on_3_ranks() -> None:
    shares = [stream(100, batch=64, micro_batch=6, rank=rank, size=3).share(0) for rank in range(3)]
    assert [len(rows(share)) for share in shares] == [22, 21, 21]
    assert [len(share) for share in shares] == [4, 4, 4]


def test_a_rank_without_a_share_gets_one_empty_batch() -> None:
    assert stream(batch=2, rank=2, size=3).share(0) == [Batch(None, None, 0, last=True, index=0)]


@given(st.integers(0, 100), st.integers(1, 20))
def test_deal_is_even_and_whole(count: int, size: int) -> None:
    shares = [deal(count, rank, size) for rank in range(size)]
    assert [at for first, n in shares for at in range(first, first + n)] == list(range(count))
    assert max(n for _, n in shares) - min(n for _, n in shares) <= 1


# ------------------------------------------------------------------ windows and epochs
def test_a_window_holds_its_tokens_and_targets_are_one_later() -> None:
    (batch,) = stream(10, context=4, batch=3, micro_batch=3).share(0)
    assert batch.inputs is not None and batch.targets is not None
    assert batch.inputs.dtype == batch.targets.dtype == torch.int64
    assert batch.inputs.shape == batch.targets.shape == (3, 4)
    assert batch.inputs.is_contiguous() and batch.targets.is_contiguous()
    first = torch.tensor(rows([batch]))[:, None] * 4
    assert torch.equal(batch.inputs, first + torch.arange(4))
    assert torch.equal(batch.targets, first + torch.arange(1, 5))


@given(st.integers(0, 50), st.integers(1, 7))
def test_windows_need_one_token_more_than_the_context(length: int, context: int) -> None:
    starts = [at for at in range(0, length, context) if at + context + 1 <= length]
    assert len(Windows(np.zeros(length), context)) == len(starts)


def test_micro_batches_are_views_of_one_pair() -> None:
    batches = stream(10, batch=10, micro_batch=3).share(0)
    assert len({each.inputs.untyped_storage().data_ptr() for each in batches if each.inputs is not None}) == 1
    assert [each.tokens // 4 for each in batches] == [3, 3, 3, 1]


@given(st.integers(1, 20).flatmap(lambda w: st.tuples(st.just(w), st.integers(1, w))), st.integers(0, 5))
def test_every_window_once_an_epoch_though_batches_straddle(sizes: tuple[int, int], seed: int) -> None:
    windows, batch = sizes
    one = stream(windows, batch=batch, micro_batch=64, seed=seed)
    taken = [row for number in range(3 * windows) for row in rows(one.share(number))]
    for epoch in range(3 * batch):
        order = taken[epoch * windows : (epoch + 1) * windows]
        assert sorted(order) == list(range(windows))
        assert order == permutation(windows, seed, epoch).tolist()


def test_orders_differ_by_seed_and_epoch_and_are_frozen() -> None:
    orders = [tuple(permutation(50, seed, epoch)) for seed in (0, 1) for epoch in (0, 1)]
    assert len(set(orders)) == 4
    # Written down once: another NumPy or machine must read the same data.
    assert permutation(10, 0, 0).tolist() == [6, 1, 0, 5, 3, 8, 7, 9, 2, 4]
    assert permutation(10, 3, 2).tolist() == [8, 1, 7, 2, 0, 3, 4, 9, 5, 6]


# ------------------------------------------------------------------ rounds and state
def test_rounds_are_shares_in_order() -> None:
    one = stream(batch=3, ahead=2)
    taken = [rows(share) for share in islice(one.rounds(), 9)]
    assert taken == [rows(one.share(number)) for number in range(9)]
    one.close()


@pytest.mark.parametrize("ahead", [0, 1, 2, 5])
def test_state_counts_what_was_handed_out_not_what_is_ready(ahead: int) -> None:
    one = stream(windows=10, batch=4, ahead=ahead)
    assert one.state() == {"round": 0, "epoch": 0, "window": 0, "windows": 10}
    for number, _ in enumerate(islice(one.rounds(), 4), start=1):
        time.sleep(0.002)  # let the thread run ahead
        assert one.state() == {"round": number, "epoch": number * 4 // 10, "window": number * 4 % 10, "windows": 10}
    one.close()


@settings(max_examples=25)
@given(st.integers(0, 12), st.sampled_from([1, 2]), st.integers(1, 3), st.integers(1, 3))
def test_resuming_goes_on_with_the_same_samples_at_any_world_size(
    done: int, parts: int, before: int, after: int
) -> None:
    straight = stream(batch=4, micro_batch=64)
    expected = [rows(straight.share(number, parts)) for number in range(done + 4)]
    state: dict[str, int] = {"round": 0, "epoch": 0, "window": 0, "windows": 10}
    for rank in range(before):
        with_state = stream(batch=4, rank=rank, size=before)
        for _ in islice(with_state.rounds(parts), done):
            pass
        with_state.close()
        state = with_state.state()
    resumed: list[list[int]] = [[] for _ in range(4)]
    for rank in range(after):
        one = stream(batch=4, rank=rank, size=after)
        one.load(state)
        for at, share in enumerate(islice(one.rounds(parts), 4)):
            resumed[at] += rows(share)
        one.close()
    assert resumed == expected[done:]


def test_load_goes_back_while_rounds_is_under_way() -> None:
    one = stream()
    rounds = one.rounds()
    next(rounds)
    state = one.state()
    second = rows(next(rounds))
    one.load(state)
    assert rows(next(one.rounds())) == second
    one.close()


def test_parts_are_halves_of_the_same_round() -> None:
    one = stream(batch=4, micro_batch=8)
    halves = [rows(share) for share in islice(one.rounds(parts=2), 6)]
    assert [halves[k] + halves[k + 1] for k in (0, 2, 4)] == [rows(one.share(number)) for number in range(3)]
    assert one.state() == {"round": 3, "epoch": 1, "window": 2, "windows": 10}
    with pytest.raises(ValueError, match="no 3 equal parts"):
        one.share(0, parts=3)
    one.close()


def test_a_replay_takes_nothing_from_the_stream() -> None:
    one = stream()
    rounds = one.rounds()
    first = rows(next(rounds))
    state = one.state()
    assert rows(one.share(0)) == first
    assert rows(one.share(7)) == rows(one.share(7))
    assert one.state() == state
    assert rows(next(rounds)) == rows(one.share(1))
    one.close()


def test_a_state_of_another_text_is_refused() -> None:
    one = stream(windows=10, batch=4)
    for _ in islice(one.rounds(), 5):
        pass
    one.close()
    with pytest.raises(UserError, match="resume with the data and batch"):
        stream(windows=11, batch=4).load(one.state())
    with pytest.raises(UserError, match="resume with the data and batch"):
        stream(windows=10, batch=3).load(one.state())


# ------------------------------------------------------------------ the thread
def test_an_error_in_the_thread_reaches_the_loop_at_its_round() -> None:
    one = stream(ahead=2)
    load = one._load

    def broken(number: int, part: int) -> object:
        if number == 3:
            raise OSError("the disk is gone")
        return load(number, part)

    one._load = broken  # type: ignore[assignment, method-assign]
    rounds = one.rounds()
    assert [rows(next(rounds)) for _ in range(3)] == [rows(one.share(number)) for number in range(3)]
    with pytest.raises(OSError, match="the disk is gone"):
        next(rounds)
    assert one.state()["round"] == 3


def test_the_thread_ends_with_its_iterator() -> None:
    one = stream()
    rounds = one.rounds()
    next(rounds)
    assert any(t.name.startswith("hvdllm-stream") for t in threading.enumerate())
    rounds.close()  # type: ignore[attr-defined]


def test_the_thread_ends_when_the_iterator_is_forgotten() -> None:
    for share in stream().rounds():
        assert share
        break


def test_rounds_are_made_ahead_and_in_a_thread_of_their_own() -> None:
    one = stream(ahead=3)
    made: list[tuple[int, str]] = []
    load = one._load

    def noted(number: int, part: int) -> object:
        made.append((number, threading.current_thread().name))
        return load(number, part)

    one._load = noted  # type: ignore[assignment, method-assign]
    rounds = one.rounds()
    next(rounds)
    deadline = time.monotonic() + 5
    while len(made) < 4 and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(0.01)
    assert [number for number, _ in made] == [0, 1, 2, 3]  # the one handed out and three ready
    assert all(name.startswith("hvdllm-stream") for _, name in made)
    one.close()


def test_waited_counts_standing_still_but_not_for_the_first_round() -> None:
    one = stream(ahead=1)
    load = one._load

    def slow(number: int, part: int) -> object:
        time.sleep(0.05)
        return load(number, part)

    one._load = slow  # type: ignore[assignment, method-assign]
    rounds = one.rounds()
    next(rounds)
    assert one.waited_s == 0
    next(rounds)
    once = one.waited_s
    assert once > 0.03
    next(rounds)
    assert one.waited_s > once + 0.03
    time.sleep(0.1)  # computing for longer than reading takes
    waited = one.waited_s
    next(rounds)
    assert one.waited_s - waited < 0.03
    one.close()


# ------------------------------------------------------------------ too little text
def test_fewer_windows_than_a_batch() -> None:
    with pytest.raises(UserError, match=r"9 windows of model.context=4 tokens, fewer than the 10"):
        stream(windows=9, batch=10)
    stream(windows=10, batch=10)


# ------------------------------------------------------------------ validation
def held_out(length: int, eval_tokens: int, size: int = 1, micro_batch: int = 3) -> list[list[int]]:
    return [
        [
            int(row[0]) // 4
            for inputs, targets in validation(
                Windows(np.arange(length, dtype=np.uint16), 4, validation=True),
                units=eval_tokens,
                micro_batch=micro_batch,
                rank=rank,
                size=size,
                device=CPU,
            )
            for row in inputs
            if torch.equal(targets, inputs + 1) and len(inputs) <= micro_batch
        ]
        for rank in range(size)
    ]


def test_validation_is_a_fixed_prefix_dealt_like_a_batch() -> None:
    assert held_out(41, 0) == [list(range(10))]
    assert held_out(40, 0) == [list(range(9))]
    assert held_out(41, 27) == [list(range(6))]
    assert held_out(41, 1) == [[0]]
    assert held_out(41, 1000) == [list(range(10))]
    assert held_out(41, 0, size=3) == [[0, 1, 2, 3], [4, 5, 6], [7, 8, 9]]
    assert held_out(9, 0, size=3) == [[0], [1], []]


def test_validation_text_of_less_than_a_window_is_refused_at_the_call() -> None:
    with pytest.raises(UserError, match=r"4 tokens, less than one window of model.context=4.*eval_every=0"):
        validation(Windows(np.zeros(4), 4, validation=True), units=0, micro_batch=1, rank=0, size=1, device=CPU)


# ------------------------------------------------------------------ lanes
def walk(one: Stream, index: int, of: int, count: int, most: int = 100) -> list[int]:
    return rows(list(islice(one.lane(index, of, most), count)))


def test_lanes_deal_each_epoch_among_walkers_of_any_speed() -> None:
    order = [int(w) for epoch in (0, 1) for w in permutation(10, 1, epoch)]
    for index, count in ((0, 3), (1, 1), (2, 2)):
        one = stream(rank=index, size=3)
        assert walk(one, index, 3, count) == order[index::3][: 2 * count]
        assert one.lanes() == {"of": 3, "at": {str(index): 2 * count}}, "what was read ahead does not count"
        one.close()


def test_a_micro_batch_of_a_lane_is_no_larger_than_asked() -> None:
    for most, size in ((4, 1), (7, 1), (8, 2), (3, 1), (100, 2)):
        one = stream()
        assert len(walk(one, 0, 1, 1, most)) == size
        one.close()


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5])
def test_walkers_of_any_number_go_on_with_the_lanes(size: int) -> None:
    """Fewer take turns, the one least far on first; more begin with what the furthest has left behind. No window of the
    epoch is read twice or skipped."""
    saved, walked = [], []
    for index, count in ((0, 3), (1, 1), (2, 2)):
        one = stream(60, rank=index, size=3)
        walked += walk(one, index, 3, count)
        saved.append((one.state(), one.lanes()))
        one.close()
    again = []
    for rank in range(size):
        one = stream(60, rank=rank, size=size)
        one.load(saved[0][0], [lanes for _, lanes in saved])
        again += walk(one, rank, size, 2)
        one.close()
    assert len(again) == 4 * size and len(set(again)) == 4 * size
    assert not set(again) & set(walked)


@pytest.mark.parametrize("sizes", [(3, 5), (3, 4, 7), (2, 5, 3), (3, 2, 4), (4, 6, 6)])
def test_an_epoch_of_lanes_is_whole_whoever_walks_it(sizes: tuple[int, ...]) -> None:
    """Walkers of unequal speed, resumed by others; the last ones walk until all 140 windows of the epoch have been
    read, each once."""
    saved: list[Any] = []
    places: list[int] = []
    for number, size in enumerate(sizes):
        streams = [stream(140, batch=7, rank=rank, size=size) for rank in range(size)]
        for one in streams:
            if saved:
                one.load(saved[0][0], [lanes for _, lanes in saved])
        lanes = [one.lane(rank, size, 1) for rank, one in enumerate(streams)]
        last = number == len(sizes) - 1
        for rank in itertools.cycle(range(size)) if last else [r for r in range(size) for _ in range(3 + 5 * r % 7)]:
            batch = next(lanes[rank])
            places.append(streams[rank]._lanes._place(batch.index, batch.round))
            if last and set(range(140)) <= set(places):
                break
        saved = [(one.state(), one.lanes()) for one in streams]
        for one in streams:
            one.close()
    assert len(set(places)) == len(places)


# ------------------------------------------------------------------ groups
def group(
    index: int, of: int, count: int, rank: int = 0, size: int = 1, saved: list[Any] | None = None, batch: int = 7
) -> tuple[list[list[int]], Any]:
    """The windows of so many rounds of a group, as one of its ranks has them; and where its stream then stands."""
    one = stream(60, batch=batch)
    if saved is not None:
        one.load(saved[0][0], [lanes for _, lanes in saved])
    walked = []
    part = one.group(index, of, rank, size)
    for share in islice(part.rounds(), count):
        assert rows(part.share(share[0].round)) == rows(share), "a replay is of the same windows"
        assert [each.last for each in share] == [False] * (len(share) - 1) + [True]
        walked.append(rows(share))
    one.close()
    return walked, (one.state(), one.lanes())


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_a_group_deals_the_rounds_of_its_lane_to_its_ranks(size: int) -> None:
    """Two groups take 4 and 3 of 7 windows a round. Seen to catch a rank that takes the whole, shares that overlap, and
    a group that walks the order of another."""
    order = [int(w) for epoch in (0, 1) for w in permutation(60, 1, epoch)]
    for index, each in ((0, 4), (1, 3)):
        ranks = [group(index, 2, 12, rank, size)[0] for rank in range(size)]
        joined = [[window for rank in ranks for window in rank[t]] for t in range(12)]
        assert [window for share in joined for window in share] == order[index::2][: 12 * each]
        assert all(len(share) == each for share in joined)
        assert max(len(rank[0]) for rank in ranks) - min(len(rank[0]) for rank in ranks) <= 1


@pytest.mark.parametrize("size", [1, 2])
def test_groups_go_on_where_their_lanes_stand(size: int) -> None:
    """Each at a speed of its own. Seen to catch lanes that begin anew, what was read ahead counted as taken."""
    saved, expected = [], []
    for index, count in ((0, 3), (1, 1), (2, 4)):
        for rank in range(size):
            walked, place = group(index, 3, count + 3, rank, size)
            expected.append(walked[count:])
            saved.append(group(index, 3, count, rank, size)[1])
            assert place[1]["of"] == 3 and list(place[1]["at"]) == [str(index)]
    again = [group(index, 3, 3, rank, size, saved)[0] for index in range(3) for rank in range(size)]
    assert again == expected


@pytest.mark.parametrize("of", [1, 2, 4, 6])
def test_another_number_of_groups_goes_on_with_the_lanes(of: int) -> None:
    """Fewer take turns, the lane least far on first; more begin with what the furthest has left behind. Nothing is read
    twice."""
    taken, saved = [], []
    for index, count in ((0, 3), (1, 1), (2, 2)):
        walked, place = group(index, 3, count)
        taken += [window for share in walked for window in share]
        saved.append(place)
    again = [group(index, of, 2, saved=saved)[0] for index in range(of)]
    together = [window for walked in again for share in walked for window in share]
    assert len(set(together)) == len(together) == 14 and not set(together) & set(taken)
    if of < 3:
        order = permutation(60, 1, 0).tolist()
        first = (
            order[1::3] if of == 1 else order[0::3]
        )  # of three lanes the second is least far on; of 0 and 2 the third
        assert again[0][0] == (first[2:9] if of == 1 else order[2::3][4:8])
    else:
        # Of lanes of three, two and two windows a round the first has come to place 24: 9 of its own.
        order, furthest = permutation(60, 1, 0).tolist(), 0 + 3 * 8 + 1
        left = [place for place in range(furthest) if order[place] not in taken]
        dealt = [*left, *range(furthest, 60)]
        for index, walked in enumerate(again):
            own = dealt[index : len(left) : of]
            assert walked[0] == [order[place] for place in own[: len(walked[0])]]
