"""What `hvdllm bench exchange` would run, from its words: cases, settings, commands. Nothing is started."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import pytest

from hvdllm.bench import exchange
from hvdllm.bench.exchange import ALONE, IDLE, SLOWED, Asked, Case
from hvdllm.cli.bench import ask
from hvdllm.config import compose, pace
from hvdllm.errors import UserError
from hvdllm.launch import lab
from hvdllm.launch.horovodrun import starter
from hvdllm.launch.lab import Lab
from hvdllm.world.detect import Place

ASKED = Asked("200mbit", 3, 2, ("allreduce",), (), (), (), 5, 2, 1, 60.0)
SPEC = Path("/x/spec.json")


def asked(**more: Any) -> Asked:
    return dataclasses.replace(ASKED, **more)


def test_exchanges_times_wires_times_worlds() -> None:
    found = exchange.cases(
        asked(exchanges=("allreduce", "delayed"), wires=("fp32", "int8"), worlds=("horovod", "torch"))
    )
    assert [case.label for case in found[:2]] == [ALONE, IDLE] and len(found) == 2 + 8
    last = found[-1]
    assert last.label == "delayed int8 torch" and last.blocking == "allreduce int8 torch" == found[5].label
    assert set(last.words) == {"exchange=delayed", "wire=int8", "world=torch", "exchange.warmup_tokens=0"}
    assert exchange.cases(ASKED)[2] == Case("allreduce", "together", ("exchange=allreduce",), "allreduce")


def test_settings_of_one_exchange() -> None:
    (*_, case) = exchange.cases(asked(exchanges=("acco+exchange.timed=true+optim.lr=1e+3",), worlds=("horovod",)))
    assert case.words == ("exchange=acco", "world=horovod", "exchange.timed=true", "optim.lr=1e+3")
    (*_, case) = exchange.cases(asked(exchanges=("delayed+exchange.warmup_tokens=9+world=torch",), worlds=("horovod",)))
    assert set(case.words) == {"exchange=delayed", "world=torch", "exchange.warmup_tokens=9"}, "the user's word counts"


@pytest.mark.parametrize("text", ["", "a b", "acco+", "acco+timed", "+x=1"])
def test_what_is_no_exchange(text: str) -> None:
    with pytest.raises(UserError, match="names with commas between"):
        exchange.split_item(text)


def test_the_same_twice() -> None:
    with pytest.raises(UserError, match="named twice"):
        exchange.cases(asked(exchanges=("allreduce", "allreduce")))


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("exchange=sharded", "use --exchanges"),
        ("log_every=5", "sets it itself"),
        ("budget_tokens=9", "use --steps"),
        ("world.slow=1:4", "use --slow"),
    ],
)
def test_settings_that_are_not_the_users(word: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        exchange.base_words(asked(settings=(word,)), 2)


def test_settings_of_all() -> None:
    base = exchange.base_words(asked(settings=("model.width=64", "exchange.bucket_mb=1")), 7)
    assert "device.threads=2" in base and "model.width=64" in base and "model.layers=3" in base
    assert {"log_every=1", "save_every=0", "audit_every=0"} <= set(base)
    other = exchange.base_words(asked(settings=("model=gpt2", "device.threads=5")), 7)
    assert "device.threads=5" in other and not any(word.startswith("model.") for word in other)
    compose.compose(base)


def test_every_case_has_the_same_tokens_and_alone_a_rank_its_share() -> None:
    """22 sequences on 3 ranks are 8, 7 and 7: alone the first."""
    base = exchange.base_words(ASKED, 3)
    alone, _, together = (exchange.words_of(case, base, ASKED, 22 * 32, 32) for case in exchange.cases(ASKED))
    assert {"batch_tokens=704", f"budget_tokens={704 * 8}", "exchange=allreduce"} <= set(together)
    timed = Case("t", "together", ("exchange=acco", "exchange.timed=true"))
    assert f"budget_tokens={704 * 8 * 3}" in exchange.words_of(timed, base, ASKED, 704, 32)
    assert {"batch_tokens=256", f"budget_tokens={256 * 8}"} <= set(alone)
    rare = compose.merged(base, ["exchange=diloco", "exchange.local_steps=100", "exchange.pulses=1"])
    assert [exchange.batches_a_commit(words, False) for words in (base, rare, ["exchange=aco"])] == [1, 100, 1]
    long = exchange.words_of(Case("a", "alone"), base, ASKED, 22 * 32, 32, 100)
    assert f"budget_tokens={256 * 100}" in long, "as many updates as the longest commit of what it is compared with"


def test_slowed_ranks() -> None:
    """All exchanges train with them, and alone each rank is measured as it is and as slow as it is asked to be."""
    uneven = asked(exchanges=("local_sgd", "acco+exchange.timed=true"), slow="1:4,2:2")
    alone, slowed, idle, local, timed = exchange.cases(uneven)
    assert [alone.label, slowed.label, idle.label] == [ALONE, SLOWED, IDLE] and (alone.slowed, slowed.slowed) == (
        False,
        True,
    )
    assert "exchange.by_speed=true" in local.words
    base = exchange.base_words(uneven, 3)
    words = [exchange.words_of(case, base, uneven, 704, 32) for case in (alone, slowed, idle, local, timed)]
    assert ["world.slow='1:4,2:2'" in each for each in words] == [False, False, False, True, True]
    assert pace.slowed(compose.compose(words[3]).world.slow, 3) == {1: 4.0, 2: 2.0}
    assert f"budget_tokens={704 * 8 * 16}" in words[3], "a commit is a round of 16 updates"
    assert f"budget_tokens={704 * 8 * 6}" in words[4]
    few = exchange.cases(asked(exchanges=("local_sgd+exchange.local_steps=4",), slow="1:4"))[-1]
    assert f"budget_tokens={704 * 8 * 4}" in exchange.words_of(few, base, uneven, 704, 32)
    assert not any("by_speed" in word for word in exchange.cases(asked(exchanges=("local_sgd",)))[-1].words)


def test_refused_in_hvdllms_own_words() -> None:
    base = exchange.base_words(ASKED, 2)
    assert exchange.refusal([*base, "exchange=allreduce"], Place("horovodrun", 0, 2)) is None
    assert "there is no exchange=aco: choose one of" in str(exchange.refusal([*base, "exchange=aco"], Place()))
    assert "fewer than the 99 ranks" in str(exchange.refusal(base, Place("horovodrun", 0, 99)))


def test_nothing_is_measured_where_every_case_is_refused() -> None:
    def never(text: str) -> None:
        pytest.fail(f"something was done: {text}")

    with pytest.raises(UserError, match="there is no exchange=aco: choose one of"):
        exchange.measure(asked(exchanges=("aco",)), never, keep=False)


@pytest.mark.parametrize(("ranks", "hosts", "each"), [(2, 2, [1, 1]), (5, 3, [2, 2, 1]), (8, 8, [1] * 8), (3, 1, [3])])
def test_ranks_on_hosts(ranks: int, hosts: int, each: list[int]) -> None:
    assert exchange.spread(ranks, hosts) == each


def test_commands_on_hosts() -> None:
    network = Lab(2, "200mbit")
    first, second = (host.name for host in network.hosts)
    alone, _, together = (exchange.commands(case, SPEC, ASKED, network) for case in exchange.cases(ASKED))
    assert [(command[3], command[-2:]) for command in alone] == [
        (first, [str(SPEC), "0"]), (first, [str(SPEC), "1"]), (second, [str(SPEC), "2"]),
    ]  # fmt: skip
    assert not any("horovodrun" in word for command in alone for word in command)
    (command,) = together
    assert command[:9] == ["ip", "netns", "exec", first, *starter("gloo"), "--gloo", "-np"]
    assert command[command.index("-H") + 1] == "10.77.0.1:2,10.77.0.2:1" and command[-3:] == [
        "bench",
        "rank",
        str(SPEC),
    ]
    assert command[command.index("--network-interfaces") + 1] == "eth0" and "--disable-cache" in command


def test_commands_on_the_loopback() -> None:
    alone, idle, together = (exchange.commands(case, SPEC, ASKED, None) for case in exchange.cases(ASKED))
    assert len(alone) == 3 and idle == together
    assert together[0][:4] == [*starter("gloo"), "--gloo"] and "localhost:3" in together[0]


def test_letters_are_measured_over_mpi() -> None:
    """Under Gloo a parameter server would be refused, whatever was asked."""
    (*_, case) = exchange.cases(asked(exchanges=("parameter_server",)))
    ((*command,),) = exchange.commands(case, SPEC, ASKED, None)
    assert command[:2] == [*starter("mpi"), "--mpi"] and "OMPI_MCA_mpi_yield_when_idle" in exchange.environment(
        case, None
    )
    assert exchange.refusal(["exchange=parameter_server"], exchange.place_of(case, ASKED)) is None


@pytest.mark.parametrize(
    ("name", "batches"),
    [
        ("allreduce", 1), ("acco+exchange.timed=true", 3), ("diloco+exchange.local_steps=7", 7), ("fedavg", 20),
        ("streaming_diloco+exchange.local_steps=40", 10), ("aco", 1),
    ],
)  # fmt: skip
def test_a_commit_has_as_many_batches_as_its_exchange_makes_of_it(name: str, batches: int) -> None:
    ask = asked(exchanges=(name,))
    (*_, case) = exchange.cases(ask)
    words = exchange.words_of(case, [], ask, 704, 32)
    assert words[-1] == f"budget_tokens={ask.commits * 704 * batches}"


def test_the_stand_in_comes_first_on_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOROVOD_RANK", "3")
    network = Lab(2, "200mbit")
    network.folder = tmp_path
    env = exchange.environment(Case("x", "together"), network)
    assert env["PATH"].split(":")[0] == str(tmp_path) and env["GLOO_SOCKET_IFNAME"] == "eth0"
    assert "HOROVOD_RANK" not in env, "a rank would take itself for one of another job"


# ------------------------------------------------------------------ the command line
def given(**more: Any) -> argparse.Namespace:
    words: dict[str, Any] = {
        "link": "200mbit", "ranks": 2, "hosts": None, "exchanges": "allreduce", "wires": "", "worlds": "",
        "settings": [], "steps": 5, "warmup": 2, "repetitions": 1, "limit": 60.0,
        "slow": None,
    }  # fmt: skip
    return argparse.Namespace(**words | more)


def test_what_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lab, "missing", lambda: None)
    found = ask(given(ranks=12, exchanges="allreduce,delayed+optim.lr=1", wires="fp32,int8", worlds="torch"))
    assert (found.link, found.hosts, found.commits) == ("200mbit", 8, 8) and found.interface == "eth0"
    assert (found.exchanges, found.wires) == (("allreduce", "delayed+optim.lr=1"), ("fp32", "int8"))
    assert found.worlds == ("torch",) and ask(given()).wires == () and ask(given(ranks=3)).hosts == 3
    none = ask(given(link="none"))
    assert none.link is None and none.interface is None
    monkeypatch.setattr(lab, "missing", lambda: "network namespaces need root")
    assert ask(given()).link is None, "over the loopback instead"
    assert "horovod" in ask(given(exchanges=None)).exchanges
    uneven = ask(given(exchanges=None, slow="1:4"))
    assert uneven.slow == "1:4" and {"allreduce", "acco+exchange.timed=true", "local_sgd"} <= set(uneven.exchanges)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"ranks": 1}, "--ranks 1 is too small"), ({"steps": 0}, "--steps 0"), ({"warmup": 0}, "--warmup 0"),
        ({"repetitions": 0}, "--repetitions 0"), ({"ranks": 2, "hosts": 3}, "no more than there are ranks"),
        ({"ranks": 9, "hosts": 9}, "give 2 to 8"), ({"ranks": 2, "hosts": 1}, "give 2 to 8"),
        ({"link": "quick"}, "give a rate"), ({"worlds": "virtual"}, "through horovod or torch"),
        ({"exchanges": ","}, "name one"), ({"slow": "2:4"}, "no rank 2 among 2"), ({"slow": "4"}, "rank:factor"),
    ],
)  # fmt: skip
def test_what_cannot_be_asked(more: dict[str, Any], says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lab, "missing", lambda: None)
    with pytest.raises(UserError, match=says):
        ask(given(**more))
