"""A lab that is really built: hosts reach each other, counters count, and nothing is left however it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from hvdllm.errors import RunError, UserError
from hvdllm.launch import lab
from hvdllm.launch.lab import Lab

pytestmark = pytest.mark.skipif(bool(lab.missing()), reason=str(lab.missing()))
ROOT = Path(__file__).resolve().parents[2]
SERVER = """
import socket
with socket.create_server(("10.77.0.2", 5000)) as server:
    print("listens", flush=True)
    peer, _ = server.accept()
    print(sum(iter(lambda: len(peer.recv(65536)), 0)))
"""
CLIENT = """
import socket
with socket.create_connection(("10.77.0.2", 5000), timeout=20) as peer:
    peer.sendall(bytes(1_000_000))
"""
# Builds as `hvdllm bench exchange` does, starts a process in a host and waits for it.
HOLDS = """
import sys
from pathlib import Path
from hvdllm.bench import exchange
from hvdllm.launch import group
asked = exchange.Asked("200mbit", 2, 2, (), (), (), (), 1, 1, 1, 60.0)
with exchange.ended_by_signals(), exchange.network_of(asked) as network:
    command = network.inside(network.hosts[1], ["bash", "-c", "trap '' TERM; echo up; sleep 600"])
    group.GRACE_S = 0.2
    group.run([command], group.environment(), Path(sys.argv[1]), 60.0)
"""


def made_by(pid: int) -> list[str]:
    return [name for name in lab.names() if name.startswith(f"hvdllm-{pid}-")]


def until(what: Callable[[], bool]) -> None:
    end = time.monotonic() + 60.0
    while not what():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_hosts_talk_and_their_counters_count_packets_on_the_wire() -> None:
    with closing(Lab(2, "200mbit")) as network:
        network.build()
        first, second = network.hosts
        assert made_by(os.getpid()) == sorted([first.name, second.name, f"{network.prefix}-sw"])
        server = subprocess.Popen(
            network.inside(second, [sys.executable, "-c", SERVER]), stdout=subprocess.PIPE, text=True
        )
        with server:
            assert server.stdout is not None and server.stdout.readline() == "listens\n"
            lab.do(network.inside(first, [sys.executable, "-c", CLIENT]))
            assert server.stdout.read() == "1000000\n"
        counters = [f"/sys/class/net/eth0/statistics/{name}" for name in ("tx_bytes", "tx_packets")]
        octets, packets = map(int, lab.do(network.inside(first, ["cat", *counters])).split())
        assert octets / packets <= lab.MTU + 14, "segmentation is left to the wire: packets are not packets"
        # Packets may have been sent twice (the bucket drops), none less than once; a question for an address is short.
        assert 999_900 <= octets - lab.FRAME * packets < 1_500_000
        assert "tbf" in lab.do(["tc", "-n", second.name, "qdisc", "show", "dev", "eth0"])
        assert network.folder is not None
        said = lab.do([str(network.folder / "ssh"), "-o", "x=y", second.address, "ip -4 addr show eth0"])
        assert f"{second.address}/24" in said
        folder = network.folder
    assert made_by(os.getpid()) == [] and not folder.exists()


def test_nothing_is_left_after_a_failure_halfway(monkeypatch: pytest.MonkeyPatch) -> None:
    network = Lab(3, "200mbit")
    at = next(i for i, command in enumerate(network.plan) if command[:2] == ["tc", "-n"]) + 3
    network.plan.insert(at, ["ip", "-n", network.hosts[1].name, "link", "set", "eth9", "up"])
    with pytest.raises(RunError, match=r"eth9 up` failed: .*eth9"), closing(network):
        network.build()
    assert made_by(os.getpid()) == []


def test_foreign_names_are_not_touched() -> None:
    """Another lab of this process, and a namespace that only looks like one of ours."""
    foreign = f"hvdllm-{os.getpid()}-h2"
    lab.do(["ip", "netns", "add", foreign])
    try:
        with pytest.raises(UserError, match=f"a namespace {foreign} is there already"), closing(Lab(2, "1gbit")) as one:
            one.build()
        with pytest.raises(ValueError, match="not made by this lab"):
            one.remove(foreign)
        assert made_by(os.getpid()) == [foreign]
    finally:
        lab.do(["ip", "netns", "del", foreign])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_nothing_is_left_after_a_signal(number: signal.Signals, tmp_path: Path) -> None:
    log = tmp_path / "log"
    process = subprocess.Popen([sys.executable, "-c", HOLDS, str(log)], cwd=ROOT, stderr=subprocess.DEVNULL)
    until(lambda: process.poll() is not None or (log.exists() and "up" in log.read_text()))
    assert len(made_by(process.pid)) == 3
    (inside, *_) = lab.do(["ip", "netns", "pids", f"hvdllm-{process.pid}-h2"]).split()
    process.send_signal(number)
    assert process.wait(60) != 0
    assert made_by(process.pid) == [] and not Path(f"/proc/{inside}").exists()


def test_the_next_lab_sweeps_what_a_killed_one_left(tmp_path: Path) -> None:
    log = tmp_path / "log"
    process = subprocess.Popen([sys.executable, "-c", HOLDS, str(log)], cwd=ROOT)
    until(lambda: process.poll() is not None or (log.exists() and "up" in log.read_text()))
    (inside, *_) = lab.do(["ip", "netns", "pids", f"hvdllm-{process.pid}-h2"]).split()
    assert made_by(process.pid)[0] not in lab.sweep(), "its process lives"
    process.kill()
    process.wait()
    assert len(made_by(process.pid)) == 3 and Path(f"/proc/{inside}").exists()
    (folder,) = Path(tempfile.gettempdir()).glob(f"hvdllm-{process.pid}-lab-*")
    with closing(Lab(2, "200mbit")) as network:
        network.build()
    assert made_by(process.pid) == [] and not folder.exists()
    until(lambda: not Path(f"/proc/{inside}").exists())
