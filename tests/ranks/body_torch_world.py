"""What body_world.py does, over torch.distributed and without Horovod."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from body_world import collectives, parts, write

from hvdllm import device
from hvdllm.errors import PeerError
from hvdllm.world.detect import place
from hvdllm.world.torch import TorchWorld


class Never:
    """An event of a GPU that waits for a rank that has gone."""

    def query(self) -> bool:
        return False


def gone(world: TorchWorld) -> dict[str, str]:
    """Rank 1 leaves with exit code 0, so that no launcher ends the others."""
    if world.rank == 1:
        os._exit(0)
    device.LAST_S = 0.01
    out = {}
    for where, wait in {
        "gpu": lambda: device.wait_for(Never()),  # type: ignore[arg-type]  # nothing travels here
        "sum": lambda: world.sum(torch.ones(4), "grad.gone").land(),
    }.items():
        try:
            wait()
        except PeerError as error:
            out[where] = str(error)
    return out


what = sys.argv[2]
world = TorchWorld(place(), 60.0)
# A fork has what its server has imported.
assert "horovod" not in sys.modules or "pool.py" in Path("/proc/self/cmdline").read_text()
out = {"all": collectives, "parts": parts, "gone": gone}[what](world)
if what == "all":
    out["sum_bf16"] = world.sum(torch.full((2,), world.rank + 1.0, dtype=torch.bfloat16), "grad.bf16").land().tolist()
write(world, out)
if what == "gone":
    os._exit(0)
world.close()
