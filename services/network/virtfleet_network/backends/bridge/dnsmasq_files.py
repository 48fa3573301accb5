"""What dnsmasq reads: its configuration, the guests that DHCP knows, and names for DNS, as text made from a plan.

dnsmasq reads the two lists of hosts again on SIGHUP; a change of the configuration needs a new process.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path

from virtfleet.network.v1 import network_pb2
from virtfleet_network.backends.api import NetworkPlan

__all__ = ["DaemonFiles", "daemon_files", "is_needed"]

DEFAULT_LEASE_SECONDS = 3600
_DEFAULT_MTU_BYTES = 1500
_LEASES_LIMIT = 65536


@dataclass(frozen=True, slots=True)
class DaemonFiles:
    """Is what stands in the files."""

    configuration: str
    dhcp_hosts: str
    dns_hosts: str


def serves_dns(spec: network_pb2.NetworkSpec) -> bool:
    """Tell whether the node answers name queries in the network."""
    return bool(spec.subnets) and (not spec.dns.HasField("enabled") or spec.dns.enabled)


def announces(subnet: network_pb2.Subnet) -> bool:
    """Tell whether the node announces itself as the router of a subnet."""
    wanted = not subnet.router_advertisement.HasField("enabled") or subnet.router_advertisement.enabled
    return ":" in subnet.prefix and wanted


def is_needed(spec: network_pb2.NetworkSpec) -> bool:
    """Tell whether a network needs dnsmasq at all."""
    return serves_dns(spec) or any(subnet.HasField("dhcp") or announces(subnet) for subnet in spec.subnets.values())


def daemon_files(plan: NetworkPlan, directory: Path) -> DaemonFiles:
    """Return the files for a plan; `directory` is where they will lie."""
    return DaemonFiles(
        "\n".join(_configuration(plan, directory)) + "\n",
        "".join(f"{line}\n" for line in _dhcp_hosts(plan)),
        "".join(f"{line}\n" for line in _dns_hosts(plan.spec)),
    )


def _configuration(plan: NetworkPlan, directory: Path) -> Iterator[str]:
    spec = plan.spec
    yield "# Written by virtfleet; changes are overwritten."
    # It starts under its own user and with its few rights already; there is nothing to change to.
    yield from ("user=", "group=", f"pid-file={directory}/var/pid", "log-facility=-")
    yield from ("no-resolv", "no-hosts", "domain-needed", "bogus-priv")
    yield from ("bind-interfaces", f"interface={spec.bridge_name}", "except-interface=lo")
    if spec.domain_name:
        yield from (f"domain={spec.domain_name}", f"local=/{spec.domain_name}/", "expand-hosts")
    yield from _dns(spec, directory)
    yield from _dhcp(plan, directory)


def _dns(spec: network_pb2.NetworkSpec, directory: Path) -> Iterator[str]:
    if not serves_dns(spec):
        yield "port=0"
        return
    yield f"addn-hosts={directory}/dns-hosts"
    for forwarder in spec.dns.forwarders:
        domain = f"/{forwarder.domain_name}/" if forwarder.domain_name else ""
        port = f"#{forwarder.port}" if forwarder.port else ""
        yield f"server={domain}{forwarder.address}{port}"
    for _, text in sorted(spec.dns.texts.items()):
        yield f'txt-record={text.record_name},"{text.text}"'
    for _, service in sorted(spec.dns.services.items()):
        domain = service.domain_name or spec.domain_name
        name = f"_{service.service}._{service.protocol}" + (f".{domain}" if domain else "")
        target = f",{service.target},{service.port},{service.priority},{service.weight}" if service.target else ""
        yield f"srv-host={name}{target}"


def _dhcp(plan: NetworkPlan, directory: Path) -> Iterator[str]:
    spec = plan.spec
    served = [(ipaddress.ip_network(subnet.prefix), subnet) for _, subnet in sorted(spec.subnets.items())]
    isolated = spec.WhichOneof("forward") == "isolated"
    if any(announces(subnet) for _, subnet in served):
        yield "enable-ra"
        yield "quiet-ra"
        # An isolated network has a router that leads nowhere: lifetime 0, so that guests do not take it.
        mtu = f"mtu:{spec.mtu_bytes}," if spec.mtu_bytes != _DEFAULT_MTU_BYTES else ""
        if isolated or mtu:
            yield f"ra-param={spec.bridge_name},{mtu}0,{0 if isolated else 1800}"
    for prefix, subnet in served:
        yield from _dhcp_subnet(prefix, subnet)
    if not any(subnet.HasField("dhcp") for _, subnet in served):
        return
    # No ping before an offer: it takes 3 s, and our own records say what is taken.
    yield from ("dhcp-authoritative", "dhcp-no-override", "no-ping", "quiet-dhcp", "quiet-dhcp6")
    # Names by which machines look for a proxy or a tunnel: no guest takes them and so the traffic of the others.
    for name in ("wpad", "isatap"):
        yield f"dhcp-name-match=set:claimed,{name}"
    yield "dhcp-ignore-names=tag:claimed"
    yield f"dhcp-hostsfile={directory}/dhcp-hosts"
    yield f"dhcp-leasefile={directory}/var/leases"
    # Its own limit is 1,000; what counts is the room in the ranges.
    yield f"dhcp-lease-max={_LEASES_LIMIT}"
    if isolated:
        yield "dhcp-option=3"
    if spec.mtu_bytes != _DEFAULT_MTU_BYTES:
        yield f"dhcp-option=26,{spec.mtu_bytes}"


def _dhcp_subnet(prefix: IPv4Network | IPv6Network, subnet: network_pb2.Subnet) -> Iterator[str]:
    if not subnet.HasField("dhcp"):
        if announces(subnet):
            yield f"dhcp-range={prefix.network_address},ra-only,{prefix.prefixlen}"
        return
    lease = subnet.dhcp.lease_duration.seconds or DEFAULT_LEASE_SECONDS
    length = prefix.prefixlen if prefix.version == 6 else prefix.netmask
    for item in subnet.dhcp.ranges:
        yield f"dhcp-range={item.first},{item.last},{length},{lease}"
    if not subnet.dhcp.ranges:
        yield f"dhcp-range={prefix.network_address},static,{length},{lease}"
    if subnet.dhcp.HasField("bootp") and subnet.dhcp.bootp.file_name:
        server = f",,{subnet.dhcp.bootp.server_address}" if subnet.dhcp.bootp.server_address else ""
        yield f"dhcp-boot={subnet.dhcp.bootp.file_name}{server}"


def _dhcp_hosts(plan: NetworkPlan) -> Iterator[str]:
    for host in sorted(plan.hosts, key=lambda host: (host.mac_address, host.addresses)):
        addresses = [f"[{address}]" if ":" in address else address for address in host.addresses]
        # By its final dot a name is a name: dnsmasq takes `ignore` for the wish to give that guest nothing, `infinite`
        # and `12h` for the time of its lease.
        yield ",".join([host.mac_address, *addresses, *([f"{host.hostname}."] if host.hostname else [])])


def _dns_hosts(spec: network_pb2.NetworkSpec) -> Iterator[str]:
    for _, host in sorted(spec.dns.hosts.items()):
        yield f"{host.address} {' '.join(host.hostnames)}"
