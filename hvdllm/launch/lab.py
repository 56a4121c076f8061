"""The network lab: several hosts on one machine, which are network namespaces joined by links of a known rate.

    host h1: eth0 10.77.0.1 --veth--+
    host h2: eth0 10.77.0.2 --veth--+-- bridge, in a namespace of its own
    ...

Every host shapes what it sends (a token bucket, tc tbf), so both directions between any two hosts have that rate.
Segmentation offloads are off, so an interface's tx_packets are packets on the wire, and tx_bytes is an independent
count of the bytes.

Invariant: a lab touches only namespaces that it has made itself, `hvdllm-<pid>-h<k>` and `hvdllm-<pid>-sw` with the pid
of this process. All of them are gone after close(), also after a failure or a signal. What is left of a lab whose
process was killed is removed by the next lab. A lab needs root and iproute2's ip and tc. It changes nothing outside its
namespaces.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import re
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hvdllm.config.pace import bits_per_second
from hvdllm.errors import RunError, UserError

NAMES = Path("/run/netns")
OURS = re.compile(r"hvdllm-(\d+)-(?:h[1-8]|sw|lab-\w+)")
MOST_HOSTS = 8
INTERFACE = "eth0"
FRAME = 66  # bytes of an Ethernet, IPv4 and TCP header with timestamps, as tx_bytes counts them
# Bytes of a packet, as on the links of clusters. With 1500, the kernel's work on packets, which no network card takes
# over here, slowed compute by another 5 %.
MTU = 9000
# Bytes. tbf needs at least what the link sends in a kernel tick of 4 ms, which from 8 Gbit/s on is more than this.
BURST = 256 * 1024


@dataclass(frozen=True)
class Host:
    """A host of a lab.

    Attributes:
        name: of its namespace.
        address: its IPv4 address in the lab.
    """

    name: str
    address: str


def hosts_of(prefix: str, hosts: int) -> list[Host]:
    """The hosts of a lab whose names begin with `prefix`."""
    return [Host(f"{prefix}-h{k}", f"10.77.0.{k}") for k in range(1, hosts + 1)]


def build_plan(prefix: str, hosts: int, link: str) -> list[list[str]]:
    """The commands that build a lab, in order.

    Interfaces get no link-local addresses, because the packets that announce those would be counted.

    Args:
        prefix: of all names.
        hosts: how many there are.
        link: the rate of each host's link, such as 200mbit.
    """
    switch, rate = f"{prefix}-sw", bits_per_second(link)
    burst = max(BURST, int(rate / 8 / 250))
    plan = [
        ["ip", "netns", "add", switch],
        ["ip", "-n", switch, "link", "add", "br0", "type", "bridge", "stp_state", "0", "forward_delay", "0"],
        ["ip", "-n", switch, "link", "set", "br0", "addrgenmode", "none", "up"],
    ]
    for k, host in enumerate(hosts_of(prefix, hosts), 1):
        port = f"p{k}"
        plan += [
            ["ip", "netns", "add", host.name],
            ["ip", "-n", host.name, "link", "set", "lo", "up"],
            ["ip", "link", "add", INTERFACE, "netns", host.name, "type", "veth", "peer", "name", port, "netns", switch],
            ["ip", "-n", switch, "link", "set", port, "mtu", str(MTU), "addrgenmode", "none", "master", "br0", "up"],
            ["ip", "-n", host.name, "link", "set", INTERFACE, "mtu", str(MTU), "addrgenmode", "none"],
            ["ip", "-n", host.name, "addr", "add", f"{host.address}/24", "dev", INTERFACE],
            ["ip", "-n", host.name, "link", "set", INTERFACE, "up"],
            ["tc", "-n", host.name, "qdisc", "add", "dev", INTERFACE, "root", "tbf",
             "rate", link, "burst", str(burst), "latency", "50ms"],
        ]  # fmt: skip
    return plan


def stand_in(hosts: Sequence[Host]) -> str:
    """The text of a script that replaces ssh. It skips options, and runs the command in the host's namespace."""
    cases = "\n".join(f"{host.address}) name={host.name} ;;" for host in hosts)
    return f"""#!/bin/sh
host=
while [ $# -gt 0 ]; do
    case "$1" in
        -[bcDEeFIiJLlmOopQRSWw]) shift 2 ;;
        -*) shift ;;
        *) [ -z "$host" ] || break; host=$1; shift ;;
    esac
done
case "$host" in
{cases}
*) echo "ssh: the lab has no host $host" >&2; exit 255 ;;
esac
exec ip netns exec "$name" bash -c "$*"
"""


def missing() -> str | None:
    """Why there can be no lab on this machine, as a clause, or None if there can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    lacking = [tool for tool in ("ip", "tc", "bash") if not shutil.which(tool)]
    return f"{' and '.join(lacking)} not found (Debian: iproute2)" if lacking else None


class Lab:
    """A network lab. build() makes it, and close() removes it, however far build() came: use contextlib.closing().

    Args:
        hosts: how many there are, at most MOST_HOSTS.
        link: the rate of each host's link, such as 200mbit.
    """

    def __init__(self, hosts: int, link: str) -> None:
        if not 2 <= hosts <= MOST_HOSTS:
            raise UserError(f"a lab has 2 to {MOST_HOSTS} hosts, not {hosts}")
        self.prefix = f"hvdllm-{os.getpid()}"
        self.hosts, self.link = hosts_of(self.prefix, hosts), link
        self.plan = build_plan(self.prefix, hosts, link)
        self.made: list[str] = []
        self.folder: Path | None = None

    def build(self) -> None:
        """Makes the namespaces and links.

        Raises UserError if this process has a lab already, and RunError if the kernel refuses.
        """
        sweep()
        with held():
            self.folder = Path(tempfile.mkdtemp(prefix=f"{self.prefix}-lab-"))
            for command in self.plan:
                if command[:3] == ["ip", "netns", "add"]:
                    self._add(command[3])
                else:
                    do(command)
            script = self.folder / "ssh"
            script.write_text(stand_in(self.hosts))
            script.chmod(script.stat().st_mode | stat.S_IXUSR)
            for host in self.hosts:
                do(self.inside(host, [sys.executable, "-P", "-m", "hvdllm.launch.lab", INTERFACE]))

    def inside(self, host: Host, command: Sequence[str]) -> list[str]:
        """The command line that runs a command on that host."""
        return ["ip", "netns", "exec", host.name, *command]

    def remove(self, name: str) -> None:
        """Ends all processes in one of this lab's namespaces, and removes it."""
        if name not in self.made:
            raise ValueError(f"{name} was not made by this lab")
        _remove(name)
        self.made.remove(name)

    def close(self) -> None:
        """Removes the lab. Raises RunError, at the end, if something could not be removed."""
        with held():
            problems = []
            for name in reversed(self.made.copy()):
                try:
                    self.remove(name)
                except RunError as error:
                    problems.append(str(error))
            if self.folder is not None:
                shutil.rmtree(self.folder, ignore_errors=True)
                self.folder = None
        if problems:
            raise RunError("; ".join(problems))

    def _add(self, name: str) -> None:
        if name in names():
            raise UserError(f"a namespace {name} is there already and not this lab's: see `ip netns list`")
        do(["ip", "netns", "add", name])
        self.made.append(name)


# ------------------------------------------------------------------ namespaces
def names() -> list[str]:
    """The names of all network namespaces."""
    return sorted(os.listdir(NAMES)) if NAMES.is_dir() else []


def leftovers(found: Sequence[str], alive: Mapping[int, bool] | None = None) -> list[str]:
    """The names that belong to labs whose process is gone. alive: which pids live, instead of asking the kernel."""
    out = []
    for name in found:
        if ours := OURS.fullmatch(name):
            pid = int(ours[1])
            if not (alive[pid] if alive is not None else Path(f"/proc/{pid}").exists()):
                out.append(name)
    return out


def sweep() -> list[str]:
    """Removes what is left of labs whose process is gone, and returns the names of the namespaces."""
    dead = leftovers(names())
    for name in dead:
        _remove(name)
    for name in leftovers(os.listdir(tempfile.gettempdir())):
        shutil.rmtree(Path(tempfile.gettempdir(), name), ignore_errors=True)
    return dead


def _remove(name: str) -> None:
    end = time.monotonic() + 10.0
    while pids := do(["ip", "netns", "pids", name]).split():
        if time.monotonic() > end:
            raise RunError(
                f"process {pids[0]} in the namespace {name} cannot be ended: end it, then ip netns del {name}"
            )
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        time.sleep(0.02)
    do(["ip", "netns", "del", name])


def do(command: Sequence[str]) -> str:
    """Runs a short command and returns what it prints. Raises RunError if it fails."""
    # It has a session of its own, so that Ctrl-C in a terminal does not end it halfway.
    done = subprocess.run(command, capture_output=True, text=True, start_new_session=True)
    if done.returncode:
        said = (done.stderr.strip() or f"code {done.returncode}").splitlines()[-1]
        raise RunError(f"`{' '.join(command)}` failed: {said}")
    return done.stdout


@contextlib.contextmanager
def held() -> Iterator[None]:
    """A context in which SIGINT, SIGTERM and SIGHUP wait."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM, signal.SIGHUP))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


# ------------------------------------------------------------------ offloads
def offloads_off(interface: str) -> None:
    """Switches off segmentation and receive offloads of an interface in this process's namespace.

    It does what ethtool -K does, which may not be installed: ioctl SIOCETHTOOL with (command, value) of
    linux/ethtool.h.
    """
    siocethtool = 0x8946
    commands = {"tso": 0x1F, "gso": 0x24, "gro": 0x2C}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as file:
        for command in commands.values():
            value = ctypes.create_string_buffer(struct.pack("II", command, 0))
            request = struct.pack("16sP16x", interface.encode(), ctypes.addressof(value))
            fcntl.ioctl(file, siocethtool, request)


if __name__ == "__main__":
    offloads_off(sys.argv[1])
