"""Ports for servers that a test starts later: of a range from which the kernel gives none to anybody who connects.

A port that the kernel has given and that was let go again may be, when the server comes, the near end of somebody's
connection; even of one to that very port, by a client that tries again and again until the server is there.
"""

from __future__ import annotations

import random
import socket
from pathlib import Path

_FIRST = 10_240
_given: set[int] = set()


def free_port() -> int:
    """Return a port on which nothing listens, another one each time."""
    last = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0]) - 1
    while True:
        port = random.randint(_FIRST, last)  # processes side by side must not try the same ones
        if port in _given:
            continue
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        _given.add(port)
        return port
