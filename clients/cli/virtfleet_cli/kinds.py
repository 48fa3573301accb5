"""The kinds of resources that the command knows: how they are called, read, made and shown.

Everything that can be is derived from the descriptors; what people want to see in a table is said here.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

import click
from click.shell_completion import CompletionItem


@dataclass(frozen=True, slots=True)
class Column:
    """Is one column of a table.

    Attributes:
        title: Its head.
        value: Takes it from a resource.
        wide: Whether it is left out unless asked for.
    """

    title: str
    value: Callable[[Any], str]
    wide: bool = False


@dataclass(frozen=True)
class Kind:
    """Is one kind of resource.

    Attributes:
        noun: Its singular, as in `virtfleet get domain`.
        plural: Its plural; both are understood, and so are the short names.
        short: Short names.
        module: Where its messages are.
        message: The message of the resource; its methods are `ListXs`, `GetX`, `CreateX`, ….
        service: The service of its methods.
        collection: The collections of its name behind the node: `pools/{}/volumes/{}` for a volume. The last one is
            that of the kind itself. A kind of the fleet (nodes) has no node in front.
        columns: What a table shows behind the name.
    """

    noun: str
    plural: str
    short: tuple[str, ...]
    module: str
    message: str
    service: str
    collection: tuple[str, ...]
    columns: tuple[Column, ...]
    of_fleet: bool = False

    @cached_property
    def messages(self) -> Any:  # noqa: ANN401 - a generated module
        """The generated module of its messages."""
        return importlib.import_module(self.module)

    @cached_property
    def message_class(self) -> Any:  # noqa: ANN401 - a generated class
        """The class of the resource."""
        return getattr(self.messages, self.message)

    def method_name(self, verb: str) -> str:
        """Return the name of a method: `ListDomains`, `GetDomain`."""
        return f"{verb}{self.message}s" if verb == "List" else f"{verb}{self.message}"

    @cached_property
    def methods(self) -> frozenset[str]:
        """The names of all methods of its service."""
        service = self.messages.DESCRIPTOR.services_by_name[self.service]
        return frozenset(method.name for method in service.methods)

    def request(self, verb: str) -> Any:  # noqa: ANN401 - a generated message
        """Return an empty request of a method."""
        return getattr(self.messages, f"{self.method_name(verb)}Request")()

    def stub(self, fleet: Any) -> Any:  # noqa: ANN401 - a generated stub
        """Return the stub of its service."""
        grpc_module = importlib.import_module(f"{self.module}_grpc")
        return getattr(grpc_module, f"{self.service}Stub")(fleet.channel)

    def node_of(self, name: str) -> str:
        """Return the id of the node of a name; empty: it has none."""
        parts = name.split("/")
        return parts[1] if parts[0] == "nodes" and not self.of_fleet else ""

    def id_of(self, name: str) -> str:
        """Return a name as people say it on one node: `web`, `pool/volume`, `network/port`."""
        parts = name.split("/")
        return "/".join(parts[1::2] if self.of_fleet else parts[3::2])

    def parent(self, node: str, given: str = "") -> str:
        """Return the parent of a list on a node (`-`: all)."""
        if self.of_fleet:
            return ""
        found = f"nodes/{node or '-'}"
        outer = self.collection[:-1]
        ids = given.split("/") if given else ["-"] * len(outer)
        for collection, id_ in zip(outer, ids, strict=True):
            found += f"/{collection}/{id_}"
        return found

    def name(self, given: str, node: str) -> str:
        """Return the full name of what a person has given: `web`, `n1/web`, `pool/volume`, or the whole name.

        Args:
            given: What was given.
            node: The node that was named by an option; empty: none.

        Raises:
            ClickException: It can be no name of the kind.
        """
        parts = given.split("/")
        first = "nodes" if not self.of_fleet else self.collection[0]
        if parts[0] == first and len(parts) > 1:
            return given
        wanted = len(self.collection)
        if self.of_fleet and len(parts) == wanted:
            return "/".join(f"{collection}/{id_}" for collection, id_ in zip(self.collection, parts, strict=True))
        if not self.of_fleet and len(parts) == wanted + 1:
            node, parts = parts[0], parts[1:]
        if not self.of_fleet and len(parts) == wanted:
            tail = "/".join(f"{collection}/{id_}" for collection, id_ in zip(self.collection, parts, strict=True))
            return f"nodes/{node or '-'}/{tail}"
        form = "/".join([*([] if self.of_fleet else ["[NODE]"]), *(one.rstrip("s").upper() for one in self.collection)])
        raise click.ClickException(f"`{given}` is no name of a {self.noun}: {form}, or the whole name")


def enum_name(message: Any, field: str) -> str:  # noqa: ANN401 - any message
    """Return an enum field as people read it: `RUNNING` for DOMAIN_STATE_RUNNING."""
    descriptor = message.DESCRIPTOR.fields_by_name[field].enum_type
    value = descriptor.values_by_number.get(getattr(message, field))
    if value is None:
        return str(getattr(message, field))
    prefix = "_".join(_words(descriptor.name)).upper() + "_"
    text: str = value.name.removeprefix(prefix)
    return "" if text == "UNSPECIFIED" else text


def _words(name: str) -> list[str]:
    words: list[str] = []
    for letter in name:
        if letter.isupper() or not words:
            words.append("")
        words[-1] += letter
    return words


def bytes_text(count: int) -> str:
    """Return a number of bytes as people read it."""
    size, unit = float(count), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if size < 1024 or unit == "TiB":
            break
        size /= 1024
    return f"{size:.0f} {unit}" if size >= 10 or unit == "B" else f"{size:.1f} {unit}"


def age(timestamp: Any) -> str:  # noqa: ANN401 - a Timestamp
    """Return how long ago something was: `5s`, `3m`, `2h`, `4d`; empty: never."""
    import time

    if not timestamp.seconds:
        return ""
    seconds = max(0, int(time.time() - timestamp.seconds))
    for limit, unit, size in ((120, "s", 1), (7200, "m", 60), (172_800, "h", 3600)):
        if seconds < limit:
            return f"{seconds // size}{unit}"
    return f"{seconds // 86_400}d"


def _labels(resource: Any) -> str:  # noqa: ANN401 - any resource
    return ",".join(f"{key}={value}" for key, value in sorted(resource.labels.items()))


def _of_host(node: Any, text: str) -> str:  # noqa: ANN401 - a Node
    """Return a figure of a node's host; `-` where the gateway has not read that: no host is without processors."""
    return text if node.status.capacity.vcpu_count else "-"


_STATE: Final = Column("STATE", lambda one: enum_name(one.status, "state"))
_AGE: Final = Column("AGE", lambda one: age(one.create_time))
_LABELS: Final = Column("LABELS", _labels, wide=True)
_UID: Final = Column("UID", lambda one: one.uid, wide=True)

KINDS: Final = (
    Kind(
        "domain",
        "domains",
        ("dom", "vm", "vms"),
        "virtfleet.compute.v1.domain_pb2",
        "Domain",
        "DomainService",
        ("domains",),
        (
            _STATE,
            Column("VCPUS", lambda one: str(one.status.resolved_spec.cpu.vcpu_count or "")),
            Column("MEMORY", lambda one: bytes_text(one.status.resolved_spec.memory.maximum_bytes)),
            Column("ADDRESSES", lambda one: ",".join(address.address for address in one.status.addresses)),
            _AGE,
            Column("DRIVER", lambda one: one.status.resolved_spec.driver, wide=True),
            Column("PID", lambda one: str(one.status.pid or ""), wide=True),
            _LABELS,
            _UID,
        ),
    ),
    Kind(
        "pool",
        "pools",
        (),
        "virtfleet.storage.v1.pool_pb2",
        "Pool",
        "PoolService",
        ("pools",),
        (
            _STATE,
            Column("CAPACITY", lambda one: bytes_text(one.status.capacity_bytes)),
            Column("AVAILABLE", lambda one: bytes_text(one.status.available_bytes)),
            _AGE,
            _LABELS,
            _UID,
        ),
    ),
    Kind(
        "volume",
        "volumes",
        ("vol", "vols"),
        "virtfleet.storage.v1.volume_pb2",
        "Volume",
        "VolumeService",
        ("pools", "volumes"),
        (
            Column("FORMAT", lambda one: enum_name(one.spec, "format")),
            Column("CAPACITY", lambda one: bytes_text(one.status.capacity_bytes)),
            Column("ALLOCATION", lambda one: bytes_text(one.status.allocation_bytes)),
            Column("USED BY", lambda one: ",".join(item.domain for item in one.status.attachments)),
            _AGE,
            _LABELS,
            _UID,
        ),
    ),
    Kind(
        "network",
        "networks",
        ("net", "nets"),
        "virtfleet.network.v1.network_pb2",
        "Network",
        "NetworkService",
        ("networks",),
        (_STATE, Column("BRIDGE", lambda one: one.status.bridge_name), _AGE, _LABELS, _UID),
    ),
    Kind(
        "port",
        "ports",
        (),
        "virtfleet.network.v1.port_pb2",
        "Port",
        "PortService",
        ("networks", "ports"),
        (
            _STATE,
            Column("MAC", lambda one: one.status.mac_address),
            Column("ADDRESSES", lambda one: ",".join(one.status.addresses)),
            _AGE,
            _LABELS,
            _UID,
        ),
    ),
    Kind(
        "node",
        "nodes",
        (),
        "virtfleet.fleet.v1.node_pb2",
        "Node",
        "NodeService",
        ("nodes",),
        (
            _STATE,
            Column("SCHEDULABLE", lambda one: "yes" if one.spec.schedulable else "no"),
            Column("DOMAINS", lambda one: _of_host(one, str(one.status.allocated.domain_count))),
            Column("MEMORY", lambda one: _of_host(one, bytes_text(one.status.allocatable.memory_bytes))),
            Column("SEEN", lambda one: age(one.status.last_seen_time)),
            Column("REASON", lambda one: one.status.reason),
            _AGE,
            _LABELS,
            _UID,
        ),
        of_fleet=True,
    ),
)
"""All kinds, in the order in which help shows them."""

BY_NAME: Final[Mapping[str, Kind]] = {name: kind for kind in KINDS for name in (kind.noun, kind.plural, *kind.short)}


EPILOG: Final = (
    "KIND is one of " + ", ".join(" | ".join((kind.plural, *kind.short)) for kind in KINDS) + "; or singular."
)
"""What the help of commands with a KIND ends with."""


class KindType(click.ParamType["Kind"]):
    """Is a parameter that names a kind."""

    name = "kind"

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Return the plurals and singulars that begin so."""
        del ctx, param
        words = [word for kind in KINDS for word in (kind.plural, kind.noun)]
        return [CompletionItem(word) for word in words if word.startswith(incomplete.lower())]

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Kind:  # noqa: ANN401 - click's own
        """Return the kind."""
        if isinstance(value, Kind):
            return value
        found = BY_NAME.get(str(value).lower())
        if found is None:
            import difflib

            near = difflib.get_close_matches(str(value).lower(), BY_NAME, 1)
            hint = f"; did you mean `{near[0]}`?" if near else f": {', '.join(kind.plural for kind in KINDS)}"
            self.fail(f"there is no kind `{value}`{hint}", param, ctx)
        return found
