"""A call that is repeated: one effect, one answer, for one caller and one body."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from google.longrunning import operations_pb2
from google.protobuf import symbol_database

from tests.fleet.rig import (
    MIB,
    Refusal,
    State,
    caller,
    creation,
    delete,
    field,
    get,
    kill,
    refusal_of,
    refused,
    unique,
    until,
)
from tests.fleet.stand import (
    CREATE,
    INVALID,
    Stand,
    everything,
    spec,
)
from tests.fleet.test_implemented import methods
from tests.fleet.test_joining import Machine, token_of
from tools.paths import PROTOS
from virtfleet.compute.v1 import domain_pb2
from virtfleet.fleet.v1 import enrollment_pb2, node_pb2
from virtfleet.network.v1 import network_pb2, port_pb2
from virtfleet.storage.v1 import pool_pb2, volume_pb2
from virtfleet_client import Credentials, Fleet


def repeatable(stand: Stand, request_id: str, domain_id: str, **fields: Any) -> domain_pb2.CreateDomainRequest:
    """Return a request that may be sent again."""
    request = creation(stand.node, domain_id, **fields)
    request.request_id = request_id
    return request


def test_a_repeated_call_has_one_effect_and_one_answer(stand: Stand) -> None:
    id_, request_id = unique(), str(uuid.uuid4())
    request = repeatable(stand, request_id, id_, labels={"a": "1", "b": "2"}, start="running")
    first = stand.fleet.wait(stand.fleet.domains.CreateDomain(request), domain_pb2.Domain)
    try:
        again = stand.fleet.domains.CreateDomain(request)
        assert stand.fleet.wait(again, domain_pb2.Domain).uid == first.uid
        assert get(stand.fleet, first.name).status.runtime_id == first.status.runtime_id
    finally:
        delete(stand.fleet, first.name)
    # Also after the domain has gone: the call has been answered.
    assert stand.fleet.wait(stand.fleet.domains.CreateDomain(request), domain_pb2.Domain).uid == first.uid
    assert refused(lambda: get(stand.fleet, first.name)).reason == "RESOURCE_NOT_FOUND"


def test_maps_in_another_order_are_the_same_call(stand: Stand) -> None:
    id_, request_id = unique(), str(uuid.uuid4())
    entries = [field(1, key) + field(2, value) for key, value in ((b"a", b"1"), (b"b", b"2"), (b"c", b"3"))]

    def encoded(labels: list[bytes]) -> bytes:
        body = b"".join(field(4, entry) for entry in labels) + spec()
        tail = field(3, id_.encode()) + field(91, request_id.encode())
        return field(1, stand.node.encode()) + field(2, body) + tail

    first = stand.wire(CREATE, encoded(entries))
    try:
        assert stand.wire(CREATE, encoded(entries[::-1])) == first
    finally:
        delete(stand.fleet, f"{stand.node}/domains/{id_}")


def test_a_request_id_is_of_one_body(stand: Stand) -> None:
    id_, request_id = unique(), str(uuid.uuid4())
    name = f"{stand.node}/domains/{id_}"
    stand.fleet.domains.CreateDomain(repeatable(stand, request_id, id_))
    try:
        before = get(stand.fleet, name)
        other = repeatable(stand, request_id, id_, labels={"other": "body"})
        error = refused(lambda: stand.fleet.domains.CreateDomain(other))
        assert refusal_of(error) == Refusal(INVALID, "REQUEST_ID_REUSED", ("request_id",))
        assert get(stand.fleet, name) == before
        # Of another method it is another one.
        start = domain_pb2.StartDomainRequest(name=name, request_id=request_id)
        started = stand.fleet.wait(stand.fleet.domains.StartDomain(start), domain_pb2.Domain)
        assert started.status.state == State.DOMAIN_STATE_RUNNING
    finally:
        delete(stand.fleet, name)


def test_a_request_id_is_of_one_caller(
    stand: Stand, environment: dict[str, str], people: dict[str, Credentials]
) -> None:
    id_, request_id = unique(), str(uuid.uuid4())
    request = repeatable(stand, request_id, id_)
    first = stand.fleet.wait(stand.fleet.domains.CreateDomain(request), domain_pb2.Domain)
    try:
        with caller(environment, people["admin"]) as other:
            error = refused(lambda: other.domains.CreateDomain(request))
        assert refusal_of(error) == Refusal("ALREADY_EXISTS", "RESOURCE_EXISTS"), "what another got is not told"
        assert get(stand.fleet, first.name) == first
    finally:
        delete(stand.fleet, first.name)


# Every change, asked for again when nothing is any more as it was.


class Answered:
    """Makes changes with a request_id each, and makes each again: at once, and when all is over."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self.given: list[tuple[Callable[..., Any], Any, Any]] = []
        self.methods: set[str] = set()

    def __call__(self, service: str, method: str, request: Any) -> Any:
        """Make a change and return its result."""
        request.request_id = str(uuid.uuid4())
        stub = getattr(getattr(self._fleet, service), method)
        answer = stub(request, timeout=20)
        if isinstance(answer, operations_pb2.Operation):
            answer = self._fleet.finish(answer, timeout_seconds=20)
            assert not answer.HasField("error"), (method, answer.error)
        self.methods.add(f"{request.DESCRIPTOR.file.package}/{method}")
        self.given.append((stub, request, answer))
        self.again(stub, request, answer)
        if isinstance(answer, operations_pb2.Operation):
            of = symbol_database.Default().GetSymbol(answer.response.TypeName())
            return of.FromString(answer.response.value)
        return answer

    def again(self, stub: Callable[..., Any], request: Any, answer: Any) -> None:
        """Make a change again: it is told what it was told, and has no second effect."""
        told = stub(request, timeout=20)
        if isinstance(answer, operations_pb2.Operation):
            assert told.name == answer.name, (request, told)
            assert told.response == answer.response
        else:
            assert (told.name, told.uid, told.generation) == (answer.name, answer.uid, answer.generation)

    def all_again(self) -> None:
        """Make all of them again."""
        for stub, request, answer in self.given:
            self.again(stub, request, answer)


def change_domains(do: Answered, node: str) -> None:
    """Lead a domain and a batch of them through all that can be done to them."""
    name = f"{node}/domains/{unique()}"
    creation_ = creation(node, name.rpartition("/")[2])
    now = do("domains", "CreateDomain", creation_)
    update = domain_pb2.UpdateDomainRequest(domain=domain_pb2.Domain(name=name, etag=now.etag, labels={"a": "b"}))
    update.update_mask.paths.append("labels")
    now = do("domains", "UpdateDomain", update)
    for verb in ("Start", "Suspend", "Resume", "Reboot", "Reset"):
        request = getattr(domain_pb2, f"{verb}DomainRequest")(name=name, etag=now.etag, expected_uid=now.uid)
        now = do("domains", f"{verb}Domain", request)
    stop = domain_pb2.StopDomainRequest(name=name, etag=now.etag, mode=domain_pb2.STOP_MODE_FORCE)
    now = do("domains", "StopDomain", stop)
    delete_ = domain_pb2.DeleteDomainRequest(name=name, etag=now.etag, expected_uid=now.uid)
    do("domains", "DeleteDomain", delete_)
    names = [f"{node}/domains/{unique()}" for _ in range(2)]
    items: dict[str, list[Any]] = {
        "Create": [creation(node, one.rpartition("/")[2]) for one in names],
        "Start": [domain_pb2.StartDomainRequest(name=one) for one in names],
        "Stop": [domain_pb2.StopDomainRequest(name=one, mode=domain_pb2.STOP_MODE_FORCE) for one in names],
        "Delete": [domain_pb2.DeleteDomainRequest(name=one) for one in names],
    }
    for verb, requests in items.items():
        several = getattr(domain_pb2, f"Batch{verb}DomainsRequest")(parent=node, requests=requests)
        assert not [one for one in do("domains", f"Batch{verb}Domains", several).results if one.status.code]


def change_storage(do: Answered, node: str) -> None:
    """Lead pools and a volume through all that can be done to them."""
    pool = f"{node}/pools/{unique('pool')}"
    create = pool_pb2.CreatePoolRequest(parent=node, pool_id=pool.rpartition("/")[2], start=True)
    create.pool.spec.dir.SetInParent()
    now = do("pools", "CreatePool", create)
    update = pool_pb2.UpdatePoolRequest(pool=pool_pb2.Pool(name=pool, etag=now.etag, labels={"a": "b"}))
    update.update_mask.paths.append("labels")
    do("pools", "UpdatePool", update)
    do("pools", "RefreshPool", pool_pb2.RefreshPoolRequest(name=pool))
    volume = volume_pb2.CreateVolumeRequest(parent=pool, volume_id="disk")
    volume.volume.spec.format, volume.volume.spec.capacity_bytes = volume_pb2.VOLUME_FORMAT_RAW, MIB
    disk = do("volumes", "CreateVolume", volume)
    copy = volume_pb2.CreateVolumeRequest(parent=pool, volume_id="copy", source_volume=disk.name)
    copy.volume.SetInParent()
    do("volumes", "CreateVolume", copy)
    resize = volume_pb2.ResizeVolumeRequest(name=disk.name, etag=disk.etag, capacity_bytes=2 * MIB)
    disk = do("volumes", "ResizeVolume", resize)
    disk = do("volumes", "WipeVolume", volume_pb2.WipeVolumeRequest(name=disk.name, etag=disk.etag))
    gone = volume_pb2.DeleteVolumeRequest(name=disk.name, etag=disk.etag, expected_uid=disk.uid)
    do("volumes", "DeleteVolume", gone)
    do("volumes", "DeleteVolume", volume_pb2.DeleteVolumeRequest(name=f"{pool}/volumes/copy"))
    now = do("pools", "StopPool", pool_pb2.StopPoolRequest(name=pool))
    now = do("pools", "StartPool", pool_pb2.StartPoolRequest(name=pool, expected_uid=now.uid))
    do("pools", "StopPool", pool_pb2.StopPoolRequest(name=pool, expected_uid=now.uid))
    do("pools", "DeletePool", pool_pb2.DeletePoolRequest(name=pool, expected_uid=now.uid))
    applied = pool_pb2.UpdatePoolRequest(pool=pool_pb2.Pool(name=f"{pool}-two"), allow_missing=True)
    applied.pool.spec.dir.SetInParent()
    now = do("pools", "UpdatePool", applied)
    do("pools", "DeletePool", pool_pb2.DeletePoolRequest(name=now.name))


def change_networks(do: Answered, node: str) -> None:
    """Lead a network and a port through all that can be done to them."""
    name = f"{node}/networks/{unique('net')}"
    create = network_pb2.CreateNetworkRequest(parent=node, network_id=name.rpartition("/")[2])
    create.network.spec.isolated.SetInParent()
    now = do("networks", "CreateNetwork", create)
    update = network_pb2.UpdateNetworkRequest(network=network_pb2.Network(name=name, etag=now.etag, labels={"a": "b"}))
    update.update_mask.paths.append("labels")
    now = do("networks", "UpdateNetwork", update)
    port = do("ports", "CreatePort", port_pb2.CreatePortRequest(parent=name, port_id="p1", port=port_pb2.Port()))
    gone = port_pb2.DeletePortRequest(name=port.name, etag=port.etag, expected_uid=port.uid)
    do("ports", "DeletePort", gone)
    do("networks", "StartNetwork", network_pb2.StartNetworkRequest(name=name, expected_uid=now.uid))
    do("networks", "StopNetwork", network_pb2.StopNetworkRequest(name=name, expected_uid=now.uid))
    ended = network_pb2.DeleteNetworkRequest(name=name, expected_uid=now.uid)
    do("networks", "DeleteNetwork", ended)


def change_members(do: Answered, fleet: Fleet) -> None:
    """Lead a node that nobody is through all that can be done to it, with a token and a certificate."""
    name = f"nodes/{unique('node')}"
    machine = Machine(name.removeprefix("nodes/"))
    fleet.enrollment.EnrollNode(machine.request(token_of(fleet, name.removeprefix("nodes/"))))
    now = fleet.nodes.GetNode(node_pb2.GetNodeRequest(name=name))
    update = node_pb2.UpdateNodeRequest(node=node_pb2.Node(name=name, etag=now.etag, labels={"a": "b"}))
    update.update_mask.paths.append("labels")
    now = do("nodes", "UpdateNode", update)
    now = do("nodes", "CordonNode", node_pb2.CordonNodeRequest(name=name, etag=now.etag))
    now = do("nodes", "UncordonNode", node_pb2.UncordonNodeRequest(name=name, etag=now.etag))
    do("nodes", "DeleteNode", node_pb2.DeleteNodeRequest(name=name, expected_uid=now.uid))


NOT_IN_THE_CHAIN = {
    "virtfleet.common.v1/ReloadCertificates": "has no effect of its own to be done twice",
    "virtfleet.fleet.v1/CreateJoinToken": "its secret is told once: tests/integration/gateway/test_crashes.py",
    "virtfleet.fleet.v1/DeleteJoinToken": "answers with nothing: below",
    "virtfleet.fleet.v1/EnrollNode": "is known by the keys: tests/fleet/test_joining.py",
    "virtfleet.fleet.v1/IssueUserCertificate": "answers with a certificate: below",
    "virtfleet.fleet.v1/RenewCertificate": "is a node's",
    "virtfleet.fleet.v1/RevokeCertificate": "answers with what is: tests/integration/gateway/test_crashes.py",
    "virtfleet.storage.v1/UploadVolume": "streams: tests/integration/storage/test_transfers.py",
}


def test_every_change_is_answered_again_as_it_was(fleet: Fleet, nodes: list[str]) -> None:
    """Etags have changed and names are gone: neither stands in the way of an answer that has been given."""
    do = Answered(fleet)
    change_domains(do, nodes[0])
    change_storage(do, nodes[0])
    change_networks(do, nodes[0])
    change_members(do, fleet)
    before = everything(fleet, nodes[0])
    do.all_again()
    assert everything(fleet, nodes[0]) == before, "nothing was done a second time"
    built = (PROTOS / "IMPLEMENTED.txt").read_text()
    repeatable = {
        f"{method.containing_service.file.package}/{method.name}"
        for method in methods()
        if "request_id" in method.input_type.fields_by_name
        and f"{method.containing_service.full_name}/{method.name}\n" in built
    }
    assert do.methods | NOT_IN_THE_CHAIN.keys() == repeatable
    assert not do.methods & NOT_IN_THE_CHAIN.keys()


def test_a_certificate_and_the_end_of_a_token_are_asked_for_again(fleet: Fleet) -> None:
    user = unique("user")
    request = enrollment_pb2.IssueUserCertificateRequest(
        user=user, roles=["viewer"], request_id=str(uuid.uuid4()),
        certificate_request=Machine("n1").request("x").services[0].certificate_request,
    )  # fmt: skip
    first = fleet.enrollment.IssueUserCertificate(request)
    assert fleet.enrollment.IssueUserCertificate(request).certificate == first.certificate
    fleet.enrollment.RevokeCertificate(enrollment_pb2.RevokeCertificateRequest(name=first.certificate.certificate))
    assert fleet.enrollment.IssueUserCertificate(request).certificate == first.certificate
    made = enrollment_pb2.CreateJoinTokenRequest()
    made.join_token.spec.node = "nodes/nobody"
    token = fleet.enrollment.CreateJoinToken(made)
    gone = enrollment_pb2.DeleteJoinTokenRequest(name=token.name, expected_uid=token.uid, request_id=str(uuid.uuid4()))
    for _ in range(2):
        fleet.enrollment.DeleteJoinToken(gone)


# After a crash.


@pytest.mark.usefixtures("made_whole")
def test_what_a_request_id_means_outlives_a_crash(
    stand: Stand, environment: dict[str, str], people: dict[str, Credentials], run_folder: Path
) -> None:
    """The same body in another order of its maps, another body, and another caller, behind the death of all services."""
    id_, request_id = unique(), str(uuid.uuid4())
    name = f"{stand.node}/domains/{id_}"
    entries = [field(1, key) + field(2, value) for key, value in ((b"a", b"1"), (b"b", b"2"), (b"c", b"3"))]

    def encoded(labels: list[bytes]) -> bytes:
        body = b"".join(field(4, entry) for entry in labels) + spec()
        tail = field(3, id_.encode()) + field(91, request_id.encode())
        return field(1, stand.node.encode()) + field(2, body) + tail

    first = stand.wire(CREATE, encoded(entries))
    operation = operations_pb2.Operation.FromString(first)
    made = stand.fleet.wait(operation, domain_pb2.Domain)
    try:
        for place in ("compute", "storage", "network"):
            kill(run_folder, f"{stand.node.removeprefix('nodes/')}/{place}")
        kill(run_folder, "gateway")
        until(lambda: get(stand.fleet, name) == made, 30, "the domain is as it was")
        again = operations_pb2.Operation.FromString(stand.wire(CREATE, encoded(entries[::-1])))
        assert (again.name, again.done) == (operation.name, True), "the order of a map means nothing"
        error = refused(lambda: stand.wire(CREATE, encoded(entries[:-1])))
        assert refusal_of(error) == Refusal(INVALID, "REQUEST_ID_REUSED", ("request_id",))
        with caller(environment, people["admin"]) as other:
            request = repeatable(stand, request_id, id_, labels={"a": "1", "b": "2", "c": "3"})
            error = refused(lambda: other.domains.CreateDomain(request))
        assert refusal_of(error) == Refusal("ALREADY_EXISTS", "RESOURCE_EXISTS"), "what another got is not told"
        assert get(stand.fleet, name) == made
    finally:
        delete(stand.fleet, name)
