"""`hvdllm train` as it is, with a meddler: argv is the JSON of what meddle() takes, then settings."""

from __future__ import annotations

import json
import sys

from meddle import meddle

from hvdllm.cli.main import main
from hvdllm.world.detect import place

if __name__ == "__main__":
    with meddle(place().rank, **json.loads(sys.argv[1])):
        sys.exit(main(["train", *sys.argv[2:]]))
