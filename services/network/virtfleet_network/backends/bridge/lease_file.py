"""The file in which dnsmasq keeps its leases.

It is state, not events: it is read whole, and what differs from before is what happened.

dnsmasq empties the file and writes it anew, so for an instant it is empty or ends in the middle of a line.
"""

from __future__ import annotations

import ipaddress
import re

from virtfleet_network.backends.api import LeaseRecord

__all__ = ["is_complete", "parse"]

_MAC = re.compile(r"[0-9a-f]{2}(?::[0-9a-f]{2}){5}", re.IGNORECASE)
_HEX_OCTETS = re.compile(r"[0-9a-f]{2}(?::[0-9a-f]{2})*", re.IGNORECASE)
_EXPIRY = re.compile(r"[0-9]{1,12}")
_LAST_SECOND = 253_402_300_799
"""The end of the year 9999: no time of the API is later."""

_HOSTNAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,252}")
_CLIENT_ID_LIMIT_CHARACTERS = 3 * 255
_DUID_WITH_ETHERNET = ("00:01:00:01:", "00:03:00:01:")
"""DUID-LLT and DUID-LL of hardware type Ethernet; the MAC is their end."""


def is_complete(text: str) -> bool:
    """Tell whether the file was not read in the middle of a write, as far as it shows: an empty one may be either."""
    return text.endswith("\n")


def parse(text: str) -> tuple[LeaseRecord, ...]:
    """Read all leases; lines that are no leases (the server's own DUID) are left out."""
    found = {}
    for line in text.splitlines():
        fields = line.split()
        # What follows is a guest's word, or that of whoever has taken dnsmasq over.
        if len(fields) < 5 or not _EXPIRY.fullmatch(fields[0]) or int(fields[0]) > _LAST_SECOND or "%" in fields[2]:
            continue
        expire, identity, address, hostname, client = fields[:5]
        try:
            canonical = ipaddress.ip_address(address)
        except ValueError:
            continue
        known = len(client) <= _CLIENT_ID_LIMIT_CHARACTERS and _HEX_OCTETS.fullmatch(client)
        client_id = client.lower() if known else ""
        found[str(canonical)] = LeaseRecord(
            address=str(canonical),
            mac_address=_mac(identity, client_id, version=canonical.version),
            hostname=hostname if _HOSTNAME.fullmatch(hostname) else "",
            client_id=client_id,
            expire_seconds=int(expire),
        )
    return tuple(found[address] for address in sorted(found))


def _mac(identity: str, client_id: str, *, version: int) -> str:
    if version == 4:
        # `06-52:54:…` for hardware types other than Ethernet.
        last = identity.rpartition("-")[2].lower()
        return last if _MAC.fullmatch(last) else ""
    if client_id.startswith(_DUID_WITH_ETHERNET):
        last = client_id[-17:]
        return last if _MAC.fullmatch(last) else ""
    return ""
