"""What body_world.py does, over torch.distributed and without Horovod."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from body_world import collectives, gone, parts, write

from hvdllm.world.detect import place
from hvdllm.world.torch import TorchWorld

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
