"""Every exchange with every wire and optimizer: it works, on ranks with different data, or is refused in a sentence.

What works keeps its replicas bit-equal (the weights to keep, where ranks train on their own), goes on bit-equal from a
checkpoint in mid-flight (at 2 and 3 ranks, several buckets), is not changed by acts, and stays near the exact sum.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable
from functools import cache
from typing import Any

import pytest
import torch
from rig import NOMINAL, Rig, train
from torch import nn
from variants import ROUNDS, SHORTEST, facts

from hvdllm import registry
from hvdllm.config import compose
from hvdllm.config.check import check
from hvdllm.errors import UserError
from hvdllm.exchange import parts as exchanges
from hvdllm.exchange.wire import parts as wires
from hvdllm.optim.parts import SGD, NAdam
from hvdllm.world.detect import Place

STEPS, STOP = 6, 3
SMALL = {  # so that each is at work from the first update, on matrices of a few hundred elements
    "int8": {"block": 16}, "topk": {"warmup_tokens": 0, "density": 0.3}, "sign": {"warmup_tokens": 2 * NOMINAL},
    "powersgd": {"warmup_tokens": NOMINAL, "rank": 2, "min_compression": 1.5},
}  # fmt: skip
TUNED = {"nadam": NAdam(lr=0.003), "sgd": SGD(lr=0.05, momentum=0.5)}
OPTIMS = {name: TUNED.get(name) or kind(lr=0.01) for name, kind in registry.kinds("optim").items()}


def wide() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 24), nn.Tanh(), nn.Linear(24, 20), nn.Tanh(), nn.Linear(20, 3)).double()


def wire_of(name: str) -> Any:
    kind = registry.kinds("wire")[name]
    names = {field.name for field in dataclasses.fields(kind)}
    small = {key: value for key, value in {"chunk_mb": 0.001, "warmup_tokens": NOMINAL}.items() if key in names}
    return kind(**{**small, **SMALL.get(name, {})})


def optim_of(name: str, wire: Any) -> Any:
    frozen = registry.of("wire", wire).facts.signs and registry.parts("optim")[name].facts.freezes
    return dataclasses.replace(OPTIMS[name], freeze_tokens=wire.warmup_tokens) if frozen else OPTIMS[name]


BASE = compose.compose([])


def carries(exchange: str) -> str:
    """What it asks its wire to carry."""
    found: str = registry.parts("exchange")[exchange].facts.carries
    return found


def refused(exchange: str, wire: str, optim: str) -> str | None:
    """What `hvdllm train` says to the pair, started as it should be."""
    launcher = {registry.TORCH: "torchrun", registry.LETTERS: "mpirun"}.get(carries(exchange), "horovodrun")
    exchange_, wire_, optim_ = (
        registry.kinds(group)[name]() for group, name in (("exchange", exchange), ("wire", wire), ("optim", optim))
    )
    fresh = registry.parts("exchange")[exchange].facts.fresh_optimizer  # so that it never has moments to keep
    if registry.parts("wire")[wire].facts.signs and registry.parts("optim")[optim].facts.freezes and not fresh:
        optim_.freeze_tokens = wire_.warmup_tokens
    try:
        check(dataclasses.replace(BASE, exchange=exchange_, wire=wire_, optim=optim_), Place(launcher, 0, 2, 0, 2))
    except UserError as error:
        return str(error)
    return None


PAIRS = list(itertools.product(registry.kinds("exchange"), registry.kinds("wire"), OPTIMS))


WHY = {pair: refused(*pair) for pair in PAIRS}
HERE = [pair for pair, why in WHY.items() if why is None and carries(pair[0]) in (registry.SUMS, registry.PIECES)]
LOCAL = {name: settings for name, settings in SHORTEST.items() if facts(settings).local}  # no optimizer sees the sums


def test_most_pairs_work_and_the_others_say_why() -> None:
    said = {pair: text for pair, text in WHY.items() if text}
    assert 0 < len(said) < len(PAIRS) / 2
    for pair, text in said.items():
        assert "\n" not in text and len(text) < 260
        assert f"exchange={pair[0]} with wire={pair[1]}: " in text or (
            pair[1:] == ("sign", "nadam") and "frozen" in text
        )


def but_alike(wires: Iterable[str]) -> list[Any]:
    """Casts are like each other, and topk is a code like int8 and sign."""
    return [pytest.param(wire, marks=pytest.mark.thorough) if wire in ("bf16", "topk") else wire for wire in wires]


# Each exchange by itself, and each wire, is held to its contract at both sizes.
AT_THREE = pytest.mark.parametrize("size", [3, pytest.param(2, marks=pytest.mark.thorough)])
IDENTICAL = [pair for pair in HERE if pair[0] not in LOCAL]


@cache
def exact_run(exchange: str, optim: str, wire: str, size: int) -> Rig:
    """With exact sums; and with the optimizer that this wire needs."""
    return train(SHORTEST[exchange], size, STEPS, optim=optim_of(optim, wire_of(wire)), model=wide)[0]


@pytest.mark.parametrize(
    ("exchange", "wire", "optim"),
    [pytest.param(*p, id="-".join(p), marks=() if p[2] == "adamw" else pytest.mark.thorough) for p in IDENTICAL],
)
@AT_THREE
def test_replicas_agree_and_a_run_goes_on_from_mid_flight(exchange: str, wire: str, optim: str, size: int) -> None:
    settings = SHORTEST[exchange]
    how = {"optim": optim_of(optim, wire_of(wire)), "wire": wire_of(wire), "model": wide}
    exact = exact_run(exchange, optim, "sign" if wire == "sign" else "fp32", size)
    whole = train(settings, size, STEPS, **how)
    for rig in whole[1:]:
        assert all(torch.equal(a, b) for a, b in zip(rig.weights, whole[0].weights, strict=True)), "replicas differ"
    begun = train(settings, size, STEPS, **how, stop_at=STOP, acts=True)
    again = train(settings, size, STEPS, **how, states=[rig.state for rig in begun])
    for a, b, c in zip(whole, begun, again, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a.weights, [*b.weights, *c.weights], strict=True))
        assert torch.equal(a.final, c.final)
    far = (whole[0].weights[-1] - exact.weights[-1]).norm() / (exact.weights[-1] - exact.weights[0]).norm()
    assert far < {"fp32": 1e-9, "fp16": 0.05, "bf16": 0.15, "int8": 0.3}.get(wire, 1.5)
    assert (far > 1e-9) == (wire != "fp32"), "the wire was at work"


def test_local_steps_are_all_here() -> None:
    assert {(pair[0], pair[1]) for pair in HERE if pair[0] in LOCAL} == set(
        itertools.product(LOCAL, registry.kinds("wire"))
    )


@pytest.mark.parametrize("wire", but_alike(registry.kinds("wire")))
@pytest.mark.parametrize("exchange", LOCAL)
@AT_THREE
def test_ranks_on_their_own_keep_the_same_and_go_on_from_mid_flight(exchange: str, wire: str, size: int) -> None:
    how = {"optim": OPTIMS["adamw"], "model": wide}
    exact = exact_run(exchange, "adamw", "fp32", size)
    whole = train(LOCAL[exchange], size, STEPS, wire=wire_of(wire), **how)
    begun = train(LOCAL[exchange], size, STEPS, wire=wire_of(wire), stop_at=STOP, acts=True, settle=False, **how)
    states = [rig.state for rig in begun]
    again = train(LOCAL[exchange], size, STEPS, wire=wire_of(wire), states=states, acts=True, **how)
    for a, b, c in zip(whole, begun, again, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a.weights, [*b.weights, *c.weights], strict=True))
        assert torch.equal(a.final, c.final) and torch.equal(a.final, whole[0].final)
        kept = zip([*b.kept, *c.kept], [*begun[0].kept, *again[0].kept], strict=True)
        assert all(torch.equal(x, y) for x, y in kept), "the weights to keep differ"
    far = (whole[0].final - exact.final).norm() / (exact.final - exact.weights[0]).norm()
    assert far < {"fp32": 1e-9, "fp16": 0.05, "bf16": 0.15, "int8": 0.3}.get(wire, 1.5)
    assert (far > 1e-9) == (wire != "fp32"), "the wire was at work"


@pytest.mark.parametrize("wire", but_alike(["fp16", "bf16", "int8", "topk", "sign"]))
@pytest.mark.parametrize("exchange", ROUNDS)
def test_hierarchical_over_two_hosts(exchange: str, wire: str) -> None:
    settings = registry.kinds("exchange")[exchange]()
    how = {"optim": OPTIMS["sgd"], "model": wide, "hosts": 2}
    over = wire_of(wire)
    over.hierarchical = True
    whole = train(settings, 4, STEPS, wire=over, **how)
    assert all(torch.equal(rig.weights[-1], whole[0].weights[-1]) for rig in whole)
    states = [rig.state for rig in train(settings, 4, STEPS, wire=over, stop_at=STOP, **how)]
    again = train(settings, 4, STEPS, wire=over, states=states, **how)
    assert torch.equal(again[3].final, whole[3].final)


@pytest.mark.parametrize("exchange", ROUNDS)
def test_hierarchical_in_full_precision_is_exact(exchange: str) -> None:
    settings = registry.kinds("exchange")[exchange]()
    flat = train(settings, 4, STEPS, optim=OPTIMS["adamw"], model=wide)
    over = train(settings, 4, STEPS, optim=OPTIMS["adamw"], model=wide, hosts=2, wire=wires.Fp32(hierarchical=True))
    torch.testing.assert_close(over[3].weights[-1], flat[0].weights[-1], rtol=0, atol=1e-10)


def adasum(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    d = a @ b
    return (1 - d / (2 * (a @ a))) * a + (1 - d / (2 * (b @ b))) * b


@pytest.mark.parametrize("size", [1, 2, 4])
def test_adasum_takes_token_means_tensor_by_tensor_and_divides_by_nothing(size: int) -> None:
    from rig import MICRO, Plain, deal, examples, loss, net

    optim = SGD(lr=0.05, momentum=0.9, clip=0.4)
    plain = Plain(optim)
    for t in range(4):
        model = net()
        cuts = [p.numel() for p in model.parameters()]
        means = []
        for rank in range(size):
            with torch.no_grad():
                for p, piece in zip(model.parameters(), plain.x.split(cuts), strict=True):
                    p.copy_(piece.view(p.shape))
            model.zero_grad()
            x, y = (each[deal(t, 1, rank, size)] for each in examples(t, 1))
            loss(model, x, y).backward()
            means.append([p.grad.reshape(-1) / len(x) for p in model.parameters()])  # type: ignore[union-attr]
        while len(means) > 1:
            means = [
                [adasum(a, b) for a, b in zip(means[k], means[k + 1], strict=True)] for k in range(0, len(means), 2)
            ]
        expected = plain.step(torch.cat(means[0]), 1)
    assert MICRO < NOMINAL // 4
    rigs = train(exchanges.AllReduce(reduction="adasum"), size, 4, optim=optim)
    torch.testing.assert_close(rigs[-1].weights[-1], expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize(
    ("words", "place", "says"),
    [
        (["exchange=ddp"], Place(), "exchange=ddp runs on world=torch alone: torchrun"),
        (["exchange=ddp", "world=horovod"], Place("horovodrun", 0, 2, 0, 2), "runs on world=torch alone"),
        (["exchange=horovod", "world=torch"], Place("torchrun", 0, 2, 0, 2), "runs on world=horovod alone"),
        (["world=horovod"], Place("torchrun", 0, 2, 0, 2), "torchrun starts ranks that Horovod cannot join"),
        (["world=torch"], Place(), "world=torch needs ranks that a launcher started: torchrun"),
        (["world=virtual"], Place("horovodrun", 0, 2, 0, 2), "world=virtual under a launcher"),
        (["world=virtual", "world.hosts=3"], Place(), "world.hosts=3 is no divisor of world.size=4"),
        (["exchange.reduction=adasum"], Place("horovodrun", 0, 3, 0, 3), "3 ranks are no power of two"),
        (["exchange=ddp", "wire=fp16", "wire.chunk_mb=2"], Place("torchrun", 0, 2, 0, 2), "reads none of them"),
        (["wire=topk", "wire.density=0"], Place(), "wire.density=0"),
        (["wire=topk", "wire.density=1.5"], Place(), "wire.density=1.5 must lie between 0 and 1"),
        (["wire=topk", "wire.momentum=1", "optim=sgd", "optim.momentum=0"], Place(), "1.0 must be smaller than 1"),
        (["exchange.reduction=adasum", "wire=int8"], Place(), "adasum needs wire=fp32"),
        (["wire=powersgd", "wire.hierarchical=true"], Place(), "it needs whole matrices"),
        (["exchange=ddp", "wire.hierarchical=true"], Place("torchrun", 0, 2, 0, 2), "its library moves the sums"),
        (["wire=topk", "wire.momentum=0.9"], Place(), "needs optim=sgd optim.momentum=0"),
        (
            ["wire=topk", "wire.momentum=0.9", "exchange=acco", "optim=sgd", "optim.momentum=0"], Place(),
            "an update takes 2 sums",
        ),
        (["wire=sign"], Place(), "give optim=adamw optim.freeze_tokens=200000"),
        (["world=virtual", "exchange=acco", "exchange.timed=true"], Place(), "have no times to end a half by"),
        (["world=virtual", "model.compile=true"], Place(), "and what is compiled with it"),
        (["exchange=acco", "batch_tokens=1920"], Place(), "takes them in 2 equal parts: 2048 would do"),
        (["exchange=acco", "batch_tokens=256"], Place("horovodrun", 0, 2, 0, 2), "at least 512"),
        (["exchange=horovod", "exchange.bucket_mb=1"], Place("horovodrun", 0, 2, 0, 2), "no buckets of ours, leave it"),
        (
            ["exchange=ddp", "wire=powersgd", "exchange.bucket_mb=1"], Place("torchrun", 0, 2, 0, 2),
            "torch's hook takes one bucket",
        ),
        (
            ["exchange=ddp", "wire=powersgd", "exchange.sync=micro_batch"], Place("torchrun", 0, 2, 0, 2),
            "torch's hook counts its sums",
        ),
        (["wire=sign", "wire.warmup_tokens=0"], Place(), "needs exact sums first"),
        (["exchange=parameter_server"], Place("horovodrun", 0, 2, 0, 2), "Gloo joins have none: start them"),
        (["exchange=parameter_server"], Place("torchrun", 0, 2, 0, 2), "torch.distributed joins have none"),
        (["exchange=parameter_server", "wire=fp16"], Place("mpirun", 0, 2, 0, 2), "no sum of ranks that a wire could"),
        (["exchange=parameter_server", "wire.hierarchical=true"], Place(), "wire.hierarchical=true with exchange="),
        (["exchange=parameter_server", "exchange.bucket_mb=1"], Place(), "no buckets of ours, leave it at null"),
        (["exchange=parameter_server", "exchange.servers=1"], Place(), "exchange.servers=1 of 1 rank: none is left"),
        (["exchange=parameter_server", "exchange.servers=0"], Place(), "exchange.servers=0: give shared, where every"),
        (["exchange=parameter_server", "exchange.servers=all"], Place(), "exchange.servers=all: give shared, where"),
        (
            ["exchange=parameter_server", "exchange.staleness=0", "exchange.compensation=1"], Place(),
            "exchange.compensation with exchange.staleness=0: gradients are not late there",
        ),
        (
            ["exchange=parameter_server", "exchange.servers=1", "batch_tokens=256"], Place("mpirun", 0, 4, 0, 4),
            "fewer than the 3 ranks",
        ),
        (["exchange=fedavg", "exchange.sampled=9"], Place(), "exchange.sampled=9 of exchange.clients=8: at most all"),
        (["exchange=fedavg"], Place("horovodrun", 0, 9, 0, 9), "exchange.clients=8 clients a round for 9 ranks: some"),
        (
            ["exchange=fedavg", "exchange.inner=allreduce", "exchange.group=2", "exchange.sampled=1"],
            Place("horovodrun", 0, 4, 0, 2), "exchange.sampled=1 clients a round for 2 groups of ranks",
        ),
        (["exchange=fedavg", "batch_tokens=512"], Place(), "4 sequences of 128 tokens, fewer than 8 clients take"),
        (["exchange=fedavg", "exchange.pulses=21"], Place(), "exchange.pulses=21 in 20 local steps"),
        (["exchange=fedavg", "exchange.server=adam", "exchange.outer_momentum=0.9"], Place(), "leave it at 0"),
        (["exchange=fedavg", "exchange.tau=0.1"], Place(), "exchange.tau is that of exchange.server=adam"),
        (["exchange=fedavg", "exchange.server=adam", "exchange.beta2=1"], Place(), "exchange.beta2=1.0 must be"),
        (["exchange=fedavg", "exchange.outer_lr=1.4", "exchange.outer_momentum=0.9"], Place(), "stable below 1.36"),
        (["exchange=fedavg", "exchange.prox=0.1", "exchange.host_memory=true"], Place(), "reads the anchor"),
        (["trace_steps=9"], Place(), "trace_steps=9 is no range of steps"),
        (["trace_steps='24:20'"], Place(), "trace_steps=24:20 is no range of steps"),
    ],
)  # fmt: skip
def test_what_cannot_be_says_why_before_the_start(words: list[str], place: Place, says: str) -> None:
    with pytest.raises(UserError) as error:
        check(compose.compose(words), place)
    assert says in str(error.value) and "\n" not in str(error.value)
