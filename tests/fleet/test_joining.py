"""Who may become a node, and what a certificate is good for: tokens that are misused, certificates in the wrong place."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from tests.fleet.rig import issue, pid_of, refused, unique
from virtfleet.compute.v1 import domain_pb2
from virtfleet.fleet.v1 import enrollment_pb2, enrollment_pb2_grpc, node_pb2
from virtfleet.storage.v1 import pool_pb2
from virtfleet_client import Credentials, Fleet
from virtfleet_client.errors import from_call
from virtfleet_service.enrollment import JoinToken
from virtfleet_service.errors import JoinTokenInvalid


class Machine:
    """A machine that wants to be a node: keys, and what it asks the gateway for."""

    def __init__(self, node: str, endpoint: str = "127.0.0.1:9") -> None:
        self.name = f"nodes/{node}"
        self.endpoint = endpoint
        self.key = ec.generate_private_key(ec.SECP256R1())

    def request(self, token: str, name: str = "") -> enrollment_pb2.EnrollNodeRequest:
        """Return the request with which it joins."""
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "compute")])
        csr = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(self.key, hashes.SHA256())
        service = enrollment_pb2.ServiceEnrollment(
            service="compute",
            certificate_request=csr.public_bytes(serialization.Encoding.PEM).decode(),
            endpoint=self.endpoint,
        )
        return enrollment_pb2.EnrollNodeRequest(name=name or self.name, token=token, services=[service])


@pytest.fixture
def door(environment: dict[str, str]) -> Iterator[Callable[[enrollment_pb2.EnrollNodeRequest], Any]]:
    """Yield EnrollNode of the port that needs no certificate."""
    folder = Path(environment["VIRTFLEET_CA_FILE"]).parents[1]
    found = re.search(r'enrollment_listen" = "([^"]+)"', (folder / "gateway.toml").read_text())
    assert found
    credentials = grpc.ssl_channel_credentials(Path(environment["VIRTFLEET_CA_FILE"]).read_bytes())
    with grpc.secure_channel(found.group(1), credentials) as channel:
        stub = enrollment_pb2_grpc.EnrollmentServiceStub(channel)

        def call(request: enrollment_pb2.EnrollNodeRequest) -> Any:
            try:
                return stub.EnrollNode(request, timeout=10)
            except grpc.RpcError as error:
                failed: Any = error
                raise from_call(failed.code(), failed.details(), failed.trailing_metadata()) from error

        yield call


def token_of(fleet: Fleet, node: str) -> str:
    """Return a token with which a node may join."""
    request = enrollment_pb2.CreateJoinTokenRequest()
    request.join_token.spec.node = f"nodes/{node}"
    text: str = fleet.enrollment.CreateJoinToken(request).token
    return text


@pytest.fixture
def node(fleet: Fleet) -> Iterator[str]:
    """Yield the id of a node that there is not; afterwards there is none again."""
    id_ = unique("node")
    yield id_
    if id_ in registered(fleet):
        fleet.wait(fleet.nodes.DeleteNode(node_pb2.DeleteNodeRequest(name=f"nodes/{id_}")), node_pb2.Node)


def registered(fleet: Fleet) -> set[str]:
    """Return the nodes of the fleet."""
    nodes = fleet.pages(fleet.nodes.ListNodes, node_pb2.ListNodesRequest())
    return {node.name.removeprefix("nodes/") for node in nodes}


def endpoints(fleet: Fleet, node: str) -> list[str]:
    """Return where the gateway looks for a node."""
    found = fleet.nodes.GetNode(node_pb2.GetNodeRequest(name=f"nodes/{node}"))
    return [service.endpoint for service in found.status.services]


def test_a_token_is_used_once(fleet: Fleet, door: Callable[..., Any], node: str) -> None:
    token = token_of(fleet, node)
    first = Machine(node, "127.0.0.1:10").request(token)
    joined = door(first)
    assert endpoints(fleet, node) == ["127.0.0.1:10"]
    error = refused(lambda: door(Machine(node, "127.0.0.1:11").request(token)))
    assert (error.code().name, error.reason) == ("UNAUTHENTICATED", "JOIN_TOKEN_INVALID"), error
    assert endpoints(fleet, node) == ["127.0.0.1:10"], "the second one has changed nothing"
    # Who asks the same may ask again: its answer may have been lost.
    assert len(door(first).certificates) == len(joined.certificates)


def test_a_token_is_of_one_node(fleet: Fleet, door: Callable[..., Any], node: str) -> None:
    other = unique("other")
    token = token_of(fleet, node)
    error = refused(lambda: door(Machine(other).request(token)))
    assert (error.code().name, error.reason) == ("UNAUTHENTICATED", "JOIN_TOKEN_INVALID"), error
    error = refused(lambda: door(Machine(other).request(token.replace(node, other))))
    assert (error.code().name, error.reason) == ("UNAUTHENTICATED", "JOIN_TOKEN_INVALID"), error
    assert not {node, other} & registered(fleet)
    door(Machine(node).request(token))
    assert node in registered(fleet), "that did not use it up"


def test_a_token_that_was_taken_back(fleet: Fleet, door: Callable[..., Any], node: str) -> None:
    request = enrollment_pb2.CreateJoinTokenRequest()
    request.join_token.spec.node = f"nodes/{node}"
    made = fleet.enrollment.CreateJoinToken(request)
    fleet.enrollment.DeleteJoinToken(enrollment_pb2.DeleteJoinTokenRequest(name=made.name))
    error = refused(lambda: door(Machine(node).request(made.token)))
    assert (error.code().name, error.reason) == ("UNAUTHENTICATED", "JOIN_TOKEN_INVALID"), error
    assert node not in registered(fleet)


@pytest.mark.parametrize("end", ["", "."], ids=["three parts", "an empty pin"])
def test_a_token_without_the_pin_of_the_authority(fleet: Fleet, door: Callable[..., Any], node: str, end: str) -> None:
    """Who joins by it could not tell the gateway from an impostor: neither side takes it."""
    text = token_of(fleet, node).rpartition(".")[0] + end
    with pytest.raises(JoinTokenInvalid):
        JoinToken.parse(text)
    error = refused(lambda: door(Machine(node).request(text)))
    assert (error.code().name, error.reason) == ("UNAUTHENTICATED", "JOIN_TOKEN_INVALID"), error
    assert node not in registered(fleet)


# Certificates in the wrong place.


class Impostor(grpc.GenericRpcHandler):
    """Says yes to everything, and keeps what it was asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.lock = threading.Lock()

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[Any, Any]:
        """Note the method and answer with nothing."""
        with self.lock:
            self.asked.append(handler_call_details.method)
        return grpc.unary_unary_rpc_method_handler(lambda _request, _context: b"")


def test_the_certificate_of_a_user_is_none_of_a_node(
    fleet: Fleet, door: Callable[..., Any], node: str, tmp_path: Path
) -> None:
    """At the address of a node a server answers with a user's certificate: it is told nothing."""
    files = issue(fleet, tmp_path, unique("eve"), "admin")
    pair = files.key_file.read_bytes(), files.certificate_file.read_bytes()
    impostor = Impostor()
    server = grpc.server(futures.ThreadPoolExecutor(2), handlers=[impostor])
    port = server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([pair]))
    server.start()
    try:
        door(Machine(node, f"127.0.0.1:{port}").request(token_of(fleet, node)))
        request = domain_pb2.GetDomainRequest(name=f"nodes/{node}/domains/web")
        error = refused(lambda: fleet.domains.GetDomain(request, timeout=8))
        assert (error.code().name, error.reason) == ("UNAVAILABLE", "NODE_UNREACHABLE"), error
        assert error.metadata["sent"] == "false", error
        found = fleet.nodes.GetNode(node_pb2.GetNodeRequest(name=f"nodes/{node}"))
        assert found.status.state != node_pb2.NODE_STATE_READY
        assert impostor.asked == []
    finally:
        server.stop(0).wait()


def test_the_certificate_of_a_user_renews_none_of_a_node(fleet: Fleet) -> None:
    request = Machine("n1").request("x").services[0].certificate_request
    for name in ("certificates/none", ""):
        renewal = enrollment_pb2.RenewCertificateRequest(name=name, certificate_request=request)
        error = refused(lambda renewal=renewal: fleet.enrollment.RenewCertificate(renewal))  # type: ignore[misc]  # the round's own
        assert (error.code().name, error.reason) == ("FAILED_PRECONDITION", "WRONG_STATE"), error


@pytest.mark.parametrize("service", ["compute", "storage"])
def test_the_certificate_of_a_node_is_no_clients_at_another_node(
    environment: dict[str, str], service: str, run_folder: Path
) -> None:
    """In the namespace of the nodes, past the gateway: who is no gateway and no user gets nothing from a node."""
    folder = Path(environment["VIRTFLEET_CA_FILE"]).parents[1]
    found = re.search(r'"listen" = "([^"]+)"', (folder / f"n2/{service}.toml").read_text())
    assert found
    identity = folder / "n1/state/identity"
    credentials = Credentials(identity / "ca.crt", identity / "compute.crt", identity / "compute.key").for_channel()
    path, request = {
        "compute": (
            "/virtfleet.compute.v1.DomainService/ListDomains",
            domain_pb2.ListDomainsRequest(parent="nodes/n2"),
        ),
        "storage": ("/virtfleet.storage.v1.PoolService/ListPools", pool_pb2.ListPoolsRequest(parent="nodes/n2")),
    }[service]
    options = [("grpc.ssl_target_name_override", f"{service}.n2.virtfleet.dev")]
    with grpc.secure_channel(found.group(1), credentials, options) as channel:
        method: Any = channel.unary_unary(path)
        with pytest.raises(grpc.RpcError) as caught:
            method(request.SerializeToString(), timeout=10)
        failed: Any = caught.value
    error = from_call(failed.code(), failed.details(), failed.trailing_metadata())
    assert (error.code().name, error.reason) == ("PERMISSION_DENIED", "PERMISSION_MISSING"), error
    assert pid_of(run_folder, f"n2/{service}")
