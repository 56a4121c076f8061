"""`python -m hvdllm` is the command `hvdllm`."""

import sys

from hvdllm.cli.main import main

sys.exit(main())
