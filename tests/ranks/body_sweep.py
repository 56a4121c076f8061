"""`hvdllm train -m` as it is, but for its points on this machine: each is a fork (pool.py) instead of a command."""

from __future__ import annotations

import sys
from pathlib import Path

from hvdllm.cli.main import main
from hvdllm.launch import base

# What a point's command begins with; stand_in.py takes the rest to the fork server.
FORKED = (sys.executable, "-S", str(Path(__file__).with_name("stand_in.py")), sys.executable, "-m")

if __name__ == "__main__":
    base.PYTHON = FORKED
    sys.exit(main(["train", *sys.argv[1:]]))
