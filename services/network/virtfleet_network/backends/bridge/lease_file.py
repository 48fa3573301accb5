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
        if len(fields) < 5 or not fields[0].isdigit():
            continue
        expire, identity, address, hostname, client = fields[:5]
        try:
            canonical = ipaddress.ip_address(address)
        except ValueError:
            continue
        client_id = client.lower() if client != "*" and _HEX_OCTETS.fullmatch(client) else ""
        found[str(canonical)] = LeaseRecord(
            address=str(canonical),
            mac_address=_mac(identity, client_id, version=canonical.version),
            hostname=hostname if hostname != "*" else "",
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
