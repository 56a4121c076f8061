"""Letters between real ranks, written to argv[1]/<rank>.json: order, kinds of bodies, large ones both ways at once,
beside Horovod's own collectives; twice, each time on a communicator of its own."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import torch

from hvdllm.world.detect import place
from hvdllm.world.hvd import HorovodWorld

LARGE = 5_000_000


def filled(sender: int, to: int) -> torch.Tensor:
    return torch.randn(LARGE, generator=torch.Generator().manual_seed(100 * sender + to))


def digest(x: torch.Tensor) -> str:
    return hashlib.sha256(x.view(torch.uint8).numpy().tobytes()).hexdigest()


def talk(world: Any) -> dict[str, Any]:
    mail, others, out = world.mail(), [r for r in range(world.size) if r != world.rank], {}
    before = world.bytes_sent
    for to in others:
        body = filled(world.rank, to)
        mail.post(to, "large", {"for": to}, body)
        body.zero_()  # it may be written to again
        for k in range(50):
            mail.post(to, "small", {"k": k})
    out["sent"] = world.bytes_sent - before
    flights = [world.sum(torch.ones(100_000), f"grad.{k}") for k in range(5)]
    got = [mail.take("large") for _ in others]
    out["whole"] = all(digest(x.body) == digest(filled(x.sender, world.rank)) for x in got)
    out["sums"] = [flight.land()[7].item() for flight in flights]
    small = [mail.take("small") for _ in range(50 * len(others))]
    out["order"] = all([x.head["k"] for x in small if x.sender == r] == list(range(50)) for r in others)
    kinds = {
        "empty": torch.zeros(0), "bf16": torch.tensor([1.5, float("nan")], dtype=torch.bfloat16),
        "fp64": torch.tensor([2.0**-60], dtype=torch.float64), "ints": torch.arange(3), "none": None,
    }  # fmt: skip
    for name, body in kinds.items():
        mail.post((world.rank + 1) % world.size, name, {"é": ["x", None, 0.1, float("inf")]}, body)
    for name, body in kinds.items():
        letter = mail.take(name)
        same = letter.body is None if body is None else (
            letter.body.dtype == body.dtype and digest(letter.body) == digest(body)
        )  # fmt: skip
        out[name] = same and letter.head == {"é": ["x", None, 0.1, float("inf")]}
    mail.close()
    return out


def main() -> None:
    world = HorovodWorld(place(), 60.0)
    said = [talk(world), talk(world)]
    (Path(sys.argv[1]) / f"{world.rank}.json").write_text(json.dumps(said))
    world.close()


if __name__ == "__main__":
    main()
