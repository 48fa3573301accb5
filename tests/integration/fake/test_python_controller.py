"""The Python example controller over a fleet that breaks."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from google.protobuf import duration_pb2

from tests.integration.fake.fleet import Fake, running
from tools.paths import ROOT
from virtfleet.compute.v1 import domain_pb2
from virtfleet.fake.v1 import fake_pb2

PROGRAM = ROOT / "clients/python/examples/replicas.py"


@contextmanager
def controller(fake: Fake, count: int) -> Iterator[None]:
    environment = {
        **os.environ,
        "VIRTFLEET_ADDRESS": fake.ready["address"],
        "VIRTFLEET_CA_FILE": fake.ready["ca_file"],
        "VIRTFLEET_CERT_FILE": fake.ready["cert_file"],
        "VIRTFLEET_KEY_FILE": fake.ready["key_file"],
    }
    process = subprocess.Popen([sys.executable, PROGRAM, "--count", str(count)], env=environment)
    try:
        yield
        assert process.poll() is None, "it has ended by itself"
    finally:
        process.terminate()
        process.wait(10)


def on_nodes(fake: Fake) -> Counter[str]:
    """Count the running replicas of each node."""
    request = domain_pb2.ListDomainsRequest(
        parent="nodes/-", page_size=1000, filter='labels."replicas.example/group" = "web" AND status.active = true'
    )
    found = fake.fleet.domains.ListDomains(request).domains
    return Counter(domain.name.split("/")[1] for domain in found)


def eventually(true: Callable[[], bool], seconds: float = 30.0) -> None:
    ends_at = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < ends_at, "it does not become true"
        time.sleep(0.1)


def test_the_wanted_number_runs_whatever_happens() -> None:
    with running("--nodes", "3") as fake, controller(fake, 6):
        eventually(lambda: on_nodes(fake) == Counter({"n1": 2, "n2": 2, "n3": 2}))

        fake.control.RestartGateway(fake_pb2.RestartGatewayRequest())
        fake.control.CutConnections(fake_pb2.CutConnectionsRequest())
        victim = next(iter(fake.fleet.domains.ListDomains(domain_pb2.ListDomainsRequest(parent="nodes/n1")).domains))
        stop = domain_pb2.StopDomainRequest(name=victim.name, mode=domain_pb2.STOP_MODE_FORCE)
        fake.fleet.wait(fake.fleet.domains.StopDomain(stop), domain_pb2.Domain)
        eventually(lambda: victim.name not in fake.names() and on_nodes(fake).total() == 6)

        fake.inject("n3", away=fake_pb2.Away())
        time.sleep(1)
        assert on_nodes(fake).total() <= 6, "a node that is out of reach for a moment is no lost one"
        fake.control.AdvanceTime(fake_pb2.AdvanceTimeRequest(duration=duration_pb2.Duration(seconds=120)))
        eventually(lambda: on_nodes(fake)["n1"] + on_nodes(fake)["n2"] == 6)

        fake.clear()
        eventually(lambda: (on_nodes(fake).total() == 6 and "n3" in on_nodes(fake)) or on_nodes(fake).total() == 6, 60)
