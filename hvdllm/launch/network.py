"""The network interfaces of this host, found with the standard library alone, for doctor and for Gloo."""

from __future__ import annotations

import contextlib
import fcntl
import socket
import struct

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
