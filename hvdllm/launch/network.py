"""The network interfaces of this host, found with the standard library alone, for doctor and for Gloo."""

from __future__ import annotations

import contextlib
import fcntl
import socket
import struct
from collections.abc import Mapping

from hvdllm.errors import UserError

SIOCGIFADDR, SIOCGIFFLAGS, UP = 0x8915, 0x8913, 1  # linux/sockios.h, linux/if.h


def addresses() -> dict[str, str]:
    """The IPv4 address of each interface that has one and is up, by its name."""
    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])  # a struct ifreq: 16 bytes of name, then the answer
            with contextlib.suppress(OSError):
                (flags,) = struct.unpack_from("h", fcntl.ioctl(probe.fileno(), SIOCGIFFLAGS, request), 16)
                if flags & UP:
                    found[name] = socket.inet_ntoa(fcntl.ioctl(probe.fileno(), SIOCGIFADDR, request)[20:24])
    return found


def towards(address: str) -> str | None:
    """The interface by which this host reaches `address`, according to its routes, or None. Nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((address, 9))
        except OSError:
            return None
        own = probe.getsockname()[0]
    return next((name for name, at in addresses().items() if at == own), None)


def address_of(interfaces: str) -> str:
    """The IPv4 address of the first of these interfaces (`eth0` or `eth0,eth1`). Raises UserError if it has none."""
    first = interfaces.split(",")[0]
    if not (address := addresses().get(first, "")):
        raise UserError(f"interface {first} is not up with an IPv4 address here: `hvdllm doctor` lists those that are")
    return address


def variables(interfaces: str | None) -> dict[str, str]:
    """The variables that keep all traffic on these interfaces (`eth0` or `eth0,eth1`). Gloo uses only the first."""
    if not interfaces:
        return {}
    return {
        "HOROVOD_GLOO_IFACE": interfaces.split(",")[0],
        "NCCL_SOCKET_IFNAME": interfaces,
        "OMPI_MCA_btl_tcp_if_include": interfaces,
        "OMPI_MCA_oob_tcp_if_include": interfaces,
    }


def for_gloo(env: Mapping[str, str], address: str) -> dict[str, str]:
    """The variable by which Gloo listens on the interface towards `address`, if `env` names none.

    By default Gloo binds to what the host's name resolves to, often 127.0.0.1, where other hosts cannot reach it.
    """
    interface = None if "HOROVOD_GLOO_IFACE" in env else towards(address)
    return {"HOROVOD_GLOO_IFACE": interface} if interface else {}
