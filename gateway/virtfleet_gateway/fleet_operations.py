"""Operations of many processes in one list: `nodes/-/services/-`, `nodes/-/services/compute`, `nodes/n1/services/-`.

Operations are not in the index: the processes are asked, side by side, some at a time, until a page is full. The order
is that of nodes, services and operations; a page token says in which process and where in its own list the next page
begins, so pages are stable while nodes come and go. A process that does not answer in its share of the time is named
in `unreachable`, and its operations are missing.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from google.longrunning import operations_pb2

from virtfleet.type.v1 import operation_pb2
from virtfleet_gateway.answers import TOKEN_LIMIT_CHARACTERS
from virtfleet_gateway.channels import unknown
from virtfleet_gateway.routing import ANY_NODE, SERVICES
from virtfleet_service import filters, paging, tokens
from virtfleet_service.changes import field_bytes, field_text
from virtfleet_service.errors import NameMalformed, PageTokenInvalid
from virtfleet_service.longrunning import OperationsService

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from virtfleet_gateway.answers import Answer
    from virtfleet_gateway.fanout import FanOut
    from virtfleet_service.call import Call
    from virtfleet_service.operations import Operations

    Place = tuple[str, str]
    """A node and a service of it."""

_METHOD: Final = operations_pb2.DESCRIPTOR.services_by_name["Operations"].methods_by_name["ListOperations"]
_ASKED_AT_ONCE: Final = 48
_TOKEN_CHARACTERS: Final = 2 * TOKEN_LIMIT_CHARACTERS
"""A page token holds that of a process."""
_FIELDS: Final = operations_pb2.ListOperationsResponse.DESCRIPTOR.fields_by_name
_OPERATIONS, _NEXT, _UNREACHABLE = (_FIELDS[name].number for name in ("operations", "next_page_token", "unreachable"))


@dataclass(slots=True)
class _Page:
    size: int
    items: list[bytes] = field(default_factory=list)
    used_bytes: int = 0
    unreachable: list[str] = field(default_factory=list)
    following: tuple[Place, str] | None = None
    """Where the next page begins: a process, and the page token of its own list."""

    def take(self, place: Place, answer: Answer) -> None:
        """Add what a process has answered, or end the page before it."""
        if answer.error is not None:
            self.unreachable.append(_name(place))
            return
        items, token = answer.items, answer.next_page_token
        more_bytes = sum(map(len, items))
        too_much = len(self.items) + len(items) > self.size or self.used_bytes + more_bytes > paging.PAGE_LIMIT_BYTES
        if self.items and too_much:
            self.following = place, ""
            return
        self.items += items
        self.used_bytes += more_bytes
        if token:
            self.following = place, token

    def encode(self, token: str) -> bytes:
        """Return the response."""
        parts = [field_bytes(_OPERATIONS, item) for item in self.items]
        if token:
            parts.append(field_text(_NEXT, token))
        parts += [field_text(_UNREACHABLE, name) for name in self.unreachable]
        return b"".join(parts)


class FleetOperations(OperationsService):
    """Serves `google.longrunning.Operations` of a gateway: its own operations, and lists of those of many processes.

    Args:
        operations: The gateway's own.
        fan_out: Asks nodes.
        nodes: Returns the nodes of the fleet with their services.
        key: Authenticates page tokens.
    """

    def __init__(
        self,
        operations: Operations,
        fan_out: FanOut,
        nodes: Callable[[], Mapping[str, Iterable[str]]],
        key: bytes,
    ) -> None:
        super().__init__(operations)
        self._fan_out = fan_out
        self._nodes = nodes
        self._key = key

    async def list_operations(  # type: ignore[override]  # a response may be given as bytes, too
        self, request: operations_pb2.ListOperationsRequest, call: Call
    ) -> operations_pb2.ListOperationsResponse | bytes:
        """List operations: of the gateway, or of all processes that a name with `-` means.

        Raises:
            NameMalformed: The name means neither.
            NodeUnknown: The fleet has no such node.
            PageTokenInvalid: The token is of another list.
            FilterSyntax: The filter does not parse.
        """
        if not request.name.startswith("nodes/"):
            return await super().list_operations(request, call)
        places = self._places(request.name)
        if request.filter:
            # Refused here once, and not by each node as something that keeps it from answering.
            filters.compile_roots(
                request.filter, (operations_pb2.Operation.DESCRIPTOR, operation_pb2.OperationMetadata.DESCRIPTOR)
            )
        binding = tokens.binding_of(_METHOD.full_name, request.name, request.filter)
        start, own_token = self._start(binding, request.page_token)
        places = places[bisect.bisect_left(places, start) :]
        page = _Page(paging.page_size_of(request))
        late = False
        while places and page.following is None:
            left = page.size - len(page.items)
            # What has been waited for once has taken the others' time: they have their own with the next page.
            if left <= 0 or late:
                page.following = places[0], ""
                break
            asked, places = places[:_ASKED_AT_ONCE], places[_ASKED_AT_ONCE:]
            requests = {
                place: operations_pb2.ListOperationsRequest(
                    name=_name(place),
                    filter=request.filter,
                    page_size=left,
                    page_token=own_token if place == start else "",
                ).SerializeToString()
                for place in asked
            }
            answers = await self._fan_out.ask_services(_METHOD, requests, call)
            for place, answer in zip(asked, answers, strict=True):
                late = late or answer.late
                if page.following is None:
                    page.take(place, answer)
        return page.encode(self._seal(binding, *page.following) if page.following is not None else "")

    def _places(self, name: str) -> list[Place]:
        """Return the processes that a name means, in order."""
        parts = name.removesuffix("/operations").split("/")
        if len(parts) != 4 or parts[2] != "services":
            raise NameMalformed(
                "name must have the form nodes/{node}/services/{service}, with `-` for all", field="name", name=name
            )
        node, service = parts[1], parts[3]
        known = self._nodes()
        if node != ANY_NODE and node not in known:
            raise unknown(node)
        services: Sequence[str] = SERVICES if service == ANY_NODE else (service,)
        return sorted(
            (one, part) for one in (known if node == ANY_NODE else (node,)) for part in services if part in known[one]
        )

    def _seal(self, binding: bytes, place: Place, token: str) -> str:
        return tokens.seal(self._key, binding, "\0".join((*place, token)).encode())

    def _start(self, binding: bytes, token: str) -> tuple[Place, str]:
        if not token:
            return ("", ""), ""
        parts = tokens.unseal(self._key, binding, token, limit_characters=_TOKEN_CHARACTERS).decode().split("\0", 2)
        if len(parts) != 3:
            raise PageTokenInvalid("page_token is not one of this list: begin without it", field="page_token")
        return (parts[0], parts[1]), parts[2]


def _name(place: Place) -> str:
    return f"nodes/{place[0]}/services/{place[1]}"
