"""hvdllm.hook: our wires under torch's DistributedDataParallel, on real ranks."""

from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import launch
import pytest

import hvdllm
from hvdllm.errors import UserError


@pytest.mark.ranks
def test_ddp_sends_its_gradients_over_every_wire() -> None:
    """Exact wires change nothing, lossy ones lose nothing: what arrived and what is kept is what was sent."""
    cases = ["fp32", "fp16", "bf16", "int8 wire.block=64", "topk wire.density=0.1 wire.warmup_tokens=0", "powersgd"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, str(launch.RANKS / "body_hook.py"), *cases], capture_output=True, text=True, timeout=launch.LIMIT_S
    )
    assert done.returncode == 0, done.stderr[-3000:]
    said = {line["wire"]: line for line in map(json.loads, done.stdout.splitlines())}
    assert len(said) == len(cases) and all(line["first"] for line in said.values())
    assert said["fp32"]["last"] < 1e-14
    for wire, most in (("fp16", 1e-2), ("bf16", 2e-2), ("int8", 5e-2)):
        assert 0 < said[wire]["last"] < most, wire
    for wire, line in said.items():
        assert line["lost"] < 1e-12, f"{wire} lost something"
    whole = said["fp32"]["bytes"]
    assert whole >= 8 * said["fp32"]["elements"] and said["int8"]["bytes"] < 0.2 * whole


def test_what_ddp_cannot_send_is_refused() -> None:
    module: Any = SimpleNamespace()
    for words, match in ((["ring"], "there is no wire=ring"), (["int8", ["wire.hierarchical=true"]], "hierarchical")):
        with pytest.raises(UserError, match=match):
            hvdllm.hook(module, *words)  # type: ignore[arg-type]
