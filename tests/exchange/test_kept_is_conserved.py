"""Nothing that a lossy wire keeps is lost or counted twice, through whole exchanges and under a rate that changes at
every update: with plain descent

    sum over rounds and ranks of w_r G_r  =  x_0 - x_T  +  w_last (what is kept, and what has arrived, not applied)

where w_r, rate / tokens of the update that round r is committed with, is worked out here. Whoever hands the wire the
weight of another update than that one breaks it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from rig import NOMINAL, train

from hvdllm.exchange import parts as exchanges
from hvdllm.exchange.wire import parts as wires
from hvdllm.optim import parts as optims
from hvdllm.trainer import assemble

LR = 0.05
OPTIM = optims.SGD(lr=LR, momentum=0.0, weight_decay=0.0, clip=0.0)
WIRES = {"int8": wires.Int8(block=8), "topk": wires.TopK(density=0.05, warmup_tokens=0)}


def rate(tokens: int) -> float:
    """Another one for each update, up and down, by less than a factor of ten."""
    return 1.0 + 0.8 * ((tokens // 12 * 7) % 10 - 4.5) / 4.5


class Spy:
    """A wire that notes what comes in, bucket by bucket, in the order of the launches."""

    def __init__(self, wire: Any) -> None:
        self.wire = wire
        self.came: dict[str, list[torch.Tensor]] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.wire, name)

    def sum(self, x: torch.Tensor, key: str) -> Any:
        self.came.setdefault(key, []).append(x.clone())
        return self.wire.sum(x, key)

    def scatter(self, x: torch.Tensor, key: str) -> Any:
        self.came.setdefault(key, []).append(x.clone())
        return self.wire.scatter(x, key)


def delayed(r: int) -> float:
    """Round r is update r + 1."""
    return LR * rate(NOMINAL * (r + 1)) / NOMINAL


def halves(r: int) -> float:
    """Two rounds an update."""
    return LR * rate(NOMINAL * (r // 2 + 1)) / NOMINAL


CASES: dict[str, tuple[Any, Callable[[int], float], str | None]] = {
    "allreduce": (exchanges.AllReduce(), delayed, None),
    "sharded": (exchanges.Sharded(), delayed, None),
    "delayed": (exchanges.Delayed(warmup_tokens=0), delayed, "flying"),
    "delayed, warm": (exchanges.Delayed(warmup_tokens=3 * NOMINAL), delayed, "flying"),
    "acco": (exchanges.Acco(), halves, "kept"),
}


@pytest.mark.parametrize("code", WIRES)
@pytest.mark.parametrize("name", CASES)
def test_what_is_kept_is_worth_what_it_was(name: str, code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    exchange, weight, flying = CASES[name]
    spies: list[Spy] = []
    made = assemble.make_wire

    def make(*args: Any) -> Spy:
        spies.append(Spy(made(*args)))
        return spies[-1]

    monkeypatch.setattr(assemble, "make_wire", make)
    out = train(exchange, 2, 9, optim=OPTIM, wire=WIRES[code], rate=rate, stop_at=9, settle=False)
    flat = spies[0].wire.flat
    whole = torch.zeros_like(flat.x)
    arrived = torch.zeros_like(flat.x)
    for each in out:
        state = each.state[0]
        for into, kind in ((whole, "model"), (arrived, flying)):
            if kind is not None:
                cut(into, state.spans, state.sharded[kind])
    came, kept = torch.zeros_like(flat.x), torch.zeros_like(flat.x)
    for spy, each in zip(spies, out, strict=True):
        for key, sums in spy.came.items():
            span = flat.buckets[int(key.rpartition(".")[2])].span
            assert len(sums) == len(spies[0].came["grad.0"]) >= 9
            for r, x in enumerate(sums):
                came[span.start : span.stop] += weight(r) * x
        for spans, values in each.state[0].summed.values():
            cut(kept, spans, values)
    begun = torch.zeros_like(flat.x)
    for name_, place in flat.at.items():
        begun[place] = dict(zip(flat.parameters, out[0].begun.split(sizes(flat)), strict=True))[name_]
    last = weight(len(spies[0].came["grad.0"]) - 1)
    assert kept.any()
    torch.testing.assert_close(begun - whole + last * (kept + arrived), came, rtol=0, atol=1e-12)


def sizes(flat: Any) -> list[int]:
    return [flat.view(name).numel() for name in flat.parameters]


def cut(into: torch.Tensor, spans: list[Any], values: torch.Tensor) -> None:
    if not spans:  # another rank hands out the same
        return
    for span, part in zip(spans, values.split([s.stop - s.start for s in spans]), strict=True):
        into[span.start : span.stop] += part
