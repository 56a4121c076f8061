"""Where ranks meet under horovodrun that we start: on the loopback or one interface, for those who know a secret."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from launch import Job, environment

from hvdllm.launch import horovodrun, meeting

LOOK = """
import json, os, pathlib, sys, urllib.error, urllib.request
import horovod.torch as hvd, torch
from hvdllm.world.torch import through_horovodrun
from datetime import timedelta
direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
address, port = (os.environ[f"HOROVOD_GLOO_RENDEZVOUS_{name}"] for name in ("ADDR", "PORT"))
place, _, secret = address.partition("/")
rank = int(os.environ["HOROVOD_RANK"])
try:  # a neighbour, before the ranks have met
    body = b"127.0.0.1 1"
    direct.open(urllib.request.Request(f"http://{place}/global/0", body, method="PUT"), timeout=10)
    refused = 0
except urllib.error.HTTPError as error:
    refused = error.code
met = through_horovodrun(("here", 7) if rank == 0 else None, timedelta(seconds=20))
hvd.init()
total = hvd.allreduce(torch.tensor([1.0 + rank]), op=hvd.Sum).item()
lines = []
for path in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
    try:
        lines.append(path.read_bytes())
    except OSError:
        pass
told = {"place": place, "secret": len(secret), "refused": refused, "met": met, "total": total, "port": port}
told["in a command line"] = any(secret.encode() in line for line in lines)
told["key in a command line"] = any(b"TRACKER_KEY" + b"=gold" in line for line in lines)
told["key"] = os.environ.get("TRACKER_KEY")
pathlib.Path(sys.argv[1], f"{rank}.json").write_text(json.dumps(told))
hvd.shutdown()
"""


@pytest.mark.ranks
def test_ranks_meet_and_neighbours_do_not(tmp_path: Path) -> None:
    words = [*horovodrun.starter("gloo"), "--gloo", "-np", "2", "--disable-cache", sys.executable, "-c", LOOK]
    with Job([*words, str(tmp_path)], TRACKER_KEY="gold") as job:
        done = job.wait()
    assert done.code == 0, done.out
    for rank in range(2):
        told = json.loads((tmp_path / f"{rank}.json").read_text())
        assert told["place"].startswith("127.0.0.1:") and told["secret"] == 32 and told["refused"] == 403
        assert told["met"] == ["here", 7] and told["total"] == 3 and told["key"] == "gold"
        assert not told["in a command line"] and not told["key in a command line"]


class Settings:
    output_filename, verbose, num_proc = None, 0, 2

    def __init__(self, hosts: str) -> None:
        self.hosts = hosts


@pytest.fixture
def gloo_run() -> Iterator[Any]:
    """Horovod's module as nobody has changed it, ours put in."""
    import importlib

    from horovod.runner import gloo_run
    from horovod.runner.common.util import env

    exportable, before = env.is_exportable, dict(os.environ)
    module = importlib.reload(gloo_run)
    meeting.guard(module)
    yield module
    env.is_exportable = exportable
    os.environ.clear()
    os.environ.update(before)
    meeting.Rendezvous.point.close()
    importlib.reload(gloo_run)


def test_between_hosts_the_server_listens_at_the_address_that_they_know(gloo_run: Any) -> None:
    """And what ssh starts elsewhere is told the secret, as it is told all else, in its command line."""
    started: list[str] = []

    def execute(command: str, slot: Any, events: Any) -> tuple[int, float]:
        started.append(command)
        return 0, 0.0

    gloo_run.register_shutdown_event = lambda: None
    gloo_run.launch_gloo(["true"], execute, Settings("localhost:1,192.0.2.7:1"), ["lo"], {"A": "b"}, "127.0.0.1")
    point = meeting.Rendezvous.point
    assert point.server.server_address[0] == "127.0.0.1"
    assert len(started) == 2 and all(f"127.0.0.1:{point.port}/{point.secret}" in command for command in started)
    assert all("HOROVOD_GLOO_RENDEZVOUS_PORT=0" in command and "A=b" in command for command in started)


def test_the_program_is_horovodrun() -> None:
    words = [*horovodrun.starter("gloo"), "--version"]
    done = subprocess.run(words, capture_output=True, text=True, env=environment(), timeout=60)
    assert done.returncode == 0 and done.stdout.strip() == "0.28.1"
