"""That this file stands here puts this folder on the import path: tests/launch.py is importable from every room."""

import gc


def pytest_collection_finish() -> None:
    """What was imported and collected stays: to look through it again and again takes a fifth of the time."""
    gc.collect()
    gc.freeze()
