"""The lease file of dnsmasq, and what has happened between two looks at it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from virtfleet_network.backends.api import LeaseRecord
from virtfleet_network.backends.bridge import lease_file
from virtfleet_network.leases import compare

TEXT = """\
1795559732 9e:5b:a0:5f:bf:ef 10.4.4.11 web 01:9e:5b:a0:5f:bf:ef
0 52:54:00:AA:BB:CC 10.4.4.12 * *
duid 00:01:00:01:2c:1f:3b:5a:52:54:00:12:34:56
1795559800 12345 fd00:0::10 six 00:01:00:01:2c:1f:3b:5a:52:54:00:aa:bb:cd
1795559801 12346 fd00::11 * 00:04:11:22
"""


def test_parse() -> None:
    found = {item.address: item for item in lease_file.parse(TEXT)}
    assert found["10.4.4.11"] == LeaseRecord(
        "10.4.4.11", "9e:5b:a0:5f:bf:ef", "web", "01:9e:5b:a0:5f:bf:ef", 1795559732
    )
    assert found["10.4.4.12"] == LeaseRecord("10.4.4.12", "52:54:00:aa:bb:cc", "", "", 0)
    assert found["fd00::10"].mac_address == "52:54:00:aa:bb:cd"
    assert found["fd00::11"].mac_address == ""
    assert len(found) == 4


@pytest.mark.parametrize("cut", range(0, len(TEXT), 7))
def test_a_file_cut_anywhere_never_raises(cut: int) -> None:
    lease_file.parse(TEXT[:cut])
    assert lease_file.is_complete(TEXT[:cut]) == TEXT[:cut].endswith("\n")


def test_hostile_lines_are_left_out() -> None:
    assert lease_file.parse("1 a b\n1 52:54:00:00:00:01 not-an-address x *\n-5 52:54:00:00:00:01 10.0.0.1 x *\n") == ()


HOSTILE = [
    "\u00b2 52:54:00:00:00:01 10.0.0.1 x *",
    "\u0663 52:54:00:00:00:01 10.0.0.1 x *",
    f"{'9' * 5000} 52:54:00:00:00:01 10.0.0.1 x *",
    f"{10**12 - 1} 52:54:00:00:00:01 10.0.0.1 x *",
    "0 52:54:00:00:00:01 fe80::1%../../etc x *",
]


@pytest.mark.parametrize("line", HOSTILE, ids=lambda line: ascii(line)[:20])
def test_a_line_that_no_dnsmasq_writes_costs_no_other(line: str) -> None:
    good = "1795559732 9e:5b:a0:5f:bf:ef 10.4.4.11 web *"
    assert [item.address for item in lease_file.parse(f"{line}\n{good}\n")] == ["10.4.4.11"]


@pytest.mark.parametrize("name", ["-rf", "a/b", "\u0441om", "x" * 254, "a\x00b", "<script>", "*", ".."])
def test_names_that_are_none_are_not_passed_on(name: str) -> None:
    [found] = lease_file.parse(f"0 9e:5b:a0:5f:bf:ef 10.4.4.11 {name} {'aa:' * 5000}aa\n")
    assert (found.hostname, found.client_id) == ("", "")


@given(st.text())
def test_any_text_is_leases_or_none(text: str) -> None:
    for item in lease_file.parse(text):
        assert 0 <= item.expire_seconds < 253_402_300_800
        assert len(item.hostname) <= 253


def record(address: str, mac: str = "52:54:00:00:00:01", expire: int = 1000) -> LeaseRecord:
    return LeaseRecord(address, mac, "", "", expire)


def test_compare() -> None:
    known = {item.address: item for item in (record("10.0.0.1"), record("10.0.0.2"), record("10.0.0.3"))}
    new = record("10.0.0.4")
    renewed = record("10.0.0.1", expire=2000)
    taken_over = record("10.0.0.2", mac="52:54:00:00:00:02")
    changes = compare(known, [renewed, taken_over, new], now_seconds=500)
    assert set(changes.added) == {new, taken_over}
    assert changes.renewed == (renewed,)
    assert set(changes.gone) == {"10.0.0.2", "10.0.0.3"}


def test_an_expired_lease_is_gone_although_it_stands_in_the_file() -> None:
    old = record("10.0.0.1", expire=100)
    assert compare({}, [old], now_seconds=200).added == ()
    assert compare({"10.0.0.1": old}, [old], now_seconds=200).gone == ("10.0.0.1",)
    forever = record("10.0.0.2", expire=0)
    assert compare({}, [forever], now_seconds=200).added == (forever,)
