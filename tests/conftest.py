"""What holds for all tests.

That this file stands here also puts this folder on the import path: tests/launch.py is importable from every room.
"""

from hypothesis import settings

settings.register_profile("hvdllm", deadline=None)  # tests assert nothing on wall-clock time, since machines are busy
settings.load_profile("hvdllm")
