"""What each collective of the Horovod world returns, written to argv[1]/<rank>.json."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from hvdllm.errors import UserError
from hvdllm.world.detect import place
from hvdllm.world.hvd import HorovodWorld

world = HorovodWorld(place(), 60.0)
rank = world.rank
out: dict[str, object] = {}
x = torch.full((3,), rank + 0.5)
flight = world.sum(x, "test.sum")
out["sum"] = flight.land().tolist()
assert flight.landed() and x.tolist() == out["sum"], "in place"
exact = torch.tensor([2.0**53 - 1 if rank == 0 else 0.0], dtype=torch.float64)
out["double"] = world.sum(exact, "test.double").land().item()
out["gather"] = world.gather(torch.full((rank + 1,), float(rank)), "test.gather").land().tolist()
out["broadcast"] = world.broadcast(torch.full((2,), float(rank)), "test.broadcast", world.size - 1).land().tolist()
out["texts"] = world.texts(["", "é" * 100, "zz"][rank], "test.texts")
world.agree(None, "test.agree")
try:
    world.agree("no" if rank == 1 else None, "test.agree")
except UserError as error:
    out["agree"] = str(error)
out["sent"] = world.bytes_sent
(Path(sys.argv[1]) / f"{rank}.json").write_text(json.dumps(out))
world.close()
