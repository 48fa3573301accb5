"""Bytes that no client of good will sends: each has a clear answer, and the servers serve on as before.

The seed is printed; `VIRTFLEET_SEED` sets it.
"""

from __future__ import annotations

import json
import os
import random
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import any_pb2, message_factory, struct_pb2
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import Message

from tests.fleet.rig import (
    SERVICES,
    Refusal,
    Wire,
    domain,
    field,
    get,
    pid_of,
    refusal_of,
    refused,
    small_spec,
    unique,
)
from tests.fleet.stand import CREATE, DOMAINS, Stand, everything, raw, spec
from tests.fleet.test_implemented import methods
from virtfleet.compute.v1 import domain_pb2
from virtfleet_client import Fleet
from virtfleet_client.errors import from_call

ROUNDS = 6
"""How many messages a method gets each way."""

CLEAR = {
    "OK",
    "INVALID_ARGUMENT",
    "NOT_FOUND",
    "FAILED_PRECONDITION",
    "OUT_OF_RANGE",
    "UNAUTHENTICATED",
    "PERMISSION_DENIED",
    "UNIMPLEMENTED",
    "RESOURCE_EXHAUSTED",
}

PLACES = [
    "",
    "-",
    "nodes/-",
    "nodes/n1",
    "nodes/n1/domains/none",
    "nodes/n1/pools/none",
    "nodes/n1/pools/none/volumes/none",
    "nodes/n1/networks/none/ports/none",
    "nodes/n1/services/compute",
    "nodes/n1/services/compute/operations/none",
    "nodes/n77/domains/none",
    "nodes/n1/domains/../../etc",
    "nodes/n1/domains/%2e%2e",
    "certificates/none",
    "operations/none",
]
FLEET_PLACES = ["", "-", "nodes/n77", "nodes/n77/x", "certificates/none", "joinTokens/none", "nodes/\u0301"]


@pytest.fixture(scope="module")
def seed() -> int:
    """Return the seed of this run."""
    found = int(os.environ.get("VIRTFLEET_SEED", "0")) or random.SystemRandom().randrange(1, 1 << 32)
    print(f"VIRTFLEET_SEED={found}")
    return found


@pytest.fixture(scope="module")
def folder(run_folder: Path) -> Path:
    """Return where the processes of the fleet have their files."""
    return Path(json.loads((run_folder / "fleet.json").read_text())["folder"])


@pytest.fixture
def unhurt(fleet: Fleet, run_folder: Path, folder: Path, nodes: list[str]) -> Iterator[None]:
    """Look afterwards, from outside: the same processes, not a traceback in their logs, everything as it was."""
    places = ["gateway", *(f"{node.removeprefix('nodes/')}/{service}" for node in nodes for service in SERVICES)]
    before = {place: pid_of(run_folder, place) for place in places}
    logs = {path: path.stat().st_size for path in [folder / f"{place}.log" for place in places] if path.exists()}
    state = everything(fleet, nodes[0])
    yield
    assert {place: pid_of(run_folder, place) for place in places} == before
    for process in before.values():
        assert Path(f"/proc/{process}").exists()
    for path, size in logs.items():
        with path.open("rb") as log:
            log.seek(size)
            told = log.read().decode(errors="replace")
        for sign in ("Traceback", "unexpected error", "Unexpected", "never retrieved"):
            assert sign not in told, f"{path}: {told[-3000:]}"
    assert everything(fleet, nodes[0]) == state
    with domain(fleet, nodes[0], spec=small_spec()) as made:
        assert get(fleet, made.name) == made


def junk(chance: random.Random, depth: int = 0) -> bytes:
    """Return some fields that may be anything."""
    parts: list[bytes] = []
    for _ in range(chance.randrange(5)):
        number = chance.choice([2, 3, 4, 5, 10, 40, 91, 92, 93, 9000, (1 << 29) - 1])
        kind = chance.randrange(5)
        if kind == 0:
            parts.append(field(number, chance.getrandbits(chance.choice([7, 31, 64]))))
        elif kind == 1:
            parts.append(field(number, chance.randbytes(chance.choice([0, 1, 5, 400]))))
        elif kind == 2 and depth < 6:
            parts.append(field(number, junk(chance, depth + 1)))
        elif kind == 3:
            parts.append(field(number, chance.choice([b"\xff\xfe", b"\xed\xa0\x80", "\u202e".encode(), b"\0"])))
        else:
            parts.append(chance.randbytes(chance.randrange(1, 12)))
    return b"".join(parts)


def message(chance: random.Random, method: MethodDescriptor) -> bytes:
    """Return a message of no good will; what it names is not there."""
    kind = chance.randrange(8)
    if kind == 0:
        return chance.randbytes(chance.choice([1, 3, 17, 300, 5000]))
    places = FLEET_PLACES if method.containing_service.file.package == "virtfleet.fleet.v1" else PLACES
    place = chance.choice(places).encode()
    number = 4 if method.input_type.name == "ListOperationsRequest" else 1
    first = method.input_type.fields_by_number[number]
    named = field(number, field(1, place) if first.message_type is not None else place)
    if kind == 1:
        return named * 2
    if kind == 2:
        return junk(chance) + named
    if kind == 3:
        return field(number, b"nodes/n1/domains/" + b"a" * chance.choice([64, 5000, 1 << 20]))
    if kind == 4:
        return field(number, chance.choice([b"\xff\xfe", b"nodes/\xed\xa0\x80", "nodes/n1\u200f".encode(), b"\0"]))
    whole = named + junk(chance)
    if kind == 5:
        return whole[: chance.randrange(len(whole) + 1)]
    if kind == 6:
        spoiled = bytearray(whole)
        for _ in range(3):
            spoiled[chance.randrange(len(spoiled))] = chance.getrandbits(8)
        # A name that is spoiled may be one that is there: of a node.
        return bytes(spoiled) if method.containing_service.file.package != "virtfleet.fleet.v1" else whole
    return whole


def answer(channel: grpc.Channel, method: MethodDescriptor, request: bytes, **options: Any) -> tuple[str, str]:
    """Call a method once and return code and reason; of a stream its first answer counts."""
    kind = f"{'stream' if method.client_streaming else 'unary'}_{'stream' if method.server_streaming else 'unary'}"
    stub = getattr(channel, kind)(f"/{method.containing_service.full_name}/{method.name}")
    try:
        got = stub(iter([request]) if method.client_streaming else request, timeout=10, **options)
        if method.server_streaming:
            next(got, None)
            got.cancel()
    except grpc.RpcError as error:
        failed: Any = error
        typed = from_call(failed.code(), failed.details(), tuple(failed.trailing_metadata() or ()))
        return typed.code().name, typed.reason
    return "OK", ""


@pytest.mark.usefixtures("unhurt")
@pytest.mark.parametrize("way", ["gateway", "compute", "storage", "network"])
def test_messages_of_no_good_will(wire: Wire, folder: Path, seed: int, way: str) -> None:
    channel = wire.channel if way == "gateway" else grpc.insecure_channel(f"unix:{folder}/n1/run/{way}/admin.sock")
    packages = {f"virtfleet.{way}.v1", "virtfleet.common.v1", "google.longrunning"}
    bad: list[str] = []
    try:
        for method in methods():
            if way != "gateway" and method.containing_service.file.package not in packages:
                continue
            chance = random.Random(f"{seed} {way} {method.full_name}")
            for number in range(ROUNDS):
                request = message(chance, method)
                code, reason = answer(channel, method, request)
                if code not in CLEAR or (code != "OK" and not reason):
                    bad.append(f"{method.full_name} {number}: {code} {reason} for {request[:200].hex()}")
    finally:
        if way != "gateway":
            channel.close()
    assert not bad, f"VIRTFLEET_SEED={seed}:\n" + "\n".join(bad)


NUMBERS = [0, 1, -1, 2, 63, 4096, 1 << 20, (1 << 31) - 1, -(1 << 31), (1 << 63) - 1, -(1 << 63)]
WORDS = [
    "",
    "a",
    "web",
    "../x",
    "/etc/passwd",
    "pools/p/volumes/v",
    "networks/n",
    "06:02:00:00:00:01",
    "10.0.0.0/8",
    "10.0.0.1",
    "fe80::/10",
    "::ffff:1.2.3.4",
    "q35",
    "x" * 300,
    "\u202ea",
    "a,b=c",
    "%s{0}",
    "-drive",
    "1e400",
]


def fill(found: Message, chance: random.Random, share: float, depth: int = 0) -> None:
    """Set a share of the fields to values of the right type, which is all that is right about them."""
    for one in found.DESCRIPTOR.fields:
        if chance.random() > share or depth > 5:
            continue
        if one.message_type is None:
            if one.is_repeated:
                getattr(found, one.name).extend(_scalar(one, chance) for _ in range(chance.randrange(3)))
            else:
                setattr(found, one.name, _scalar(one, chance))
        elif one.message_type.GetOptions().map_entry:
            _fill_map(getattr(found, one.name), one.message_type.fields_by_name["value"], chance, share, depth)
        elif one.is_repeated:
            for _ in range(chance.randrange(3)):
                fill(getattr(found, one.name).add(), chance, share, depth + 1)
        else:
            getattr(found, one.name).SetInParent()
            fill(getattr(found, one.name), chance, share, depth + 1)


def _fill_map(entries: Any, value: Any, chance: random.Random, share: float, depth: int) -> None:
    for _ in range(chance.randrange(3)):
        key = chance.choice(["root", "lan", "a-b", "A", "x.y/z", ""])
        if value.message_type is not None:
            fill(entries[key], chance, share, depth + 1)
        else:
            entries[key] = _scalar(value, chance)


def _scalar(one: Any, chance: random.Random) -> Any:
    if one.type == one.TYPE_ENUM:
        return chance.choice([value.number for value in one.enum_type.values])
    if one.type == one.TYPE_STRING:
        return chance.choice(WORDS)
    if one.type == one.TYPE_BYTES:
        return chance.randbytes(chance.randrange(9))
    if one.type == one.TYPE_BOOL:
        return chance.random() < 0.5
    if one.type in (one.TYPE_DOUBLE, one.TYPE_FLOAT):
        return chance.choice([0.0, -1.0, 0.5, float("nan"), float("inf")])
    bits = 31 if one.cpp_type in (one.CPPTYPE_INT32, one.CPPTYPE_UINT32) else 63
    least = 0 if one.cpp_type in (one.CPPTYPE_UINT32, one.CPPTYPE_UINT64) else -(1 << bits)
    return chance.choice([number for number in NUMBERS if least <= number < 1 << bits])


def planned(method: MethodDescriptor) -> bool:
    """Tell whether a method of a node answers with a plan when it is asked to."""
    package = method.containing_service.file.package
    return "validate_only" in method.input_type.fields_by_name and package in {
        f"virtfleet.{service}.v1" for service in SERVICES
    }


PLACED = {
    "pool": "nodes/n1/pools/none",
    "network": "nodes/n1/networks/none",
    "volume": "nodes/n1/pools/none/volumes/none",
    "port": "nodes/n1/networks/none/ports/none",
}
PLANS = int(os.environ.get("VIRTFLEET_PLANS", "12"))
"""How many plans each method is asked for."""


@pytest.mark.usefixtures("unhurt")
def test_plans_of_no_good_will(stand: Stand, wire: Wire, seed: int) -> None:
    """Every change that a node knows, filled with nonsense of the right types, as plans that change nothing."""
    bad: list[str] = []
    for method in filter(planned, methods()):
        chance = random.Random(f"{seed} plans {method.full_name}")
        for _ in range(PLANS):
            request: Any = message_factory.GetMessageClass(method.input_type)()
            fill(request, chance, chance.choice([0.03, 0.1, 0.25, 0.6]))
            first = method.input_type.fields_by_number[1]
            here = stand.node if first.name == "parent" else stand.domain.name
            if first.message_type is not None:
                getattr(request, first.name).name = PLACED.get(first.name, stand.domain.name)
            else:
                setattr(request, first.name, here)
            for one in method.input_type.fields:
                if one.name.endswith("_id") and one.name != "request_id":
                    setattr(request, one.name, "web")
            request.ClearField("request_id")
            request.validate_only = True
            code, reason = answer(wire.channel, method, request.SerializeToString())
            if code not in CLEAR | {"ABORTED", "ALREADY_EXISTS"} or (code != "OK" and not reason):
                bad.append(f"{method.full_name}: {code} {reason} for {str(request)[:600]}")
    assert not bad, f"VIRTFLEET_SEED={seed}:\n" + "\n".join(bad)


def deep(levels: int) -> bytes:
    """Return a Value in a list in a Value in a list …"""
    inner = field(3, b"x")
    for _ in range(levels):
        inner = field(6, field(1, inner))
    return inner


UNKNOWN = Refusal("INVALID_ARGUMENT", "UNKNOWN_FIELD", ("domain.spec.#900",))
NESTED = [
    (
        "lists in lists",
        field(9, field(2, deep(2000))),
        Refusal("INVALID_ARGUMENT", "UNKNOWN_FIELD", ("domain.spec.#9",)),
    ),
    ("a message of unknown fields in unknown fields", field(900, deep(400)), UNKNOWN),
    ("groups in groups", b"\xa3\x38" * 5000, Refusal("INVALID_ARGUMENT", "DOCUMENT_INVALID")),
    (
        "any in any",
        field(900, any_pb2.Any(type_url="type.googleapis.com/x.Y", value=b"\xff" * 100).SerializeToString()),
        UNKNOWN,
    ),
    ("a struct", field(900, struct_pb2.Struct(fields={"a": struct_pb2.Value()}).SerializeToString()), UNKNOWN),
]


@pytest.mark.usefixtures("unhurt")
@pytest.mark.parametrize(("nested", "wanted"), [row[1:] for row in NESTED], ids=[row[0] for row in NESTED])
def test_what_is_nested_without_end(stand: Stand, nested: bytes, wanted: Refusal) -> None:
    assert refusal_of(refused(lambda: raw(stand, spec(nested)))) == wanted


@pytest.mark.usefixtures("unhurt")
def test_maps_without_end(stand: Stand) -> None:
    many = b"".join(field(4, field(1, f"k{number}".encode()) + field(2, b"v")) for number in range(100_000))
    error = refused(lambda: raw(stand, many, spec()))
    assert (error.code().name, error.reason, error.fields[0]) == (
        "INVALID_ARGUMENT",
        "FIELD_OUT_OF_RANGE",
        "domain.labels",
    ), error
    disks = b"".join(field(40, field(1, f"d{number}".encode()) + field(2, b"")) for number in range(20_000))
    error = refused(lambda: raw(stand, spec(disks)))
    assert (error.code().name, error.reason) == ("INVALID_ARGUMENT", "FIELD_OUT_OF_RANGE"), error
    assert error.fields[0].startswith("domain.spec.disks"), error.fields[:3]


@pytest.mark.usefixtures("unhurt")
@pytest.mark.parametrize("text", [b"\xff", b"\xc0\xaf", b"\xed\xa0\x80", b"a\xf5"])
def test_what_is_no_text(stand: Stand, text: bytes) -> None:
    labels = field(4, field(1, b"a") + field(2, text))
    error = refused(lambda: raw(stand, labels, spec()))
    assert (error.code().name, error.reason) == ("INVALID_ARGUMENT", "DOCUMENT_INVALID"), error
    error = refused(lambda: stand.wire(CREATE, field(1, stand.node.encode() + text) + field(3, b"web")))
    assert (error.code().name, error.reason, error.fields) == ("INVALID_ARGUMENT", "NAME_MALFORMED", ("parent",)), error


@pytest.mark.usefixtures("unhurt")
def test_metadata_of_no_good_will(stand: Stand) -> None:
    request = domain_pb2.GetDomainRequest(name=stand.domain.name)
    hundred = tuple((f"x-many-{number}", "y") for number in range(100))
    assert domain_pb2.Domain.FromString(stand.wire(f"{DOMAINS}/GetDomain", request, metadata=hundred)) == stand.domain
    for metadata in (
        tuple((f"x-large-{number}", "y" * 1000) for number in range(100)),
        (("x-huge", "y" * 500_000),),
        (("x-bytes-bin", os.urandom(100_000)),),
    ):
        error = refused(lambda metadata=metadata: stand.wire(f"{DOMAINS}/GetDomain", request, metadata=metadata))  # type: ignore[misc]  # the round's own
        assert error.code().name == "RESOURCE_EXHAUSTED", error
    for key, value, wanted in (
        ("x-virtfleet-node", "n1/" + "x" * 300, "INVALID_ARGUMENT NAME_MALFORMED"),
        ("x-virtfleet-node", "../n2", "INVALID_ARGUMENT NAME_MALFORMED"),
        ("traceparent", "zz-", "OK"),
    ):
        assert _outcome(stand, request, ((key, value),)) == wanted
    assert get(stand.fleet, stand.domain.name) == stand.domain


def _outcome(stand: Stand, request: domain_pb2.GetDomainRequest, metadata: tuple[tuple[str, str], ...]) -> str:
    try:
        stand.wire(f"{DOMAINS}/GetDomain", request, metadata=metadata)
    except grpc.RpcError as error:
        failed: Any = error
        return f"{failed.code().name} {failed.reason}"
    return "OK"


# Below gRPC: HTTP/2 by hand.

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    """Return one frame of HTTP/2."""
    return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload


def headers(*pairs: tuple[str, str]) -> bytes:
    """Return literal header fields (RFC 7541, 6.2.2)."""
    return b"".join(
        b"\0" + bytes([len(name)]) + name.encode() + bytes([len(value)]) + value.encode() for name, value in pairs
    )


def call_headers(*more: tuple[str, str]) -> bytes:
    """Return those of a call."""
    return headers(
        (":method", "POST"),
        (":scheme", "https"),
        (":path", f"/{DOMAINS}/GetDomain"),
        (":authority", "gateway"),
        ("content-type", "application/grpc"),
        ("te", "trailers"),
        *more,
    )


BODY = b"\1" + (5).to_bytes(4, "big") + b"hello"
RAW: list[tuple[str, bytes]] = [
    ("no HTTP/2", b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"),
    ("noise", bytes(range(256)) * 20),
    ("unknown compression", frame(1, 4, 1, call_headers(("grpc-encoding", "snappy"))) + frame(0, 1, 1, BODY)),
    ("compressed by nothing", frame(1, 4, 1, call_headers()) + frame(0, 1, 1, BODY)),
    ("a length that lies", frame(1, 4, 1, call_headers()) + frame(0, 1, 1, b"\0\xff\xff\xff\xffx")),
    ("no call", frame(1, 5, 1, headers((":method", "TRACE"), (":path", "/"), (":scheme", "https")))),
    ("a timeout of nonsense", frame(1, 4, 1, call_headers(("grpc-timeout", "-1Q"))) + frame(0, 1, 1, BODY)),
    ("headers without end", frame(1, 0, 1, call_headers()) + frame(9, 0, 1, b"\0" * 9000) * 40),
    ("pings", frame(6, 0, 0, b"12345678") * 2000),
    ("settings", frame(4, 0, 0, b"\0\4\x7f\xff\xff\xff") * 2000),
    ("resets", b"".join(frame(1, 4, n, call_headers()) + frame(3, 0, n, b"\0\0\0\x08") for n in range(1, 2001, 2))),
    ("a window that overflows", frame(8, 0, 0, b"\x7f\xff\xff\xff") * 3),
]


TOLD = {
    "unknown compression": grpc.StatusCode.INTERNAL,
    "compressed by nothing": grpc.StatusCode.INTERNAL,
    "a timeout of nonsense": grpc.StatusCode.INTERNAL,
    "a length that lies": grpc.StatusCode.RESOURCE_EXHAUSTED,
}
"""What the library of gRPC itself answers before any code of ours is asked; to the others it hangs up or says nothing."""


@pytest.mark.usefixtures("unhurt")
@pytest.mark.parametrize(("name", "below"), RAW, ids=[row[0] for row in RAW])
def test_what_is_below_grpc(environment: dict[str, str], folder: Path, name: str, below: bytes) -> None:
    host, _, port = environment["VIRTFLEET_ADDRESS"].rpartition(":")
    context = ssl.create_default_context(cafile=environment["VIRTFLEET_CA_FILE"])
    context.check_hostname = False
    context.load_cert_chain(environment["VIRTFLEET_CERT_FILE"], environment["VIRTFLEET_KEY_FILE"])
    context.set_alpn_protocols(["h2"])
    start = b"" if below.startswith((b"GET", b"\0\1\2")) else PREFACE + frame(4, 0, 0, b"")
    with context.wrap_socket(socket.create_connection((host, int(port)), timeout=5)) as connection:
        told = [_talk(connection, start + below, is_told=name in TOLD)]
    with socket.socket(socket.AF_UNIX) as plain:
        plain.settimeout(5)
        plain.connect(str(folder / "n1/run/compute/admin.sock"))
        told.append(_talk(plain, start + below, is_told=name in TOLD))
    if name in TOLD:
        number = str(TOLD[name].value[0]).encode()
        for heard in told:
            assert b"grpc-status" + bytes([len(number)]) + number in heard, heard


def _talk(connection: socket.socket, below: bytes, *, is_told: bool) -> bytes:
    """Send, and return what comes back: the first of it, or all up to the status of the call."""
    got = b""
    try:
        connection.sendall(below)
        while more := connection.recv(4096):
            got += more
            if not is_told or b"grpc-message" in got:
                break
    except (ConnectionError, ssl.SSLError):
        return got
    return got


PATHS = ["/etc/shadow", "../../../etc/passwd", "/proc/self/environ", "/dev/sda", "a\0b", "//etc//passwd", "/tmp/./x"]


@pytest.mark.usefixtures("unhurt")
@pytest.mark.parametrize("path", PATHS)
def test_paths_that_lead_out(stand: Stand, path: str) -> None:
    """Ids and references cannot be paths, and a path of a pool is plain and absolute."""
    from virtfleet.storage.v1 import pool_pb2, volume_pb2

    volume = volume_pb2.CreateVolumeRequest(parent=f"{stand.node}/pools/p", volume_id=path)
    error = refused(lambda: stand.fleet.volumes.CreateVolume(volume))
    assert (error.code().name, error.reason, error.fields) == ("INVALID_ARGUMENT", "NAME_MALFORMED", ("volume_id",))
    wanted = small_spec()
    wanted.disks["root"].volume = f"pools/p/volumes/{path}"
    request = domain_pb2.CreateDomainRequest(parent=stand.node, domain_id=unique(), domain={"spec": wanted})  # type: ignore[arg-type]  # protobuf takes dictionaries
    error = refused(lambda: stand.fleet.domains.CreateDomain(request))
    assert refusal_of(error) == Refusal("INVALID_ARGUMENT", "NAME_MALFORMED", ("domain.spec.disks.root.volume",))
    if path.startswith("/") and "//" not in path and "/./" not in path:
        return
    pool = pool_pb2.CreatePoolRequest(parent=stand.node, pool_id=unique("pool"))
    pool.pool.spec.dir.SetInParent()
    pool.pool.spec.target_path = path
    error = refused(lambda: stand.fleet.pools.CreatePool(pool))
    assert refusal_of(error) == Refusal("INVALID_ARGUMENT", "FIELD_OUT_OF_RANGE", ("pool.spec.target_path",))
