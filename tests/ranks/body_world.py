"""What each collective of a world of real ranks returns and counts, written to argv[1]/<rank>.json.

argv[2] is `all`, `parts` (4 ranks in two groups) or `gone` (rank 1 leaves without a word). Run as a program it is the
Horovod world; body_torch_world.py does the same over torch.distributed.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from hvdllm.errors import UserError
from hvdllm.world.detect import place


def refused(call: Callable[[], Any]) -> str:
    try:
        call()
    except UserError as error:
        return str(error)
    return ""


def collectives(world: Any) -> dict[str, Any]:
    rank, size, out, sent = world.rank, world.size, {}, {}
    before = 0.0

    def counted(kind: str) -> None:
        nonlocal before
        sent[kind], before = world.bytes_sent - before, world.bytes_sent

    x = torch.full((3,), rank + 0.5)
    flight = world.sum(x, "grad.0.0")
    out["sum"] = flight.land().tolist()
    assert flight.landed() and x.tolist() == out["sum"], "in place"
    counted("sum")
    exact = torch.tensor([2.0**53 - 1 if rank == 0 else 0.0], dtype=torch.float64)
    out["double"] = world.sum(exact, "meta.0").land().item()

    # 1e8 - 1e8 + 1 is 1 in fp32, in this order only; 256 + 1 + 1 is 258 in fp32 and 256 in bf16
    x = torch.tensor([[1e8, -1e8, 1.0][rank], 10.0 * rank] * size).reshape(2 * size)
    before = world.bytes_sent
    out["scatter"] = world.scatter(x, "grad.1").land().tolist()
    counted("scatter")
    x = torch.tensor([[256.0, 1.0, 1.0][rank]] * size, dtype=torch.bfloat16)
    out["scatter_bf16"] = world.scatter(x, "grad.2").land().tolist()

    for dtype in (torch.float32, torch.bfloat16, torch.uint8, torch.float64):
        x = torch.arange(2 * size).reshape(2 * size, 1).repeat(1, 2).to(dtype) + 16 * rank
        before = world.bytes_sent
        out[f"alltoall_{dtype}"] = world.alltoall(x, f"grad.all.{dtype}").land()[:, 1].tolist()
        counted(f"alltoall_{dtype}")
    odd = torch.tensor([0x7FC1, 0x0001], dtype=torch.int16).repeat(size).view(torch.bfloat16)  # NaN, subnormal
    out["bits"] = world.alltoall(odd, "grad.bits").land().view(torch.int16).tolist()

    before = world.bytes_sent
    out["gather"] = world.gather(torch.full((rank + 1,), float(rank)), "param.0").land().tolist()
    counted("gather")
    row = torch.full((1, 2), rank, dtype=torch.bfloat16)
    out["gather_equal"] = world.gather(row, "param.1").land().tolist()
    counted("gather_equal")
    assert world.gather(row, "param.3", equal=True).land().tolist() == out["gather_equal"]
    counted("gather_known")
    out["gather_empty"] = world.gather(torch.ones(2 * (rank % 2), 3), "param.2").land().shape
    last = torch.full((2,), float(rank), dtype=torch.bfloat16)
    before = world.bytes_sent
    out["broadcast"] = world.broadcast(last, "load.0", size - 1).land().tolist()
    counted("broadcast")
    assert last.tolist() == out["broadcast"], "in place"

    # Channels have an order each, not together; one collective waits behind another that must first wait for sizes.
    launches: dict[str, Callable[[], Any]] = {
        "total": lambda: world.sum(torch.ones(2), "total.0"),
        "ragged": lambda: world.gather(torch.ones(1 + rank), "act.0"),
        "behind": lambda: world.sum(torch.full((3,), 2.0), "act.1"),
    }
    time.sleep(0.05 * rank)
    turn = ["total", "ragged", "behind"] if rank % 2 else ["ragged", "behind", "total"]
    under_way = {name: launches[name]() for name in turn}
    out["channels"] = {name: under_way[name].land().tolist() for name in reversed(turn)}

    order: list[str] = []

    def driven(name: str) -> float:
        order.append(f"{name}>")
        value = world.sum(torch.ones(1), f"grad.driven.{name}").land().item()
        order.append(f"<{name}")
        return value

    flights = [world.drive(lambda name=name: driven(name)) for name in "ab"]
    out["driven"] = [flight.land() for flight in reversed(flights)]
    out["order"] = order

    a = (torch.arange(6.0) - 2 * rank).reshape(2, 3)
    if size & (size - 1):
        out["adasum"] = refused(lambda: world.adasum(a, "grad.adasum"))
    else:
        world.adasum(a, "grad.adasum").land()
        out["adasum"] = a.flatten().tolist()
    out["texts"] = world.texts(["", "é" * 100, "zz"][rank], "start.texts")
    world.agree(None, "start.agree")
    out["agree"] = refused(lambda: world.agree("no" if rank == 1 else None, "start.agree"))
    return out | {"sent": sent}


def parts(world: Any) -> dict[str, Any]:
    """Two groups that cross, then two that follow each other."""
    out: dict[str, Any] = {}
    for name, groups in (("cross", [(0, 2), (1, 3)]), ("near", [(1, 0), (2, 3)])):
        part = world.split(groups, f"start.{name}")
        before = world.bytes_sent
        x = torch.arange(4.0) * 10**world.rank
        summed = part.sum(x.clone(), f"grad.{name}").land().tolist()
        assert world.bytes_sent - before == part.bytes_sent == 16.0, "2 (N-1)/N of 16 bytes, counted in both"
        out[name] = {
            "place": [part.rank, part.size, part.local_rank, part.local_size],
            "sum": summed,
            "scatter": part.scatter(x.clone(), f"grad.scatter.{name}").land().tolist(),
            "gather": part.gather(x[: part.rank + 1], f"param.{name}").land().tolist(),
            "alltoall": part.alltoall(x, f"grad.alltoall.{name}").land().tolist(),
            "broadcast": part.broadcast(x.clone(), f"load.{name}", 1).land().tolist(),
            "texts": part.texts(str(world.rank), f"start.texts.{name}"),
            "driven": part.drive(lambda: part.sum(torch.ones(1), "grad.driven").land().item()).land(),  # noqa: B023
            "adasum": part.adasum(torch.full((2,), 3.0), f"grad.adasum.{name}").land().tolist(),
        }
        assert part.asks is world.asks
        part.close()
    return out


def write(world: Any, out: dict[str, Any]) -> None:
    (Path(sys.argv[1]) / f"{world.rank}.json").write_text(json.dumps(out))


if __name__ == "__main__":
    from hvdllm.world.hvd import HorovodWorld

    what = sys.argv[2]
    world = HorovodWorld(place(), 60.0, groups=what == "parts", fuse=what == "parts")
    assert os.environ.get("HOROVOD_FUSION_THRESHOLD") == (None if what == "parts" else "0")
    if what == "parts":
        out = parts(world)
    else:
        out = collectives(world)
        out["sum_bf16"] = refused(lambda: world.sum(torch.ones(1, dtype=torch.bfloat16), "grad.bf16"))
        try:
            world.split([tuple(range(world.size))], "start.none")
        except RuntimeError as error:
            out["split"] = str(error)
        # The stock optimizer adds up what any number of backward passes left, at its synchronize() alone.
        layer = torch.nn.Linear(2, 1, bias=False)
        stock = world.distributed_optimizer(torch.optim.SGD(layer.parameters(), 1.0), layer.named_parameters())
        for _ in range(3):
            layer(torch.full((1, 2), world.rank + 1.0)).sum().backward()
        stock.synchronize()
        out["stock"] = layer.weight.grad.tolist()
    write(world, out)
    world.close()
