"""Notices what others do to links, addresses, forwarding and packet filter rules, from the kernel's own notifications.

The notifications are hints: each is judged by a few bytes, and what matters makes the back end look at the whole. Of a
link the last one counts, a moment later: one that is being made is told of step by step, and is right at the end.
Lost ones (the kernel says so) count as a change of everything.
"""

from __future__ import annotations

import asyncio
import socket
import struct
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

__all__ = ["LinkNotice", "Monitor", "link_notice", "messages", "netconf_index"]

_NETLINK_NETFILTER = 12
_SOL_NETLINK, _NETLINK_ADD_MEMBERSHIP = 270, 1
_RTNLGRP_LINK, _RTNLGRP_IPV4_IFADDR, _RTNLGRP_IPV6_IFADDR = 1, 5, 9
_RTNLGRP_IPV4_NETCONF, _RTNLGRP_IPV6_NETCONF, _NFNLGRP_NFTABLES = 24, 25, 7
_RTM_NEWLINK, _RTM_DELLINK, _RTM_DELADDR, _RTM_NEWNETCONF = 16, 17, 21, 80
_IFLA_IFNAME, _IFLA_MTU, _IFLA_MASTER = 3, 4, 10
_IFF_UP = 1
_READ_BYTES = 65536
_GATHER_SECONDS = 0.1

_HEADER = struct.Struct("=IHHII")
_IFINFO = struct.Struct("=BxHiII")
_IFADDR = struct.Struct("=BxxxI")
_NETCONF_BYTES = 4
_NETCONFA_IFINDEX, _NETCONF_ALL = 1, -1
_ATTRIBUTE = struct.Struct("=HH")


def messages(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Cut a datagram into messages: (type, payload)."""
    at = 0
    while at + _HEADER.size <= len(data):
        length, kind, _, _, _ = _HEADER.unpack_from(data, at)
        if length < _HEADER.size:
            return
        yield kind, data[at + _HEADER.size : at + length]
        at += (length + 3) & ~3


@dataclass(frozen=True, slots=True)
class LinkNotice:
    """Is what a notification says about a link."""

    name: str
    exists: bool
    up: bool
    master: int
    mtu_bytes: int


def link_notice(kind: int, payload: bytes) -> LinkNotice | None:
    """Read a notification about a link.

    None: it is about something else, or about a link as the port of a bridge alone.
    """
    if kind not in (_RTM_NEWLINK, _RTM_DELLINK) or len(payload) < _IFINFO.size:
        return None
    family, _, _, flags, _ = _IFINFO.unpack_from(payload)
    if family:
        return None
    name, master, mtu, at = "", 0, 0, _IFINFO.size
    while at + _ATTRIBUTE.size <= len(payload):
        length, attribute = _ATTRIBUTE.unpack_from(payload, at)
        if length < _ATTRIBUTE.size:
            break
        value = payload[at + _ATTRIBUTE.size : at + length]
        if attribute == _IFLA_IFNAME:
            name = value.rstrip(b"\0").decode(errors="replace")
        elif attribute == _IFLA_MASTER:
            master = int.from_bytes(value, sys.byteorder)
        elif attribute == _IFLA_MTU:
            mtu = int.from_bytes(value, sys.byteorder)
        at += (length + 3) & ~3
    return LinkNotice(name, kind == _RTM_NEWLINK, bool(flags & _IFF_UP), master, mtu)


def netconf_index(payload: bytes) -> int | None:
    """Return of which link a notification tells that its settings have changed: -1 of all, -2 of what is made next.

    Each link that is made is told of; forwarding is switched for all.
    """
    at = _NETCONF_BYTES
    while at + _ATTRIBUTE.size <= len(payload):
        length, attribute = _ATTRIBUTE.unpack_from(payload, at)
        if length < _ATTRIBUTE.size:
            break
        if attribute == _NETCONFA_IFINDEX:
            return int.from_bytes(payload[at + _ATTRIBUTE.size : at + length], sys.byteorder, signed=True)
        at += (length + 3) & ~3
    return None


class Monitor:
    """Listens, and says when something may have to be mended.

    Args:
        changed: Is called then, on the loop.
        matters: Says whether what a notification tells about a link is other than it should be.
        lost_address_matters: Says whether the link of that index should have kept its addresses.
    """

    def __init__(
        self,
        changed: Callable[[], None],
        matters: Callable[[LinkNotice], bool],
        lost_address_matters: Callable[[int], bool],
    ) -> None:
        self._changed = changed
        self._matters = matters
        self._lost_address_matters = lost_address_matters
        self._sockets: list[socket.socket] = []
        self._told: dict[int, tuple[int, bytes]] = {}
        self._judgement: asyncio.TimerHandle | None = None

    def open(self) -> None:
        """Begin to listen on the running loop; everything after this call is seen."""
        loop = asyncio.get_running_loop()
        route_groups = (
            _RTNLGRP_LINK,
            _RTNLGRP_IPV4_IFADDR,
            _RTNLGRP_IPV6_IFADDR,
            _RTNLGRP_IPV4_NETCONF,
            _RTNLGRP_IPV6_NETCONF,
        )
        for protocol, groups, judge in (
            (socket.NETLINK_ROUTE, route_groups, self.judge_routes),
            (_NETLINK_NETFILTER, (_NFNLGRP_NFTABLES,), None),
        ):
            line = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, protocol)
            self._sockets.append(line)
            line.setblocking(False)
            line.bind((0, 0))
            for group in groups:
                line.setsockopt(_SOL_NETLINK, _NETLINK_ADD_MEMBERSHIP, group)
            loop.add_reader(line.fileno(), self._read, line, judge)

    def close(self) -> None:
        """End listening; may be repeated."""
        for line in self._sockets:
            asyncio.get_running_loop().remove_reader(line.fileno())
            line.close()
        self._sockets.clear()
        if self._judgement is not None:
            self._judgement.cancel()
            self._judgement = None

    def _read(self, line: socket.socket, judge: Callable[[bytes], bool] | None) -> None:
        while True:
            try:
                data = line.recv(_READ_BYTES)
            except BlockingIOError:
                return
            except OSError:
                # ENOBUFS: some were lost.
                self._changed()
                return
            if judge is None or judge(data):
                self._changed()

    def judge_routes(self, data: bytes) -> bool:
        """Read notifications about links, addresses and forwarding; returns whether something may have to be mended."""
        for kind, payload in messages(data):
            if kind in (_RTM_NEWLINK, _RTM_DELLINK):
                self.note(kind, payload)
            elif kind == _RTM_DELADDR:
                # Each tap that goes loses an address of its own too.
                if len(payload) < _IFADDR.size or self._lost_address_matters(_IFADDR.unpack_from(payload)[1]):
                    return True
            elif kind == _RTM_NEWNETCONF and netconf_index(payload) == _NETCONF_ALL:
                return True
        return False

    def note(self, kind: int, payload: bytes) -> None:
        """Take a notification about a link; it is read in a moment, unless a later one takes its place.

        A tap that comes and goes is told of some thirty times.
        """
        if len(payload) < _IFINFO.size:
            return
        family, _, index, _, _ = _IFINFO.unpack_from(payload)
        if family:
            return
        # Last in the order too: a link of another number may have the name by then.
        self._told.pop(index, None)
        self._told[index] = kind, payload
        if self._judgement is None:
            self._judgement = asyncio.get_running_loop().call_later(_GATHER_SECONDS, self._judge)

    def _judge(self) -> None:
        self._judgement = None
        told, self._told = self._told, {}
        notices = [link_notice(kind, payload) for kind, payload in told.values()]
        last = {notice.name: notice for notice in notices if notice is not None}
        if any(self._matters(notice) for notice in last.values()):
            self._changed()
