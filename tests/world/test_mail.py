"""Letters within a process and between logical ranks; between real ones: tests/test_mail_ranks.py."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from typing import Any

import pytest
import torch

from hvdllm.errors import PeerError, UserError
from hvdllm.world import virtual
from hvdllm.world.mail import Boxes, Threads
from hvdllm.world.single import SingleWorld


def test_what_was_posted_may_be_written_to_again() -> None:
    world = SingleWorld()
    mail, x, head = world.mail(), torch.ones(3), {"of": [1, 2]}
    mail.post(0, "a", head, x)
    x.zero_()
    head["of"].append(3)
    mail.post(0, "b", {}, None)
    assert mail.take("b").body is None
    letter = mail.take("a")
    assert letter.sender == 0 and letter.head == {"of": [1, 2]} and letter.body is not None
    assert letter.body.tolist() == [1, 1, 1]


def test_what_a_thread_raises_ends_who_waits_with_the_same_words() -> None:
    world = SingleWorld()
    mail = world.mail()

    def work() -> None:
        raise ValueError("an apple fell on the fan")

    world.spawn(work, "fruit")
    with pytest.raises(ValueError, match="an apple fell on the fan"):
        mail.take("never")


def test_a_thread_waits_without_limit_the_loop_does_not() -> None:
    threads = Threads(0.1)
    boxes, done = Boxes(threads), threading.Event()

    def work() -> None:
        boxes.take("late")
        done.set()

    threads.spawn(work, "patient")
    begin = time.monotonic()
    with pytest.raises(PeerError, match="for a letter in `never`"):
        boxes.take("never")
    assert time.monotonic() - begin < 2
    assert not done.is_set()
    from hvdllm.world.base import Letter

    boxes.put("late", Letter(0, {}))
    assert done.wait(5)
    threads.check()


def test_meanwhile_is_called_while_nothing_comes() -> None:
    mail = SingleWorld().mail()
    mail_calls = []

    def meanwhile() -> None:
        mail_calls.append(1)
        if len(mail_calls) == 3:
            mail.post(0, "a", {"n": 3})

    assert mail.take("a", meanwhile).head == {"n": 3}


def test_logical_ranks_write_to_each_other_and_order_is_kept() -> None:
    def body(world: Any) -> list[Any]:
        mail = world.mail()
        for k in range(3):
            for to in range(world.size):
                mail.post(to, "x", {"k": k}, torch.full((2,), float(10 * world.rank + k)))
        got = [mail.take("x") for _ in range(3 * world.size)]
        mail.close()
        return [(letter.sender, letter.head["k"], letter.body.tolist()) for letter in got]

    first, second = virtual.run(3, body), virtual.run(3, body)
    assert first == second
    for got in first:
        for sender in range(3):
            assert [(k, b) for s, k, b in got if s == sender] == [(k, [10.0 * sender + k] * 2) for k in range(3)]


def test_a_thread_of_a_logical_rank_answers_while_its_loop_waits() -> None:
    def body(world: Any) -> int:
        mail = world.mail()

        def serve() -> None:
            while True:
                letter = mail.take("ask")
                if letter.head.get("end"):
                    return
                mail.post(letter.sender, "answer", {"n": letter.head["n"] + world.rank})

        world.spawn(serve, "server")
        total = 0
        for k in range(4):
            mail.post((world.rank + 1) % world.size, "ask", {"n": k})
            total += mail.take("answer").head["n"]
        mail.close()
        mail.post(world.rank, "ask", {"end": True})
        return total

    assert virtual.run(2, body) == [6 + 4, 6]


def test_a_logical_ranks_thread_ends_with_the_loops_and_its_error_ends_them() -> None:
    def left(world: Any) -> None:
        world.spawn(lambda: world.mail().take("never"), "idle")

    virtual.run(2, left)

    def fails(world: Any) -> None:
        def work() -> None:
            raise ValueError("an apple fell on the fan")

        if world.rank == 1:
            world.spawn(work, "fruit")
        world.mail().take("never")

    with pytest.raises(ValueError, match="an apple fell on the fan"):
        virtual.run(2, fails)


def test_logical_ranks_that_all_wait_for_letters_are_an_error() -> None:
    with pytest.raises(RuntimeError, match="rank 1 waits for a letter in `never`"):
        virtual.run(2, lambda world: world.mail().take("never"))


def test_whoever_waits_hears_what_its_rank_is_asked_for() -> None:
    def body(world: Any) -> Any:
        mail = world.mail()
        if world.rank == 0:
            world.texts("", "begin")
            return mail.take("ask").head
        world.asks.save = False

        def pass_on() -> None:
            if world.asks.take().save:
                mail.post(0, "ask", {"save": True})
                mail.post(1, "done", {})

        def signal() -> None:
            world.asks.save = True

        world.spawn(signal, "signal")
        world.texts("", "begin")
        return mail.take("done", pass_on).head

    assert virtual.run(2, body)[0] == {"save": True}


def test_ranks_without_letters_say_so() -> None:
    from hvdllm.world.ranks import Ranks

    class Bare(Ranks):
        def gather(self, x: Any, name: str) -> Any: ...

    with pytest.raises(UserError, match="know no letters"):
        Bare((0, 2, 0, 2), 1.0).mail()


def test_a_library_that_waits_for_ever_is_given_up_with_a_sentence() -> None:
    """As MPI does at its start, where a rank stands still. Seen to catch: no end, and one where all went well."""
    code = "from hvdllm.world.mail import at_most; import time\nwith at_most({}, 'the others'): time.sleep({})"
    done = subprocess.run([sys.executable, "-c", code.format(0.1, 600)], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("hvdllm: waited 0 s (world.timeout_s) for the others, so ")
    assert done.stderr.count("\n") == 1
    assert subprocess.run([sys.executable, "-c", code.format(600, 0)]).returncode == 0


def test_gloo_gives_up_after_world_timeout_s_and_not_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of its own it does after 30 s, with a C++ error of the rank that is alive."""
    hvd = pytest.importorskip("hvdllm.world.hvd")
    for name in ("GLOO_TIMEOUT_SECONDS", "FUSION_THRESHOLD", "CYCLE_TIME"):
        monkeypatch.setenv(f"HOROVOD_{name}", "30")
    hvd.tell_horovod(1800.0, groups=False, fuse=False)
    assert int(os.environ["HOROVOD_GLOO_TIMEOUT_SECONDS"]) > 1800
    hvd.tell_horovod(5.5, groups=False, fuse=False)
    assert 6 < int(os.environ["HOROVOD_GLOO_TIMEOUT_SECONDS"]) < 100
