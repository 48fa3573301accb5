"""The network of a development fleet: one network namespace a node, joined to the caller's by a veth pair.

Everything made here carries the fleet's tag in its name, so that it is found again after a crash, and only it.
"""

from __future__ import annotations

import ipaddress
import json
import secrets
import subprocess
from dataclasses import dataclass
from pathlib import Path

LARGEST_RANGE = "10.192.0.0/10"
"""Where a fleet takes its range from if none is given."""


def run(*command: str, check: bool = True) -> str:
    """Run a command of the system and return what it prints.

    Raises:
        RuntimeError: It fails; the text is what it said.
    """
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    if check and done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


@dataclass(frozen=True, slots=True)
class NodeNetwork:
    """Is the namespace of one node and the link to it.

    Attributes:
        namespace: Its name (`ip netns`).
        outer_link: The end of the veth pair in the caller's namespace.
        outer_address: The address there: where the node reaches the gateway.
        address: The address inside: where the gateway reaches the node.
        prefix_length: Of both.
    """

    namespace: str
    outer_link: str
    outer_address: str
    address: str
    prefix_length: int

    @classmethod
    def plan(cls, tag: str, index: int, address_range: str) -> NodeNetwork:
        """Return the names and addresses of node number `index`, from 1, without making anything.

        Raises:
            ValueError: The range has no room for it.
        """
        network = ipaddress.ip_network(address_range)
        first = int(network.network_address) + 4 * index
        if first + 3 > int(network.broadcast_address):
            raise ValueError(f"{address_range} has no room for node {index}: each takes four addresses")
        return cls(
            namespace=f"virtfleet-{tag}-n{index}",
            # 15 characters at most (IFNAMSIZ).
            outer_link=f"vf{tag}n{index}",
            outer_address=str(ipaddress.ip_address(first + 1)),
            address=str(ipaddress.ip_address(first + 2)),
            prefix_length=30,
        )

    def make(self) -> None:
        """Make namespace and link.

        Raises:
            RuntimeError: The kernel refuses, or something of that name exists.
        """
        run("ip", "netns", "add", self.namespace)
        inside = ("ip", "-n", self.namespace)
        run("ip", "link", "add", self.outer_link, "type", "veth", "peer", "name", "uplink", "netns", self.namespace)
        run("ip", "address", "add", f"{self.outer_address}/{self.prefix_length}", "dev", self.outer_link)
        run("ip", "link", "set", self.outer_link, "up")
        run(*inside, "address", "add", f"{self.address}/{self.prefix_length}", "dev", "uplink")
        run(*inside, "link", "set", "lo", "up")
        run(*inside, "link", "set", "uplink", "up")
        run(*inside, "route", "add", "default", "via", self.outer_address)

    def remove(self) -> None:
        """Remove both; succeeds if they are gone. The kernel ends the links inside with the namespace."""
        # The link first: the kernel takes a namespace down in the background, and its links at any moment.
        if self.outer_link in links():
            run("ip", "link", "delete", self.outer_link)
        if self.namespace in namespaces():
            run("ip", "netns", "delete", self.namespace)

    def enter(self, *command: str) -> list[str]:
        """Return the argument list that runs a command inside, in the caller's mount namespace.

        `ip netns exec` would hide the cgroups.
        """
        return ["nsenter", f"--net=/run/netns/{self.namespace}", "--", *command]


def free_range(node_count: int) -> str:
    """Return a range for a fleet that no address and no route of this namespace touches; chance decides which.

    Raises:
        RuntimeError: There is none.
    """
    whole = ipaddress.ip_network(LARGEST_RANGE)
    # Four addresses a node, and the first four stay free.
    prefix_length = 32 - (4 * (node_count + 1) - 1).bit_length()
    size = 2 ** (32 - prefix_length)
    taken = [ipaddress.ip_network(text) for text in _routes()]
    for _ in range(1000):
        first = int(whole.network_address) + size * secrets.randbelow(whole.num_addresses // size)
        candidate = ipaddress.ip_network((first, prefix_length))
        if not any(candidate.overlaps(other) for other in taken):
            return str(candidate)
    raise RuntimeError(f"no free range of addresses in {LARGEST_RANGE}; give one by RANGE=")


def _routes() -> list[str]:
    routes = json.loads(run("ip", "-j", "-4", "route", "show", "table", "all") or "[]")
    return [route["dst"] for route in routes if route["dst"] != "default"]


def namespaces() -> set[str]:
    """Return the names of all network namespaces."""
    folder = Path("/run/netns")
    return {entry.name for entry in folder.iterdir()} if folder.is_dir() else set()


def links() -> set[str]:
    """Return the names of all links of the caller's namespace."""
    return {link["ifname"] for link in json.loads(run("ip", "-j", "link", "show"))}
