"""One message to the kernel that changes a link: what stands between a guest and its start.

`pyroute2` does the same in a few milliseconds; a start waits for this.
"""

from __future__ import annotations

import os
import socket
import struct

_NETLINK_ROUTE = 0
_RTM_NEWLINK = 16
_REQUEST_AND_ACKNOWLEDGE = 0x0001 | 0x0004
_ERROR = 2
_IFF_UP = 1
_IFLA_MTU, _IFLA_MASTER, _IFLA_IFALIAS = 4, 10, 20
_HEADER = struct.Struct("=IHHII")
_INTERFACE = struct.Struct("=BxHiII")
_ATTRIBUTE = struct.Struct("=HH")
_TIMEOUT_SECONDS = 10.0


def change_link(index: int, *, alias: str, mtu_bytes: int, master_index: int, up: bool) -> None:
    """Set alias, MTU, master and state of a link, all at once. Synchronous: the kernel answers within the call.

    Raises:
        OSError: The kernel refuses.
    """
    body = _INTERFACE.pack(socket.AF_UNSPEC, 0, index, _IFF_UP if up else 0, _IFF_UP)
    body += _attribute(_IFLA_MTU, struct.pack("=I", mtu_bytes))
    body += _attribute(_IFLA_MASTER, struct.pack("=I", master_index))
    body += _attribute(_IFLA_IFALIAS, alias.encode())
    message = _HEADER.pack(_HEADER.size + len(body), _RTM_NEWLINK, _REQUEST_AND_ACKNOWLEDGE, 1, 0) + body
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_ROUTE) as kernel:
        kernel.settimeout(_TIMEOUT_SECONDS)
        kernel.send(message)
        answer = kernel.recv(65536)
    _, kind, _, _, _ = _HEADER.unpack_from(answer)
    if kind != _ERROR:
        raise OSError(0, f"the kernel answers a change of link {index} with a message of kind {kind}")
    (code,) = struct.unpack_from("=i", answer, _HEADER.size)
    if code:
        raise OSError(-code, os.strerror(-code))


def _attribute(kind: int, value: bytes) -> bytes:
    length = _ATTRIBUTE.size + len(value)
    return _ATTRIBUTE.pack(length, kind) + value + bytes(-length % 4)
