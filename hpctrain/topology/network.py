"""By which of its network interfaces this host reaches another; nothing is sent."""

from __future__ import annotations

import socket

import psutil

#: Any port will do: a datagram socket only looks up the route.
_DISCARD_PORT = 9


def interface_towards(host: str, family: int = socket.AF_UNSPEC) -> str | None:
    """Its name, or None where no interface has the address that the route begins at. OSError where there is no way."""
    kind = socket.SOCK_DGRAM
    family, kind, protocol, _, address = socket.getaddrinfo(host, _DISCARD_PORT, family, kind)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(address)
        mine = probe.getsockname()[0]
    for name, addresses in psutil.net_if_addrs().items():
        if any(entry.address.partition("%")[0] == mine for entry in addresses):
            return name
    return None
