"""Two ranks under torchrun: DDP over each of our wires. Prints one line of JSON a wire on rank 0."""

import json
import sys
import warnings

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import hvdllm
from hvdllm.exchange.wire.feedback import Feedback

STEPS = 8


def gradients(wire: str | None, *words: str) -> tuple[list[torch.Tensor], torch.Tensor, float]:
    """Of each step, at fixed weights; what the wire has left at the end, over the ranks; and the bytes of a step."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 64), nn.Tanh(), nn.Linear(64, 64), nn.Linear(64, 3)).double()
    module = DistributedDataParallel(model, bucket_cap_mb=0.02)
    hook = hvdllm.hook(module, wire, words) if wire is not None else None
    out, sent = [], 0.0
    for step in range(STEPS):
        draw = torch.Generator().manual_seed(100 * step + dist.get_rank())
        sent = hook.world.bytes_sent if hook is not None else 0.0
        module(torch.randn(16, 40, generator=draw, dtype=torch.float64)).square().mean().backward()
        out.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
        module.zero_grad()
    left = torch.zeros(len(out[0]), dtype=torch.float64)
    if hook is not None:
        sent = hook.world.bytes_sent - sent
        if isinstance(hook.wire, Feedback):
            flat = torch.zeros(len(hook.map.x), dtype=torch.float64)
            for bucket in hook.map.buckets:
                if (kept := hook.wire.residual.get(bucket.index)) is not None:
                    flat[bucket.span.start : bucket.span.stop] += kept.view(-1)
                if (kept := hook.wire.owner.get(bucket.index)) is not None:
                    (span,) = hook.wire.own(bucket)
                    flat[span.start : span.stop] += kept.view(-1)
            dist.all_reduce(flat)
            left = torch.cat([flat[hook.map.at[name]] for name in hook.map.parameters])
        hook.close()
    return out, left / dist.get_world_size(), sent


def main() -> None:
    dist.init_process_group("gloo")
    plain, _, _ = gradients(None)
    for case in sys.argv[1:]:
        wire, *words = case.split()
        found, left, sent = gradients(wire, *words)
        lost = sum(found) + left - sum(plain)
        said = {
            "wire": wire, "bytes": sent, "elements": len(plain[0]), "first": torch.equal(found[0], plain[0]),
            "last": (found[-1] - plain[-1]).norm().item() / plain[-1].norm().item(),
            "lost": lost.norm().item() / sum(plain).norm().item(),
        }  # fmt: skip
        if dist.get_rank() == 0:
            print(json.dumps(said), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
