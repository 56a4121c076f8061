"""A Redis server of a test's own, on loopback, which is killed and started again."""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

PASSWORD = "secret"


class Server:
    """Keeps its streams in `folder`, also over kill() and start(). Raises ImportError or FileNotFoundError where the
    package redis or redis-server is missing."""

    def __init__(self, folder: Path) -> None:
        import redis

        if shutil.which("redis-server") is None:
            raise FileNotFoundError("redis-server is not installed: apt-get install redis-server")
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port = probe.getsockname()[1]
        self.folder, self.error = folder, redis.exceptions.RedisError
        self.client: Any = redis.Redis(port=self.port, password=PASSWORD)
        self.address = f"redis://:{PASSWORD}@127.0.0.1:{self.port}/0"
        self.start()

    def start(self) -> None:
        self._process = subprocess.Popen(
            ["redis-server", "--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self.folder), "--save", "",
             "--appendonly", "yes", "--requirepass", PASSWORD],
            stdout=subprocess.DEVNULL,
        )  # fmt: skip
        for _ in range(500):
            with contextlib.suppress(self.error):
                self.client.ping()
                return
            time.sleep(0.02)
        raise AssertionError("redis-server does not answer")

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def close(self) -> None:
        self.client.close()
        self.kill()
