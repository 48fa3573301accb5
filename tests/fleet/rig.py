"""What the tests of a fleet share: refusals as data, resources that are taken away again, raw calls, more callers."""

from __future__ import annotations

import os
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from google.longrunning import operations_pb2
from google.protobuf import duration_pb2, empty_pb2
from google.protobuf.message import Message
from google.rpc import error_details_pb2

from virtfleet.compute.v1 import domain_pb2, domain_spec_pb2
from virtfleet.fleet.v1 import enrollment_pb2, node_pb2
from virtfleet.network.v1 import network_pb2
from virtfleet.storage.v1 import pool_pb2
from virtfleet_client import Credentials, Fleet, connect
from virtfleet_client.endpoint import Endpoint
from virtfleet_client.errors import VirtfleetError, from_call

MIB = 1 << 20
SERVICES = ("compute", "storage", "network")
State = domain_pb2.DomainState
Metadata = Sequence[tuple[str, str | bytes]]


@dataclass(frozen=True, slots=True)
class Refusal:
    """Is what a caller may rely on in an error: code, reason and the fields at fault."""

    code: str
    reason: str
    fields: tuple[str, ...] = ()


def refusal_of(error: VirtfleetError) -> Refusal:
    """Return an error as data."""
    return Refusal(error.code().name, error.reason, error.fields or precondition_subjects(error))


def precondition_subjects(error: VirtfleetError) -> tuple[str, ...]:
    """Return what is not as it must be, as the details of an error name it: resources, or paths of fields."""
    failure = error_details_pb2.PreconditionFailure()
    return tuple(
        violation.subject
        for detail in error.status.details
        if detail.Unpack(failure)
        for violation in failure.violations
    )


def refused(call: Callable[[], object]) -> VirtfleetError:
    """Make a call that must fail and return its error."""
    try:
        answer = call()
    except VirtfleetError as error:
        return error
    raise AssertionError(f"the call is answered: {answer!s:.500}")


def until(holds: Callable[[], Any], seconds: float, what: str) -> Any:
    """Look again and again until something holds; calls that fail on the way count as `not yet`."""
    ends_at = time.monotonic() + seconds
    last: object = None
    while True:
        try:
            last = holds()
        except VirtfleetError as error:
            last = error
        else:
            if last:
                return last
        assert time.monotonic() < ends_at, f"{what} does not hold after {seconds} s: {last!s:.500}"
        time.sleep(0.05)


def seconds(number: float) -> duration_pb2.Duration:
    """Return a duration."""
    found = duration_pb2.Duration()
    found.FromNanoseconds(int(number * 1e9))
    return found


def unique(prefix: str = "d") -> str:
    """Return an id that no other test has."""
    return f"{prefix}-{uuid.uuid4().hex[:10]}"


def mac() -> str:
    """Return a MAC address that no other test has."""
    tail = uuid.uuid4().hex[:8]
    return ":".join(["06", "02", *(tail[index : index + 2] for index in range(0, 8, 2))])


def small_spec(**fields: Any) -> domain_spec_pb2.DomainSpec:
    """Return the spec of a small domain of the in-memory driver."""
    spec = domain_spec_pb2.DomainSpec(driver="test", **fields)
    spec.memory.maximum_bytes = 64 * MIB
    return spec


def creation(parent: str, domain_id: str = "", *, start: str = "", **fields: Any) -> domain_pb2.CreateDomainRequest:
    """Return a request for a domain; `start` is empty, `running` or `paused`; further fields are the domain's."""
    fields.setdefault("spec", small_spec())
    return domain_pb2.CreateDomainRequest(
        parent=parent,
        domain_id=domain_id or unique(),
        domain=domain_pb2.Domain(**fields),
        start=domain_pb2.StartOptions(paused=start == "paused") if start else None,
    )


def create(fleet: Fleet, parent: str, domain_id: str = "", **fields: Any) -> domain_pb2.Domain:
    """Make a domain: see `creation`."""
    return fleet.wait(fleet.domains.CreateDomain(creation(parent, domain_id, **fields)), domain_pb2.Domain)


def get(fleet: Fleet, name: str) -> domain_pb2.Domain:
    """Read a domain."""
    found: domain_pb2.Domain = fleet.domains.GetDomain(domain_pb2.GetDomainRequest(name=name), timeout=10)
    return found


def verb(fleet: Fleet, method: str, name: str, **fields: Any) -> domain_pb2.Domain:
    """Call a method like StartDomain and wait for its end."""
    request = getattr(domain_pb2, f"{method}Request")(name=name, **fields)
    return fleet.wait(getattr(fleet.domains, method)(request), domain_pb2.Domain)


def delete(fleet: Fleet, name: str, *, stop: bool = True) -> None:
    """Delete a domain, whatever it does; succeeds if there is none."""
    request = domain_pb2.DeleteDomainRequest(name=name, stop=stop, allow_missing=True)
    fleet.wait(fleet.domains.DeleteDomain(request), empty_pb2.Empty)


@contextmanager
def domain(fleet: Fleet, parent: str, domain_id: str = "", **fields: Any) -> Iterator[domain_pb2.Domain]:
    """Make a domain for the length of a `with` block."""
    made = create(fleet, parent, domain_id, **fields)
    try:
        yield made
    finally:
        delete(fleet, made.name)


class Wire:
    """Calls methods with bytes as they are, on a connection of its own."""

    def __init__(self, environment: dict[str, str], certificate: str = "", key: str = "") -> None:
        credentials = Credentials(
            Path(environment["VIRTFLEET_CA_FILE"]),
            Path(certificate or environment["VIRTFLEET_CERT_FILE"]),
            Path(key or environment["VIRTFLEET_KEY_FILE"]),
        )
        endpoint = Endpoint.parse(environment["VIRTFLEET_ADDRESS"])
        self._channel = grpc.secure_channel(endpoint.target, credentials.for_channel(), options=endpoint.options())

    def __call__(self, path: str, request: bytes | Message, *, metadata: Metadata = ()) -> bytes:
        """Call `package.Service/Method` once and return the bytes of the answer."""
        encoded = request.SerializeToString() if isinstance(request, Message) else request
        try:
            answer: bytes = self._method(path)(encoded, timeout=10, metadata=tuple(metadata))
        except grpc.RpcError as error:
            failed: Any = error  # a call too
            raise from_call(failed.code(), failed.details(), failed.trailing_metadata()) from error
        return answer

    @property
    def channel(self) -> grpc.Channel:
        """The connection itself."""
        return self._channel

    def begin(self, path: str, request: Message) -> Any:
        """Begin a call and return it, so that it can be cancelled."""
        return self._method(path).future(request.SerializeToString())

    def _method(self, path: str) -> Any:
        return self._channel.unary_unary(f"/{path}")

    def close(self) -> None:
        """End the connection."""
        self._channel.close()


def issue(fleet: Fleet, folder: Path, user: str, *roles: str) -> Credentials:
    """Have a certificate issued for a person."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, user)])
    csr = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key, hashes.SHA256())
    request = enrollment_pb2.IssueUserCertificateRequest(
        user=user, roles=roles, certificate_request=csr.public_bytes(serialization.Encoding.PEM).decode()
    )
    answer = fleet.enrollment.IssueUserCertificate(request, timeout=10)
    folder.mkdir(parents=True, exist_ok=True)
    files = Credentials(folder / "ca.crt", folder / f"{user}.crt", folder / f"{user}.key")
    files.ca_file.write_text("".join(answer.trust_bundle.ca_certificates))
    files.certificate_file.write_text(answer.certificate.certificate_chain)
    files.key_file.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return files


@contextmanager
def caller(environment: dict[str, str], credentials: Credentials) -> Iterator[Fleet]:
    """Connect as somebody else."""
    with connect(f"tls://{environment['VIRTFLEET_ADDRESS']}", credentials) as connection:
        yield connection


# Bytes that no library writes.


def varint(number: int) -> bytes:
    """Return a number as protobuf writes it."""
    found = bytearray()
    while number > 0x7F:
        found.append(number & 0x7F | 0x80)
        number >>= 7
    found.append(number)
    return bytes(found)


def field(number: int, value: bytes | int) -> bytes:
    """Return one field: a number as varint, bytes with their length."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


# Processes of the fleet.


def pid_of(run_folder: Path, place: str) -> int:
    """Return the process of `gateway` or `n1/compute`."""
    return int((run_folder / f"{place}.pid").read_text())


def kill(run_folder: Path, place: str, number: signal.Signals = signal.SIGKILL) -> int:
    """Kill a process, wait until the supervisor has put another in its place; returns the new one."""
    before = pid_of(run_folder, place)
    os.kill(before, number)

    def replaced() -> int:
        path = run_folder / f"{place}.pid"
        text = path.read_text().strip() if path.exists() else ""
        return int(text) if text and int(text) != before else 0

    after: int = until(replaced, 20, f"another {place} runs")
    return after


def descriptors(process: int) -> int:
    """Return how many files, sockets and pipes a process has open, as the kernel says."""
    return sum(1 for _ in Path(f"/proc/{process}/fd").iterdir())


def unfinished(fleet: Fleet, node: str, service: str = "compute") -> list[str]:
    """Return the operations of a service that have not ended."""
    request = operations_pb2.ListOperationsRequest(name=f"{node}/services/{service}", filter="done=false")
    return [one.name for one in fleet.pages(fleet.operations.ListOperations, request)]


@contextmanager
def frozen(run_folder: Path, node: str) -> Iterator[None]:
    """Stop the three services of a node with SIGSTOP for the length of a `with` block."""
    processes = [pid_of(run_folder, f"{node}/{service}") for service in SERVICES]
    for process in processes:
        os.kill(process, signal.SIGSTOP)
    try:
        yield
    finally:
        for process in processes:
            os.kill(process, signal.SIGCONT)


def whole(fleet: Fleet, nodes: Sequence[str]) -> bool:
    """Tell whether every node is ready and everything of it is in the fleet's lists."""
    ready = all(
        fleet.nodes.GetNode(node_pb2.GetNodeRequest(name=node), timeout=5).status.state == node_pb2.NODE_STATE_READY
        for node in nodes
    )
    lists: list[Any] = [
        fleet.domains.ListDomains(domain_pb2.ListDomainsRequest(parent="nodes/-"), timeout=5),
        fleet.pools.ListPools(pool_pb2.ListPoolsRequest(parent="nodes/-"), timeout=5),
        fleet.networks.ListNetworks(network_pb2.ListNetworksRequest(parent="nodes/-"), timeout=5),
    ]
    return ready and not any(answer.unreachable for answer in lists)


# Watching.


class Watcher:
    """Follows a watch in a thread, on a connection of its own, and remembers all that it is told."""

    def __init__(self, environment: dict[str, str], request: Message) -> None:
        self.history: list[tuple[str, str, int]] = []
        """`put`, `delete` or `event`, with the name and the generation (of an event: its type)."""
        self.known: dict[str, Any] = {}
        self.statuses: list[tuple[str, int]] = []
        self.snapshots_ended = 0
        self.bookmarks = 0
        self.token = ""
        self.failure: BaseException | None = None
        self._news = threading.Condition()
        self._closing = False
        self._request = request
        self._connection = connect(f"tls://{environment['VIRTFLEET_ADDRESS']}", credentials_of(environment))
        self._fleet = self._connection.__enter__()
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._thread.start()

    def _follow(self) -> None:
        try:
            for answer in self._fleet.watch(self._request):
                with self._news:
                    self._take(answer)
                    self._news.notify_all()
        except (VirtfleetError, ValueError) as error:
            # The connection is closed under the stream; nothing else ends a watch.
            with self._news:
                self.failure = None if self._closing else error
                self._news.notify_all()

    def _take(self, answer: Any) -> None:
        for change in answer.changes:
            kind = change.WhichOneof("kind")
            if kind == "put":
                resource = getattr(change.put, change.put.WhichOneof("resource"))
                self.known[resource.name] = resource
                self.history.append(("put", resource.name, resource.generation))
            elif kind == "delete":
                self.known.pop(change.delete.name, None)
                self.history.append(("delete", change.delete.name, 0))
            elif kind == "event":
                self.history.append(("event", change.event.resource, change.event.type))
        marker = answer.WhichOneof("marker")
        self.snapshots_ended += marker == "snapshot_end"
        self.bookmarks += marker == "bookmark"
        if marker == "source_status":
            self.statuses.append((answer.source_status.node, answer.source_status.state))
        self.token = answer.resume_token or self.token

    def until(self, holds: Callable[[], Any], seconds: float, what: str) -> None:
        """Wait until what has been told makes something hold."""
        with self._news:
            reached = self._news.wait_for(lambda: self.failure is not None or holds(), seconds)
            assert self.failure is None, self.failure
            assert reached, f"{what} is not told within {seconds} s: {self.history[-20:]} {self.statuses}"

    def of(self, name: str, *kinds: str) -> list[int]:
        """Return the generations that were told of one resource, in order."""
        with self._news:
            return [number for kind, told, number in self.history if told == name and kind in (kinds or ("put",))]

    def close(self) -> None:
        """End the watch."""
        self._closing = True
        self._connection.__exit__(None, None, None)
        self._thread.join(10)
        assert not self._thread.is_alive()


@contextmanager
def watching(environment: dict[str, str], request: Message) -> Iterator[Watcher]:
    """Watch for the length of a `with` block."""
    watcher = Watcher(environment, request)
    try:
        yield watcher
    finally:
        watcher.close()


def credentials_of(environment: dict[str, str]) -> Credentials:
    """Return the credentials of the administrator."""
    return Credentials(
        Path(environment["VIRTFLEET_CA_FILE"]),
        Path(environment["VIRTFLEET_CERT_FILE"]),
        Path(environment["VIRTFLEET_KEY_FILE"]),
    )
