"""What holds for all tests.

That this file stands here also puts this folder on the import path: tests/launch.py is importable from every room.
"""

import sys

import pytest
from hypothesis import settings

settings.register_profile("hvdllm", deadline=None)  # tests assert nothing on wall-clock time, since machines are busy
settings.load_profile("hvdllm")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """The tensors of most tests are so small that a second thread only spins: it tripled what wires took of a CPU. Set
    before each test, because hvdllm sets the threads of the process that it trains in."""
    if (torch := sys.modules.get("torch")) is not None:
        torch.set_num_threads(1)
