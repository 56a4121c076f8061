"""hvdllm trains transformer language models over Horovod, with the exchange of gradients in plain sight.

`hvdllm.Session` trains a model of your own (session.py), and `hvdllm.hook` sends the gradients of torch's
DistributedDataParallel over our wires (ddp_hook.py). Both need torch, and are imported when they are first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hvdllm.ddp_hook import hook as hook
    from hvdllm.session import Session as Session

__version__ = "0.1.0"
__all__ = ["Session", "__version__", "hook"]


def __getattr__(name: str) -> object:
    if name == "Session":
        from hvdllm.session import Session

        return Session
    if name == "hook":
        from hvdllm.ddp_hook import hook

        return hook
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
