"""The few bytes of a notification that are looked at."""

from __future__ import annotations

import struct

from hypothesis import given
from hypothesis import strategies as st

from virtfleet_network.backends.bridge.monitor import LinkNotice, link_notice, messages


def attribute(kind: int, value: bytes) -> bytes:
    return struct.pack("=HH", len(value) + 4, kind) + value + b"\0" * (-len(value) % 4)


def link(name: str, *, family: int = 0, flags: int = 1, master: int = 0, mtu: int = 1500) -> bytes:
    body = struct.pack("=BxHiII", family, 1, 7, flags, 0) + attribute(3, name.encode() + b"\0")
    body += attribute(4, mtu.to_bytes(4, "little"))
    return body + (attribute(10, master.to_bytes(4, "little")) if master else b"")


def message(kind: int, payload: bytes) -> bytes:
    data = struct.pack("=IHHII", 16 + len(payload), kind, 0, 0, 0) + payload
    return data + b"\0" * (-len(data) % 4)


def test_links_are_read() -> None:
    data = message(16, link("vp-1", master=9)) + message(17, link("br0", flags=0))
    found = [link_notice(kind, payload) for kind, payload in messages(data)]
    assert found == [LinkNotice("vp-1", True, True, 9, 1500), LinkNotice("br0", False, False, 0, 1500)]


def test_notices_about_ports_of_bridges_and_other_things_are_passed_over() -> None:
    assert link_notice(16, link("vp-1", family=7)) is None
    assert link_notice(21, b"") is None


@given(st.binary(max_size=200))
def test_garbage_ends_and_never_raises(data: bytes) -> None:
    for kind, payload in messages(data):
        link_notice(kind, payload)
    link_notice(16, data)
