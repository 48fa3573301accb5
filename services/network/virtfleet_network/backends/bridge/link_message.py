"""Single messages to the kernel about links: what every start and every end of a guest asks for.

`pyroute2` does the same with ten times the processor time, and a look at all links costs more with each guest.
"""

from __future__ import annotations

import errno
import os
import socket
import struct

__all__ = ["change_link", "delete_group", "delete_link", "find_link", "group_link"]

_RTM_NEWLINK, _RTM_DELLINK, _RTM_GETLINK = 16, 17, 18
_REQUEST, _ACKNOWLEDGE = 0x0001, 0x0004
_ERROR = 2
_IFF_UP = 1
_IFLA_IFNAME, _IFLA_MTU, _IFLA_MASTER, _IFLA_IFALIAS, _IFLA_GROUP = 3, 4, 10, 20, 27
_HEADER = struct.Struct("=IHHII")
_INTERFACE = struct.Struct("=BxHiII")
_ATTRIBUTE = struct.Struct("=HH")
_READ_BYTES = 65536
_TIMEOUT_SECONDS = 10.0


def find_link(name: str) -> tuple[int, str] | None:
    """Return index and alias of a link; None: there is none of that name.

    Raises:
        OSError: The kernel refuses.
    """
    try:
        payload = _ask(_RTM_GETLINK, _REQUEST, _link(0) + _attribute(_IFLA_IFNAME, name.encode() + b"\0"))
    except OSError as error:
        if error.errno == errno.ENODEV:
            return None
        raise
    _, _, index, _, _ = _INTERFACE.unpack_from(payload)
    at = _INTERFACE.size
    while at + _ATTRIBUTE.size <= len(payload):
        length, kind = _ATTRIBUTE.unpack_from(payload, at)
        if length < _ATTRIBUTE.size:
            break
        if kind == _IFLA_IFALIAS:
            return index, payload[at + _ATTRIBUTE.size : at + length].rstrip(b"\0").decode(errors="replace")
        at += (length + 3) & ~3
    return index, ""


def change_link(index: int, *, alias: str, mtu_bytes: int, master_index: int, up: bool) -> None:
    """Set alias, MTU, master and state of a link, all at once.

    Raises:
        OSError: The kernel refuses.
    """
    body = _INTERFACE.pack(socket.AF_UNSPEC, 0, index, _IFF_UP if up else 0, _IFF_UP)
    body += _number(_IFLA_MTU, mtu_bytes) + _number(_IFLA_MASTER, master_index)
    body += _attribute(_IFLA_IFALIAS, alias.encode())
    _ask(_RTM_NEWLINK, _REQUEST | _ACKNOWLEDGE, body)


def group_link(index: int, group: int) -> None:
    """Put a link into a group.

    Raises:
        OSError: The kernel refuses.
    """
    _ask(_RTM_NEWLINK, _REQUEST | _ACKNOWLEDGE, _link(index) + _number(_IFLA_GROUP, group))


def delete_link(index: int) -> None:
    """Remove a link.

    Raises:
        OSError: The kernel refuses; ENODEV: it is gone.
    """
    _ask(_RTM_DELLINK, _REQUEST | _ACKNOWLEDGE, _link(index))


def delete_group(group: int) -> None:
    """Remove all links of a group, for the price of one.

    Raises:
        OSError: The kernel refuses; ENODEV: there are none.
    """
    _ask(_RTM_DELLINK, _REQUEST | _ACKNOWLEDGE, _link(0) + _number(_IFLA_GROUP, group))


def _ask(kind: int, flags: int, body: bytes) -> bytes:
    """Send a message and return the body of the answer; empty: the kernel just says that it is done."""
    message = _HEADER.pack(_HEADER.size + len(body), kind, flags, 1, 0) + body
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE) as kernel:
        kernel.settimeout(_TIMEOUT_SECONDS)
        kernel.send(message)
        answer = kernel.recv(_READ_BYTES)
    length, answered, _, _, _ = _HEADER.unpack_from(answer)
    if answered != _ERROR:
        return answer[_HEADER.size : length]
    (code,) = struct.unpack_from("=i", answer, _HEADER.size)
    if code:
        raise OSError(-code, os.strerror(-code))
    return b""


def _link(index: int) -> bytes:
    return _INTERFACE.pack(socket.AF_UNSPEC, 0, index, 0, 0)


def _number(kind: int, value: int) -> bytes:
    return _attribute(kind, struct.pack("=I", value))


def _attribute(kind: int, value: bytes) -> bytes:
    length = _ATTRIBUTE.size + len(value)
    return _ATTRIBUTE.pack(length, kind) + value + bytes(-length % 4)
