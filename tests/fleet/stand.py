"""The place where refusals are tried: a stopped domain, calls around it, and a picture of all that its node has."""

from __future__ import annotations

import json
import os
import re
import sqlite3
import subprocess
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from google.protobuf import field_mask_pb2

from tests.fleet.rig import (
    SERVICES,
    Wire,
    create,
    creation,
    delete,
    field,
    small_spec,
    unique,
)
from virtfleet.compute.v1 import domain_pb2
from virtfleet.network.v1 import network_pb2
from virtfleet.storage.v1 import pool_pb2
from virtfleet_client import Fleet

DOMAINS = "virtfleet.compute.v1.DomainService"
CREATE = f"{DOMAINS}/CreateDomain"
INVALID = "INVALID_ARGUMENT"


@dataclass(frozen=True, slots=True)
class Stand:
    """Is what a row of the tables works with."""

    fleet: Fleet
    wire: Wire
    node: str
    other_node: str
    domain: domain_pb2.Domain


def everything(fleet: Fleet, node: str) -> dict[str, object]:
    """Return all that a node and the gateway have: as the API tells it, as the stores have it, and as the host does."""
    lists: list[tuple[Any, Any]] = [
        (fleet.domains.ListDomains, domain_pb2.ListDomainsRequest),
        (fleet.pools.ListPools, pool_pb2.ListPoolsRequest),
        (fleet.networks.ListNetworks, network_pb2.ListNetworksRequest),
    ]
    told = [
        resource.name.encode() + resource.etag.encode() + resource.spec.SerializeToString(deterministic=True)
        for method, request in lists
        for resource in fleet.pages(method, request(parent=node))
    ]
    return {"told": told, **outside(node)}


def outside(node: str) -> dict[str, object]:
    """Return what a node and the gateway have, without asking either: what `everything` does beside the API."""
    known = json.loads((Path(os.environ["VIRTFLEET_RUN"]) / "fleet.json").read_text())
    return on_the_host(Path(known["folder"]), node.removeprefix("nodes/"), known)


STORES = {"gateway": "gateway/gateway.db", **{name: f"{{node}}/state/{name}.db" for name in SERVICES}}
_UID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
LASTING = ("domain", "pool", "volume", "network", "port", "node", "join_token", "certificate")
"""What nobody but a caller makes or ends; hosts, drivers and leases come and go by themselves."""


def on_the_host(folder: Path, node: str, known: Any) -> dict[str, object]:
    """Return what is in the files and in the kernel: rows of the stores, files, who may read them, guests, links, rules."""
    found: dict[str, object] = {}
    for name, place in STORES.items():
        file = folder / place.format(node=node)
        with closing(sqlite3.connect(f"file:{file}?mode=ro", uri=True, timeout=10)) as store:
            marks = ",".join("?" * len(LASTING))
            rows = f"SELECT kind, name, uid, generation FROM resources WHERE kind IN ({marks}) ORDER BY name"
            found[name] = store.execute(rows, LASTING).fetchall()
            found[f"{name}, at work"] = store.execute("SELECT id FROM operations WHERE done = 0").fetchall()
    base = folder / node
    found["files"] = sorted(
        str(path.relative_to(base)) for place in ("pools", "run/launcher/guests") for path in (base / place).rglob("*")
    )
    found["access"] = sorted(access for path in (base / "pools").rglob("*") for access in _access(path, base))
    namespace = f"virtfleet-{known['tag']}-{node}"
    found["guests and daemons"] = sorted(_guests_and_daemons(namespace))
    links = json.loads(_output("ip", "-n", namespace, "-j", "link"))
    found["links"] = sorted(link["ifname"] for link in links)
    rules = _output("ip", "netns", "exec", namespace, "nft", "-j", "list", "ruleset")
    found["rules"] = re.sub(r'"(handle|packets|bytes)": \d+', "", rules)
    return found


def _access(path: Path, base: Path) -> Iterator[tuple[object, ...]]:
    """Yield whose a file is and who else may read it: guests are given theirs by owner and access list."""
    with suppress(FileNotFoundError):  # gone since it was listed
        status = path.lstat()
        lists = [(name, os.getxattr(path, name, follow_symlinks=False)) for name in _names_of_lists(path)]
        yield str(path.relative_to(base)), status.st_uid, status.st_gid, status.st_mode, lists


def _names_of_lists(path: Path) -> list[str]:
    return sorted(os.listxattr(path, follow_symlinks=False))


def _guests_and_daemons(namespace: str) -> Iterator[str]:
    """Yield program and uid of each guest and each dnsmasq in a namespace."""
    for process in _output("ip", "netns", "pids", namespace).split():
        with suppress(FileNotFoundError, ProcessLookupError):  # ended since it was listed
            command = Path(f"/proc/{process}/cmdline").read_bytes().decode(errors="replace")
            program = Path(command.partition("\0")[0]).name
            uid = _UID.search(command)
            if uid and program.startswith(("qemu-system", "dnsmasq")):
                yield f"{program} {uid[0]}"


def _output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=30).stdout


def update(stand: Stand, *paths: str, changed: domain_pb2.Domain | None = None, **fields: Any) -> object:
    """Change the domain of the stand."""
    wanted = changed or domain_pb2.Domain(name=stand.domain.name)
    mask = field_mask_pb2.FieldMask(paths=paths)
    return stand.fleet.domains.UpdateDomain(
        domain_pb2.UpdateDomainRequest(domain=wanted, update_mask=mask, **fields), timeout=10
    )


def listed(stand: Stand, **fields: Any) -> object:
    """List the domains of the node."""
    fields.setdefault("parent", stand.node)
    return stand.fleet.domains.ListDomains(domain_pb2.ListDomainsRequest(**fields), timeout=10)


def page_token(stand: Stand, **fields: Any) -> str:
    """Return the token of the second page of a list."""
    fields.setdefault("parent", stand.node)
    others = [create(stand.fleet, stand.node, unique("page")) for _ in range(2)]
    try:
        answer = stand.fleet.domains.ListDomains(domain_pb2.ListDomainsRequest(page_size=1, **fields), timeout=10)
    finally:
        for made in others:
            delete(stand.fleet, made.name)
    token: str = answer.next_page_token
    assert token
    return token


def made(stand: Stand, domain_id: str = "", parent: str = "", **fields: Any) -> object:
    """Make a domain."""
    return stand.fleet.domains.CreateDomain(creation(parent or stand.node, domain_id, **fields), timeout=10)


def raw(stand: Stand, *parts: bytes, domain_id: str = "") -> object:
    """Make a domain from the bytes of its message."""
    request = field(1, stand.node.encode()) + field(2, b"".join(parts)) + field(3, (domain_id or unique()).encode())
    return stand.wire(CREATE, request)


def spec(*parts: bytes) -> bytes:
    """Return `spec` of a domain as bytes."""
    return field(10, small_spec().SerializeToString() + b"".join(parts))


def with_interface(address: str) -> Any:
    """Return a spec with one interface."""
    found = small_spec()
    found.interfaces["lan"].mac_address = address
    return found


def with_disk(volume: str) -> Any:
    """Return a spec with one disk."""
    found = small_spec()
    found.disks["root"].volume = volume
    return found
