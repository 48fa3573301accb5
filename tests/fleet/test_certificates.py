"""Certificates of a running fleet: those that the command issues can be revoked, those of nodes are renewed unnoticed."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography import x509

from tests.fleet.rig import SERVICES, Wire, caller, creation, kill, refused, unique, until, watching, whole
from tools.fleet import Fleet as Development
from tools.fleet import Plan
from tools.paths import ROOT
from virtfleet.compute.v1 import domain_pb2, watch_pb2
from virtfleet.fleet.v1 import enrollment_pb2, node_pb2
from virtfleet.network.v1 import network_pb2
from virtfleet.storage.v1 import pool_pb2
from virtfleet.type.v1 import watch_pb2 as type_watch_pb2
from virtfleet_client import Credentials, Fleet
from virtfleet_client.errors import VirtfleetError

WITHIN_SECONDS = 5
LIFETIME_SECONDS = 30


def issue_by_command(run_folder: Path, output: Path, name: str, role: str) -> Credentials:
    """Issue a certificate as an administrator does beside the gateway."""
    folder = Path(json.loads((run_folder / "fleet.json").read_text())["folder"])
    subprocess.run(
        [
            sys.executable, "-m", "virtfleet_cli", "authority", "issue", name, "--role", role,
            "--directory", str(folder / "authority"), "--output", str(output),
        ],
        cwd=ROOT,
        check=True,
        capture_output=True,
        timeout=30,
    )  # fmt: skip
    return Credentials(output / "ca.crt", output / f"{name}.crt", output / f"{name}.key")


def listed(fleet: Fleet, name: str) -> enrollment_pb2.Certificate | None:
    """Return the certificate of a person, if the fleet lists it."""
    found = [
        one
        for one in fleet.pages(fleet.enrollment.ListCertificates, enrollment_pb2.ListCertificatesRequest())
        if one.status.identity.endswith(f"/user/{name}")
    ]
    assert len(found) <= 1
    return found[0] if found else None


@pytest.mark.usefixtures("made_whole")
@pytest.mark.parametrize("restart", [False, True], ids=["running", "restarted"])
def test_what_the_command_has_issued_can_be_revoked(
    fleet: Fleet, environment: dict[str, str], run_folder: Path, tmp_path: Path, nodes: list[str], *, restart: bool
) -> None:
    name = unique("cli")
    credentials = issue_by_command(run_folder, tmp_path, name, "viewer")
    if restart:
        kill(run_folder, "gateway")
        until(lambda: whole(fleet, nodes), 30, "the fleet is whole")
    certificate = until(lambda: listed(fleet, name), WITHIN_SECONDS, "the certificate is listed")
    assert certificate.status.state == enrollment_pb2.CERTIFICATE_STATE_VALID
    assert list(certificate.status.roles) == ["viewer"]
    with caller(environment, credentials) as person:
        streams = [
            person.channel.unary_stream(
                "/virtfleet.compute.v1.WatchService/WatchResources",
                request_serializer=watch_pb2.WatchResourcesRequest.SerializeToString,
                response_deserializer=watch_pb2.WatchResourcesResponse.FromString,
            )(watch_pb2.WatchResourcesRequest(parent=parent, snapshot=type_watch_pb2.WatchSnapshot()))
            for parent in (nodes[0], "nodes/-")
        ]
        for stream in streams:
            next(stream)
        fleet.enrollment.RevokeCertificate(enrollment_pb2.RevokeCertificateRequest(name=certificate.name))

        def away() -> VirtfleetError | None:
            try:
                person.nodes.ListNodes(node_pb2.ListNodesRequest(), timeout=5)
            except VirtfleetError as error:
                return error
            return None

        error = until(away, WITHIN_SECONDS, "the call is refused")
        assert (error.code().name, error.reason) == ("UNAUTHENTICATED", "CERTIFICATE_REVOKED"), error
        for stream in streams:
            error = refused(lambda stream=stream: list(stream))  # type: ignore[misc]  # bound at once
            assert (error.code().name, error.reason) == ("UNAUTHENTICATED", "CERTIFICATE_REVOKED"), error
    after = listed(fleet, name)
    assert after is not None
    assert after.status.state == enrollment_pb2.CERTIFICATE_STATE_REVOKED


class Caller:
    """Calls a node's services again and again through the gateway, never twice for the same answer."""

    def __init__(self, environment: dict[str, str], node: str) -> None:
        self.failures: list[VirtfleetError] = []
        self.count = 0
        self._wire = Wire(environment)
        self._requests = [
            ("virtfleet.compute.v1.DomainService/ListDomains", domain_pb2.ListDomainsRequest(parent=node)),
            ("virtfleet.storage.v1.PoolService/ListPools", pool_pb2.ListPoolsRequest(parent=node)),
            ("virtfleet.network.v1.NetworkService/ListNetworks", network_pb2.ListNetworksRequest(parent=node)),
        ]
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._over.wait(0.02):
            for path, request in self._requests:
                try:
                    self._wire(path, request)
                except VirtfleetError as error:
                    self.failures.append(error)
                self.count += 1

    def close(self) -> None:
        """Stop calling."""
        self._over.set()
        self._thread.join(30)
        self._wire.close()


def certificates(folder: Path) -> dict[str, x509.Certificate]:
    """Read the certificates of a node's services from its disk."""
    return {
        service: x509.load_pem_x509_certificate((folder / f"state/identity/{service}.crt").read_bytes())
        for service in SERVICES
    }


def follow(environment: dict[str, str], node: str, read: Callable[[], dict[str, x509.Certificate]]) -> None:
    """Call and watch until every first certificate has ended; nothing may have been noticed."""
    first = read()
    ends_at = max(one.not_valid_after_utc.timestamp() for one in first.values())
    request = watch_pb2.WatchResourcesRequest(parent="nodes/-", snapshot=type_watch_pb2.WatchSnapshot())
    calls = Caller(environment, node)
    try:
        with watching(environment, request) as watcher:
            watcher.until(lambda: watcher.snapshots_ended, 20, "the snapshot")
            told = len(watcher.statuses)
            while time.time() < ends_at + 1:
                assert not calls.failures, calls.failures
                time.sleep(0.1)
            wire = Wire(environment)
            wire("virtfleet.compute.v1.DomainService/CreateDomain", creation(node, "after"))
            wire.close()
            watcher.until(lambda: f"{node}/domains/after" in watcher.known, 20, "the news after the renewal")
            assert watcher.statuses[told:] == [], "the node was away for the watch"
    finally:
        calls.close()
    assert not calls.failures, calls.failures
    assert calls.count > len(SERVICES)
    after = read()
    for service in SERVICES:
        assert after[service].serial_number != first[service].serial_number, f"{service} has not renewed"
        assert after[service].not_valid_after_utc > first[service].not_valid_after_utc


@pytest.mark.timeout(150)
async def test_certificates_of_nodes_are_renewed_without_a_dropped_call(tmp_path: Path) -> None:
    plan = Plan(nodes=1, driver="test", settings={"gateway": {"node_certificate_seconds": LIFETIME_SECONDS}})
    async with Development.running(plan, run_folder=tmp_path) as made:
        environment = {**made.environment(), "VIRTFLEET_RUN": str(tmp_path)}
        folder = made.folder / "n1"
        life = [one.not_valid_after_utc.timestamp() - time.time() for one in certificates(folder).values()]
        assert max(life) <= LIFETIME_SECONDS
        await asyncio.to_thread(follow, environment, "nodes/n1", lambda: certificates(folder))
