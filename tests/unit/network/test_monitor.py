"""The few bytes of a notification that are looked at."""

from __future__ import annotations

import asyncio
import struct

from hypothesis import given
from hypothesis import strategies as st

from virtfleet_network.backends.bridge.monitor import LinkNotice, Monitor, link_notice, messages, netconf_index


def attribute(kind: int, value: bytes) -> bytes:
    return struct.pack("=HH", len(value) + 4, kind) + value + b"\0" * (-len(value) % 4)


def link(name: str, *, family: int = 0, index: int = 7, flags: int = 1, master: int = 0, mtu: int = 1500) -> bytes:
    body = struct.pack("=BxHiII", family, 1, index, flags, 0) + attribute(3, name.encode() + b"\0")
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


def never(_index: int) -> bool:
    return False


async def test_of_a_link_the_last_notice_counts() -> None:
    changes: list[bool] = []
    monitor = Monitor(lambda: changes.append(True), lambda notice: notice.exists and notice.master == 0, never)
    steps = [link("vp-1", flags=flags, master=master) for flags, master in ((0, 0), (1, 9))]
    for step in steps:
        monitor.note(16, step)
    await asyncio.sleep(0.2)
    assert not changes, "it was right at the end"
    for step in reversed(steps):
        monitor.note(16, step)
    await asyncio.sleep(0.2)
    assert changes == [True]


async def test_of_a_name_the_last_link_counts() -> None:
    """One that is made again has another number."""
    changes: list[bool] = []
    monitor = Monitor(lambda: changes.append(True), lambda notice: not notice.exists, never)
    monitor.note(16, link("vp-1"))
    monitor.note(17, link("vp-1"))
    monitor.note(16, link("vp-1", index=8))
    await asyncio.sleep(0.2)
    assert not changes
    monitor.note(16, link("vp-1", index=8))
    monitor.note(17, link("vp-1", index=8))
    await asyncio.sleep(0.2)
    assert changes == [True]


async def test_notices_about_a_port_of_a_bridge_take_no_other_s_place() -> None:
    changes: list[bool] = []
    monitor = Monitor(lambda: changes.append(True), lambda notice: notice.name == "vp-1", never)
    monitor.note(16, link("vp-1"))
    monitor.note(16, link("other", family=7))
    monitor.note(16, b"short")
    await asyncio.sleep(0.2)
    assert changes == [True]


def netconf(index: int) -> bytes:
    return struct.pack("=Bxxx", 2) + attribute(2, struct.pack("=i", 1)) + attribute(1, struct.pack("=i", index))


def test_of_what_is_said_of_settings_that_of_all_links_counts() -> None:
    """A tap that is made is told of as well, and a repair costs more than the tap."""
    assert [netconf_index(netconf(index)) for index in (-1, -2, 7)] == [-1, -2, 7]
    assert netconf_index(b"") is None
    monitor = Monitor(lambda: None, lambda _: False, lambda index: index == 7)
    judged = {
        "all": monitor.judge_routes(message(80, netconf(-1))),
        "a tap": monitor.judge_routes(message(80, netconf(9))),
        "the address of a bridge": monitor.judge_routes(message(21, struct.pack("=BBBBI", 2, 24, 0, 0, 7))),
        "that of a tap": monitor.judge_routes(message(21, struct.pack("=BBBBI", 10, 64, 0, 253, 9))),
    }
    assert judged == {"all": True, "a tap": False, "the address of a bridge": True, "that of a tap": False}


@given(st.binary(max_size=200))
def test_garbage_ends_and_never_raises(data: bytes) -> None:
    for kind, payload in messages(data):
        link_notice(kind, payload)
        netconf_index(payload)
    link_notice(16, data)
    netconf_index(data)
