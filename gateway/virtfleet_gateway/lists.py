"""Lists, batch reads and single reads over all nodes: concatenations of the bytes that nodes have sent.

Lists are ordered by node and name. A page token holds both, so pages are stable while nodes come and go. A node whose
watch is not live is named in `unreachable`, and its resources are left out; with `allow_stale` they are given as last
seen, and `observe_time` says when. `read_through` asks the nodes instead.
"""

from __future__ import annotations

import bisect
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, cast

from google.protobuf import message_factory

from virtfleet.type.v1 import resource_pb2
from virtfleet_gateway import wire
from virtfleet_gateway.channels import unknown
from virtfleet_gateway.feed import TOKEN_LIMIT_CHARACTERS, encode_tokens
from virtfleet_gateway.shapes import BASIC
from virtfleet_gateway.source import LIVE, set_time
from virtfleet_service import filters, tokens
from virtfleet_service.changes import field_bytes, field_text
from virtfleet_service.errors import (
    AmbiguousName,
    NameMalformed,
    NodeUnreachable,
    PageTokenInvalid,
    ResourceNotFound,
    VirtfleetError,
)
from virtfleet_service.names import is_uid

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from google.protobuf.descriptor import Descriptor, MethodDescriptor
    from google.protobuf.message import Message

    from virtfleet_gateway.answers import Answer
    from virtfleet_gateway.fanout import FanOut
    from virtfleet_gateway.index import PackageIndex
    from virtfleet_gateway.shapes import Entry, Kind
    from virtfleet_gateway.source import Source
    from virtfleet_service.call import Call

PAGE_SIZE: Final = 500
PAGE_SIZE_LIMIT: Final = 5000
PAGE_BYTES: Final = 1 << 20
SCAN_SECONDS: Final = 0.05
"""How long one page may look for matches before it ends, short or empty, with a token."""
SETTLE_SECONDS: Final = 2.0
ASKED_AT_ONCE: Final = 64
"""How many nodes are asked side by side for one page: each may answer a mebibyte."""

_ANY_NODE = "nodes/-"


@dataclass(slots=True)
class _Page:
    parts: list[bytes] = field(default_factory=list)
    used_bytes: int = 0
    count: int = 0
    following: str = ""
    place: str = ""
    """Where a watch goes on from the list."""
    unreachable: list[resource_pb2.NodeFailure] = field(default_factory=list)
    freshness: list[resource_pb2.NodeFreshness] = field(default_factory=list)

    def add(self, body: bytes) -> None:
        self.parts.append(b"\x0a")
        self.parts.append(wire.varint(len(body)))
        self.parts.append(body)
        self.used_bytes += len(body)
        self.count += 1


class FleetReads:
    """Answers the reads of one package for the parent `nodes/-`.

    Args:
        index: The index of the package.
        fan_out: Asks nodes.
        key: Authenticates page tokens.
    """

    def __init__(self, index: PackageIndex, fan_out: FanOut, key: bytes) -> None:
        self.index = index
        self._fan_out = fan_out
        self._key = key

    # Lists

    async def list_indexed(self, kind: Kind, method: MethodDescriptor, request: Any, call: Call) -> bytes:  # noqa: ANN401
        """Answer a List method from the index.

        Raises:
            PageTokenInvalid: The token is of another list.
            FilterSyntax: The filter does not parse.
        """
        if request.read_through:
            return await self.list_live(method, request, call, counted=kind)
        await self.index.settled(min(SETTLE_SECONDS, (call.remaining() or SETTLE_SECONDS * 2) / 2))
        binding = tokens.binding_of(method.full_name, request.parent, request.filter, request.view == BASIC)
        start_node, after, page = self._start(binding, request.page_token, method)
        matches = filters.compile_filter(request.filter, kind.message) if request.filter else None
        size = min(request.page_size or PAGE_SIZE, PAGE_SIZE_LIMIT)
        until = time.monotonic() + SCAN_SECONDS
        last = ("", "")
        looked = False
        for node in self._nodes_from(start_node):
            source = self.index.sources[node]
            if not self._stands(source, page, allow_stale=request.allow_stale):
                last = (node, "")
                continue
            for entry in self._below(source, kind, request.parent, after if node == start_node else ""):
                full = page.count >= size or (page.count and page.used_bytes + len(entry.full) > PAGE_BYTES)
                # One at least, however long it took to begin: a page that comes no further would be asked for for ever.
                if full or (looked and time.monotonic() > until):
                    page.following = self._seal(binding, *last, page.place)
                    break
                looked = True
                last = (node, entry.name)
                if (matches is None or entry.holds(request.filter, matches)) and call.may_see(entry.name):
                    page.add(entry.seen(request.view))
            if page.following:
                break
            last = (node, "\uffff")
        return self._reply(method, page)

    async def list_live(
        self,
        method: MethodDescriptor,
        request: Any,  # noqa: ANN401
        call: Call,
        *,
        counted: Kind | None,
    ) -> bytes:
        """Answer a List or stats method by asking the nodes themselves.

        Args:
            method: The method.
            request: Its request for all nodes.
            call: The call.
            counted: The kind whose number on each node says how many of them a page needs; None: unknown.

        Raises:
            PageTokenInvalid: The token is of another list.
            FilterSyntax: The filter does not parse.
        """
        if request.filter:
            # Refused here once, and not by each node as something that keeps it from answering.
            filters.compile_filter(request.filter, counted.message if counted is not None else _listed(method))
        if getattr(request, "names", ()):
            return await self._list_named(method, request, call)
        basic = getattr(request, "view", 0) == BASIC
        binding = tokens.binding_of("live", method.full_name, request.parent, request.filter, basic)
        node_after, node_token, page = self._start(binding, request.page_token, method)
        size = min(request.page_size or PAGE_SIZE, PAGE_SIZE_LIMIT)
        waiting = self._nodes_from(node_after)
        late = False
        while waiting and page.count < size and not late:
            # What has been waited for once has taken the others' time: they have their own with the next page.
            asked = self._enough(waiting, size - page.count, counted)[:ASKED_AT_ONCE]
            waiting = waiting[len(asked) :]
            requests: dict[str, bytes] = {}
            left = size - page.count
            for node in asked:
                requests[node] = _for_node(request, node, left, node_token if node == node_after else "")
            for answer in await self._fan_out.ask(method, self.index.shape.service, requests, call):
                late = late or answer.late
                if not page.following:
                    self._take(answer, page, size, binding)
            if page.following:
                break
        if waiting and not page.following:
            page.following = self._seal(binding, waiting[0], "", page.place)
        return self._reply(method, page)

    def _take(self, answer: Answer, page: _Page, size: int, binding: bytes) -> None:
        """Add the answer of one node to a page, or end the page before it."""
        if isinstance(answer.error, ResourceNotFound):
            # It has no such pool or network: nothing is there, as in the index.
            page.freshness.append(_now(answer.node))
            return
        if answer.error is not None:
            source = self.index.sources.get(answer.node)
            page.unreachable.append(_failure(answer.node, answer.error, source))
            return
        items, following = answer.items, answer.next_page_token
        if page.count and (page.count + len(items) > size or page.used_bytes + sum(map(len, items)) > PAGE_BYTES):
            page.following = self._seal(binding, answer.node, "", page.place)
            return
        for item in items:
            page.add(item)
        page.freshness.append(_now(answer.node))
        if following:
            page.following = self._seal(binding, answer.node, following, page.place)

    async def _list_named(self, method: MethodDescriptor, request: Any, call: Call) -> bytes:  # noqa: ANN401
        """Answer a stats method for names, in their order: the nodes of some names at a time are asked side by side.

        Raises:
            NameMalformed: A name has no node.
            PageTokenInvalid: The token is of another list.
        """
        _by_node(request.names)
        binding = tokens.binding_of("named", method.full_name, request.parent, request.filter, *request.names)
        begin, _, page = self._start(binding, request.page_token, method)
        first = int(begin or "0")
        names = request.names[first : first + min(request.page_size or PAGE_SIZE, PAGE_SIZE_LIMIT)]
        places: dict[str, list[int]] = {}
        end = len(names)
        for place, name in enumerate(names):
            node = name.split("/", 2)[1]
            if node not in places and len(places) == ASKED_AT_ONCE:
                end = place
                break
            places.setdefault(node, []).append(place)
        by_node = {node: [names[place] for place in own] for node, own in places.items()}
        for node in sorted(set(by_node) - set(self.index.sources)):
            page.unreachable.append(_failure(node, unknown(node)))
        requests = {
            node: _for_node(request, node, len(own), "", by_node)
            for node, own in sorted(by_node.items())
            if node in self.index.sources
        }
        found: dict[int, bytes] = {}
        for answer in await self._fan_out.ask(method, self.index.shape.service, requests, call):
            if answer.error is not None:
                page.unreachable.append(_failure(answer.node, answer.error, self.index.sources.get(answer.node)))
                continue
            page.freshness.append(_now(answer.node))
            own = places[answer.node]
            told = _told(_listed(method), names, own, answer.items)
            found |= told
            if answer.next_page_token and told:
                # It has more to say than goes into one answer: the next page begins with that.
                end = min([end, *(place for place in own if place > max(told))])
        for place in sorted(place for place in found if place < end):
            if page.count and page.used_bytes + len(found[place]) > PAGE_BYTES:
                end = place
                break
            page.add(found[place])
        if first + end < len(request.names):
            page.following = self._seal(binding, str(first + end), "", page.place)
        return self._reply(method, page)

    def _enough(self, waiting: list[str], wanted: int, counted: Kind | None) -> list[str]:
        """Return the first nodes that together should fill a page."""
        total = 0
        for position, node in enumerate(waiting):
            if counted is not None:
                total += len(self.index.sources[node].tables[counted.name])
            if total >= wanted:
                return waiting[: position + 1]
        return waiting

    # Single reads

    async def get(self, kind: Kind, method: MethodDescriptor, request: Any, call: Call) -> bytes:  # noqa: ANN401
        """Answer a Get method for a name whose node is `-`: by uid, or by id where only one node has it.

        Raises:
            ResourceNotFound: No node has it.
            AmbiguousName: Several have.
            NodeUnreachable: The node that has it is away, or one that might have it has never been heard.
            PermissionMissing: The caller may not see it.
        """
        entry = await self._only(kind, request.name, call)
        if request.read_through:
            return await self._read_through(method, request, entry, call)
        source = self._source_of(entry)
        if source.state != LIVE and not request.allow_stale:
            raise _away(source)
        return entry.seen(request.view)

    async def get_live(self, kind: Kind, method: MethodDescriptor, request: Any, call: Call) -> bytes:  # noqa: ANN401
        """Answer a Get method for what the node of a resource alone knows of it; finds and fails as `get` does."""
        return await self._read_through(method, request, await self._only(kind, request.name, call), call)

    async def _only(self, kind: Kind, name: str, call: Call) -> Entry:
        """Return the one resource that a name with the node `-` stands for."""
        await self.index.settled(min(SETTLE_SECONDS, (call.remaining() or SETTLE_SECONDS * 2) / 2))
        suffix = name.removeprefix(_ANY_NODE + "/")
        last = suffix.rpartition("/")[2]
        found = self.index.by_uid(kind.name, last) if is_uid(last) else self.index.by_id(kind.name, suffix)
        live = [entry for entry in found if self._source_of(entry).state == LIVE]
        found = live or found
        if len(found) > 1:
            names = sorted(entry.name for entry in found)
            raise AmbiguousName(
                f"{len(names)} nodes have {suffix}: name one of them", resource=name, names=", ".join(names[:8])
            )
        if not found:
            raise self._missing(name)
        call.authorize(found[0].name)
        return found[0]

    async def _read_through(self, method: MethodDescriptor, request: Any, entry: Entry, call: Call) -> bytes:  # noqa: ANN401
        own = type(request)()
        own.CopyFrom(request)
        own.name = entry.name
        node = entry.name.split("/")[1]
        requests = {node: own.SerializeToString()}
        answer = (await self._fan_out.ask(method, self.index.shape.service, requests, call))[0]
        if answer.error is not None:
            raise answer.error
        return answer.body

    async def batch_get(self, kind: Kind, method: MethodDescriptor, request: Any, call: Call) -> bytes:  # noqa: ANN401
        """Answer a BatchGet method: one status and resource a name, in the order of the names."""
        if request.read_through:
            return await self._batch_live(method, request, call)
        await self.index.settled(min(SETTLE_SECONDS, (call.remaining() or SETTLE_SECONDS * 2) / 2))
        page = _Page()
        asked: dict[str, Source] = {}
        for index, name in enumerate(request.names):
            try:
                entry = self._find(kind, name)
                source = self._source_of(entry)
                asked[source.node] = source
                if source.state != LIVE and not request.allow_stale:
                    raise _away(source)
                call.authorize(entry.name)
                page.add(field_text(1, name) + field_bytes(3, entry.seen(request.view)))
            except VirtfleetError as error:
                status = error.rebased(lambda _, index=index: f"names[{index}]").to_status()  # type: ignore[misc]  # the round's own
                page.add(field_text(1, name) + field_bytes(2, status.SerializeToString()))
        for _, source in sorted(asked.items()):
            self._stands(source, page, allow_stale=request.allow_stale)
        return self._reply(method, page)

    async def _batch_live(self, method: MethodDescriptor, request: Any, call: Call) -> bytes:  # noqa: ANN401
        by_node = _by_node(request.names)
        known = [node for node in by_node if node in self.index.sources]
        requests = {node: _for_node(request, node, 0, "", by_node) for node in known}
        results: dict[str, bytes] = {}
        result: Any = _listed(method)
        page = _Page()
        for answer in await self._fan_out.ask(method, self.index.shape.service, requests, call):
            if answer.error is not None:
                page.unreachable.append(_failure(answer.node, answer.error, self.index.sources.get(answer.node)))
                status = answer.error.to_status().SerializeToString()
                results |= {name: field_text(1, name) + field_bytes(2, status) for name in by_node[answer.node]}
                continue
            page.freshness.append(_now(answer.node))
            for body in answer.items:
                results[result.FromString(body).name] = body
        for name in request.names:
            page.add(results.get(name) or field_text(1, name) + field_bytes(2, self._absent(name)))
        return self._reply(method, page)

    # Parts

    def _absent(self, name: str) -> bytes:
        node = name.split("/", 2)[1]
        if node not in self.index.sources:
            return unknown(node).to_status().SerializeToString()
        return ResourceNotFound(f"{name} does not exist", resource=name, name=name).to_status().SerializeToString()

    def _find(self, kind: Kind, name: str) -> Entry:
        parts = name.split("/")
        if len(parts) < 3 or parts[0] != "nodes":
            raise NameMalformed(f"A name must have the form nodes/{{node}}/…: {name}", field="names", name=name)
        last = parts[-1]
        if parts[1] == "-":
            found = (
                self.index.by_uid(kind.name, last) if is_uid(last) else self.index.by_id(kind.name, "/".join(parts[2:]))
            )
        else:
            source = self.index.sources.get(parts[1])
            if source is None:
                raise unknown(parts[1])
            entry = source.tables[kind.name].get(name)
            found = [entry] if entry is not None else []
            if not found and is_uid(last):
                found = [one for one in source.tables[kind.name].values() if one.uid == last]
            if not found and not source.synced:
                raise _away(source)
        if not found:
            raise self._missing(name)
        if len(found) > 1:
            raise AmbiguousName(f"Several nodes have {name}", resource=name, names=", ".join(one.name for one in found))
        return found[0]

    def _source_of(self, entry: Entry) -> Source:
        return self.index.sources[entry.name.split("/", 2)[1]]

    def _missing(self, name: str) -> VirtfleetError:
        """Return what to say of a name that the index does not have: it may be on a node that was never heard."""
        for source in self.index.sources.values():
            if not source.synced:
                return _away(source)
        return ResourceNotFound(f"{name} does not exist", resource=name)

    def _nodes_from(self, node: str) -> list[str]:
        nodes = self.index.nodes
        return nodes[bisect.bisect_left(nodes, node) :] if node else nodes

    @staticmethod
    def _below(source: Source, kind: Kind, parent: str, after: str) -> Iterator[Entry]:
        """Yield the resources of a kind below a parent, behind a name."""
        prefix = f"nodes/{source.node}{parent.removeprefix(_ANY_NODE)}/"
        wildcard = prefix.find("/-/")
        if wildcard >= 0:
            prefix = prefix[: wildcard + 1]
        table, names = source.tables[kind.name], source.names(kind.name)
        start = bisect.bisect_left(names, prefix)
        if after:
            start = max(start, bisect.bisect_right(names, after))
        for position in range(start, len(names)):
            name = names[position]
            if not name.startswith(prefix):
                return
            yield table[name]

    @staticmethod
    def _stands(source: Source, page: _Page, *, allow_stale: bool) -> bool:
        """Note how fresh what is known of a node is; tells whether it is to be shown."""
        if source.state == LIVE:
            freshness = resource_pb2.NodeFreshness(node=f"nodes/{source.node}")
            set_time(freshness.observe_time, source.observe_seconds)
            page.freshness.append(freshness)
            return True
        shown = allow_stale and source.synced
        page.unreachable.append(_failure(source.node, source.failure or _away(source), source, held=shown))
        return shown

    def _reply(self, method: MethodDescriptor, page: _Page) -> bytes:
        fields = method.output_type.fields_by_name
        tail: list[bytes] = []
        if page.following and "next_page_token" in fields:
            tail.append(field_text(fields["next_page_token"].number, page.following))
        if "unreachable" in fields:
            tail += [field_bytes(fields["unreachable"].number, one.SerializeToString()) for one in page.unreachable]
        if "resume_token" in fields:
            tail.append(field_text(fields["resume_token"].number, page.place))
        if "freshness" in fields:
            tail += [field_bytes(fields["freshness"].number, one.SerializeToString()) for one in page.freshness]
        return b"".join(page.parts + tail)

    def _seal(self, binding: bytes, node: str, name: str, place: str) -> str:
        return tokens.seal(self._key, binding, f"{node}\0{name}\0{place}".encode())

    def _start(self, binding: bytes, token: str, method: MethodDescriptor) -> tuple[str, str, _Page]:
        """Return the node and the name at which a page begins, and the page, which is empty.

        A watch that goes on from any page must tell what has changed in those before it: all pages have the place of
        the first one, as it was before anything was read.
        """
        if not token:
            told = "resume_token" in method.output_type.fields_by_name
            return "", "", _Page(place=encode_tokens(self.index.tokens()) if told else "")
        payload = tokens.unseal(self._key, binding, token, limit_characters=TOKEN_LIMIT_CHARACTERS)
        node, _, rest = payload.decode().partition("\0")
        name, separator, place = rest.rpartition("\0")
        if not separator:
            raise PageTokenInvalid("page_token is not one of this list: begin without it", field="page_token")
        return node, name, _Page(place=place)


def _listed(method: MethodDescriptor) -> type[Message]:
    """Return the class of what a list holds."""
    return message_factory.GetMessageClass(cast("Descriptor", method.output_type.fields_by_number[1].message_type))


def _by_node(names: Sequence[str]) -> dict[str, list[str]]:
    """Return names by their node, each in the order given.

    Raises:
        NameMalformed: One has no node.
    """
    found: dict[str, list[str]] = {}
    for index, name in enumerate(names):
        parts = name.split("/", 2)
        if len(parts) < 3 or parts[0] != "nodes" or parts[1] == "-":
            raise NameMalformed(
                f"A name must have the form nodes/{{node}}/…: {name}", field=f"names[{index}]", name=name
            )
        found.setdefault(parts[1], []).append(name)
    return found


def _told(of: Any, names: Sequence[str], places: Sequence[int], items: Sequence[bytes]) -> dict[int, bytes]:  # noqa: ANN401  # one class a method
    """Return the items of a node by the places of their names: in the order of these, of which some are left out."""
    found: dict[int, bytes] = {}
    left = iter(places)
    for body in items:
        item = of.FromString(body)
        for place in left:
            if names[place] == item.name or (item.uid and names[place].endswith(f"/{item.uid}")):
                found[place] = body
                break
    return found


def _for_node(request: Message, node: str, size: int, token: str, by_node: dict[str, list[str]] | None = None) -> bytes:
    """Return the request for one node in the place of one for all."""
    own: Any = type(request)()
    own.CopyFrom(request)
    own.parent = f"nodes/{node}{own.parent.removeprefix(_ANY_NODE)}"
    known = own.DESCRIPTOR.fields_by_name
    if "page_size" in known:
        own.page_size = size
        own.page_token = token
    if "names" in known and by_node is not None:
        own.ClearField("names")
        own.names.extend(by_node[node])
    for flag in ("allow_stale", "read_through"):
        if flag in known:
            own.ClearField(flag)
    data: bytes = own.SerializeToString()
    return data


def _away(source: Source) -> VirtfleetError:
    if source.failure is not None:
        return source.failure
    return NodeUnreachable(
        f"Node {source.node} has not been heard yet", retry_delay_seconds=1.0, node=f"nodes/{source.node}"
    )


def _now(node: str) -> resource_pb2.NodeFreshness:
    """Return the freshness of what a node has just answered itself."""
    freshness = resource_pb2.NodeFreshness(node=f"nodes/{node}")
    freshness.observe_time.GetCurrentTime()
    return freshness


def _failure(
    node: str, error: VirtfleetError, source: Source | None = None, *, held: bool = False
) -> resource_pb2.NodeFailure:
    failure = resource_pb2.NodeFailure(node=f"nodes/{node}", status=error.to_status())
    if source is not None and source.observe_seconds:
        set_time(failure.last_seen_time, source.observe_seconds)
        if held:
            set_time(failure.observe_time, source.observe_seconds)
    return failure
