"""The packet filter rules of all networks of a node, as text for `nft -f -`.

One table, replaced as a whole in one transaction.

What stands in the text is checked before it gets here (bridge names, canonical prefixes and addresses, numbers);
nothing is quoted.
"""

from __future__ import annotations

import ipaddress
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from virtfleet.network.v1 import network_pb2
from virtfleet_network.backends.api import NetworkPlan

__all__ = ["TABLE", "empty_ruleset", "normalised", "ruleset"]

TABLE = "inet virtfleet"

_REJECT = "reject with icmpx type admin-prohibited"
# Not for the world outside: what is sent to them stays in the network.
_LOCAL_IPV4 = "{ 224.0.0.0/24, 255.255.255.255 }"
_LOCAL_IPV6 = "ff00::/8"


@dataclass(frozen=True, slots=True)
class _Prefixes:
    ipv4: tuple[str, ...]
    ipv6: tuple[str, ...]

    @classmethod
    def of(cls, spec: network_pb2.NetworkSpec) -> _Prefixes:
        prefixes = [ipaddress.ip_network(subnet.prefix) for subnet in spec.subnets.values()]
        return cls(
            tuple(str(prefix) for prefix in sorted(item for item in prefixes if item.version == 4)),
            tuple(str(prefix) for prefix in sorted(item for item in prefixes if item.version == 6)),
        )

    def each(self, side: str) -> list[str]:
        """Return a match of this side of a packet (`saddr`, `daddr`) for each family that there is."""
        found = []
        if self.ipv4:
            found.append(f"ip {side} {_set(self.ipv4)}")
        if self.ipv6:
            found.append(f"ip6 {side} {_set(self.ipv6)}")
        return found


def _set(items: Sequence[str]) -> str:
    return items[0] if len(items) == 1 else "{ " + ", ".join(items) + " }"


def empty_ruleset() -> str:
    """Return the text that removes our table; right also when it is not there."""
    # The first line makes it if it is missing, so that the second never fails.
    return f"table {TABLE}\ndelete table {TABLE}\n"


def ruleset(plans: Sequence[NetworkPlan]) -> str:
    """Return the text that replaces our table by the rules of these networks.

    Networks do not reach each other through the node; only `open` ones have no rules. A packet from one of our
    bridges is judged by the chain `from_…` of its network, one to a bridge by `to_…`.
    """
    judged = [plan for plan in sorted(plans, key=lambda plan: plan.uid) if plan.spec.WhichOneof("forward") != "open"]
    if not judged:
        return empty_ruleset()
    bridges = "{ " + ", ".join(_quoted(plan.spec.bridge_name) for plan in judged) + " }"
    lines = [f"table {TABLE}", f"delete table {TABLE}", f"table {TABLE} {{"]
    for plan in judged:
        chain = plan.uid.replace("-", "")
        lines += [f"\tchain from_{chain} {{", *_indented(_from_rules(plan, bridges)), "\t}"]
        lines += [f"\tchain to_{chain} {{", *_indented(_to_rules(plan)), "\t}"]
    lines += ["\tchain forward {", "\t\ttype filter hook forward priority filter; policy accept;"]
    lines += [f"\t\tiifname {_quoted(p.spec.bridge_name)} jump from_{p.uid.replace('-', '')}" for p in judged]
    lines += [f"\t\toifname {_quoted(p.spec.bridge_name)} jump to_{p.uid.replace('-', '')}" for p in judged]
    lines += ["\t}", "\tchain input {", "\t\ttype filter hook input priority filter; policy accept;"]
    for plan in judged:
        bridge = _quoted(plan.spec.bridge_name)
        lines.append(f"\t\tiifname {bridge} udp dport {{ 53, 67, 547 }} accept")
        lines.append(f"\t\tiifname {bridge} tcp dport 53 accept")
    lines.append("\t}")
    masqueraded = [line for plan in judged for line in _source_rules(plan)]
    if masqueraded:
        lines += ["\tchain postrouting {", "\t\ttype nat hook postrouting priority srcnat; policy accept;"]
        lines += [*_indented(masqueraded), "\t}"]
    lines.append("}")
    return "\n".join(lines) + "\n"


def _indented(lines: Sequence[str]) -> list[str]:
    return [f"\t\t{line}" for line in lines]


def _quoted(interface: str) -> str:
    return f'"{interface}"'


def _way_out(spec: network_pb2.NetworkSpec) -> str:
    kind = spec.WhichOneof("forward")
    return spec.nat.interface_name if kind == "nat" else spec.routed.interface_name if kind == "routed" else ""


def _from_rules(plan: NetworkPlan, bridges: str) -> list[str]:
    spec = plan.spec
    lines = [f"oifname {_quoted(spec.bridge_name)} accept"]
    if spec.WhichOneof("forward") in ("nat", "routed"):
        lines.append(f"oifname {bridges} {_REJECT}")
        out = _way_out(spec)
        only = f"oifname {_quoted(out)} " if out else ""
        lines += [f"{only}{match} accept" for match in _Prefixes.of(spec).each("saddr")]
    lines.append(_REJECT)
    return lines


def _to_rules(plan: NetworkPlan) -> list[str]:
    spec = plan.spec
    kind = spec.WhichOneof("forward")
    lines = []
    if kind == "nat":
        lines.append("ct state established,related accept")
    elif kind == "routed":
        out = _way_out(spec)
        only = f"iifname {_quoted(out)} " if out else ""
        lines += [f"{only}{match} accept" for match in _Prefixes.of(spec).each("daddr")]
    lines.append(_REJECT)
    return lines


def _source_rules(plan: NetworkPlan) -> list[str]:
    spec = plan.spec
    if spec.WhichOneof("forward") != "nat":
        return []
    prefixes = _Prefixes.of(spec)
    out = f"oifname {_quoted(spec.nat.interface_name)} " if spec.nat.interface_name else ""
    lines = []
    for family, own, local in (("ip", prefixes.ipv4, _LOCAL_IPV4), ("ip6", prefixes.ipv6, _LOCAL_IPV6)):
        if not own:
            continue
        match = f"{out}{family} saddr {_set(own)} {family} daddr != {_set(own)}"
        lines.append(f"{family} saddr {_set(own)} {family} daddr {local} return")
        source, ports = _source(spec.nat, family), _ports(spec.nat)
        if ports:
            lines.append(f"{match} meta l4proto {{ tcp, udp }} {source or 'masquerade to '}{ports}")
        lines.append(f"{match} {source or 'masquerade'}")
    return lines


def _source(nat: network_pb2.NatForward, family: str) -> str:
    if not nat.HasField("addresses") or not nat.addresses.first:
        return ""
    first, last = (
        ipaddress.ip_address(nat.addresses.first),
        ipaddress.ip_address(nat.addresses.last or nat.addresses.first),
    )
    if (first.version == 4) != (family == "ip"):
        return ""
    return f"snat {family} to {first}" + (f"-{last}" if last != first else "")


def _ports(nat: network_pb2.NatForward) -> str:
    if not nat.HasField("ports") or not nat.ports.first:
        return ""
    return f":{nat.ports.first}-{nat.ports.last or 65535}"


def normalised(listing: str) -> list[Any]:
    """Return what `nft -j list table` says, without what differs between two equal tables.

    These are the handles and the version of nft.
    """

    def without_handles(value: object) -> object:
        if isinstance(value, dict):
            return {key: without_handles(item) for key, item in value.items() if key != "handle"}
        if isinstance(value, list):
            return [without_handles(item) for item in value]
        return value

    return [without_handles(item) for item in json.loads(listing)["nftables"] if "metainfo" not in item]
