"""Keeps a number of running domains of one template, spread over the ready nodes of a fleet.

It replaces the dead and those of lost nodes, deletes the surplus, and waits out lost connections and gateways that are
killed.

    python replicas.py --group web --count 6 --memory 64
"""

from __future__ import annotations

import argparse
import contextlib
import queue
import secrets
import time
from collections.abc import Callable
from typing import TypeVar

from google.protobuf import empty_pb2

from virtfleet.compute.v1 import domain_pb2
from virtfleet.fleet.v1 import node_pb2
from virtfleet_client import Fleet, Informer, VirtfleetError, connect
from virtfleet_client.informer import Change, ChangeKind

T = TypeVar("T")
GROUP_LABEL = "replicas.example/group"
LOOK_AGAIN_SECONDS = 30.0


class Controller:
    """Makes what is there what is wanted."""

    def __init__(
        self, fleet: Fleet, domains: Informer[domain_pb2.Domain], nodes: Informer[node_pb2.Node], count: int
    ) -> None:
        self.fleet, self.domains, self.nodes, self.count = fleet, domains, nodes, count
        self.template = domain_pb2.Domain()
        self.made: dict[str, float] = {}
        """When, by uid, until the informer knows them."""

    def reconcile(self) -> None:
        """Look at all, and change what has to be changed; the changes come back through the informers."""
        if not (self.domains.connected and self.nodes.connected):
            return  # what is known may be old; it looks again when both watches stand
        nodes = {name: self.nodes.by_name(name) for name in self.nodes.names()}
        load = {name: 0 for name, node in nodes.items() if node is not None and _takes_domains(node)}
        lost = {name for name, node in nodes.items() if node and node.status.state == node_pb2.NODE_STATE_LOST}
        alive = 0
        for name in self.domains.names():
            domain = self.domains.by_name(name)
            if domain is None:
                continue
            self.made.pop(domain.uid, None)
            node_name = name.partition("/domains/")[0]
            if node_name in load and (not domain.status.active or alive >= self.count):
                self.attempt(self.delete, domain)
            elif node_name in load:
                load[node_name] += 1
                alive += 1
            elif node_name not in lost:
                alive += 1  # it is not in reach, and most likely runs
        self.made = {uid: at for uid, at in self.made.items() if time.monotonic() - at < 60}
        for _ in range(self.count - alive - len(self.made) if load else 0):
            node_name = min(sorted(load), key=load.__getitem__)
            load[node_name] += 1
            self.attempt(self.create, node_name)

    def attempt(self, work: Callable[[T], None], subject: T) -> None:
        """Do one thing; what fails is tried again when something changes, or in half a minute."""
        try:
            work(subject)
        except VirtfleetError as error:
            print(f"{work.__name__}: {error}")

    def create(self, node_name: str) -> None:
        """Make one domain on a node and start it."""
        request = domain_pb2.CreateDomainRequest(
            parent=node_name,
            domain_id=f"replica-{secrets.token_hex(5)}",
            domain=self.template,
            start=domain_pb2.StartOptions(),
        )
        made = self.fleet.wait(self.fleet.domains.CreateDomain(request, timeout=30), domain_pb2.Domain)
        self.made[made.uid] = time.monotonic()

    def delete(self, domain: domain_pb2.Domain) -> None:
        """Take one domain down."""
        request = domain_pb2.DeleteDomainRequest(
            name=domain.name, expected_uid=domain.uid, stop=True, allow_missing=True
        )
        self.fleet.wait(self.fleet.domains.DeleteDomain(request, timeout=30), empty_pb2.Empty)


def _takes_domains(node: node_pb2.Node) -> bool:
    cordoned = node.spec.HasField("schedulable") and not node.spec.schedulable
    return node.status.state == node_pb2.NODE_STATE_READY and not cordoned


def main() -> None:
    """Run until Ctrl-C."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--group", default="web", help=f"the value of the label {GROUP_LABEL}")
    parser.add_argument("--count", type=int, default=3, help="how many domains are to run")
    parser.add_argument("--memory", type=int, default=64, help="MiB of each")
    options = parser.parse_args()
    wake: queue.Queue[None] = queue.Queue()
    ours = f'labels."{GROUP_LABEL}" = "{options.group}"'

    def changed(change: Change[domain_pb2.Domain] | Change[node_pb2.Node]) -> None:
        if change.kind is not ChangeKind.SYNCED:
            wake.put(None)

    with connect() as fleet:
        domains, nodes = Informer(fleet, domain_pb2.Domain, filter_=ours), Informer(fleet, node_pb2.Node)
        domains.handle(changed)
        nodes.handle(changed)
        with domains, nodes:
            domains.wait_synced()
            nodes.wait_synced()
            controller = Controller(fleet, domains, nodes, options.count)
            controller.template.labels[GROUP_LABEL] = options.group
            controller.template.spec.memory.maximum_bytes = options.memory << 20
            while True:
                controller.reconcile()
                try:
                    wake.get(timeout=LOOK_AGAIN_SECONDS)
                    while True:
                        wake.get_nowait()
                except queue.Empty:
                    pass


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
