"""What the pages of a list say together, alike for both clients."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from google.protobuf.message import Message
from google.rpc import code_pb2, status_pb2

from virtfleet.type.v1 import resource_pb2
from virtfleet_client.errors import VirtfleetError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


class PartialList(VirtfleetError):
    """Ends a list in which the parts of some nodes are missing or as last seen; what came before it is good.

    Code and reason are those of the first of the nodes.

    Attributes:
        failures: The nodes, and why.
    """

    def __init__(self, failures: Sequence[resource_pb2.NodeFailure]) -> None:
        first = failures[0].status
        status = status_pb2.Status(code=first.code or code_pb2.UNAVAILABLE, details=first.details)
        nodes = ", ".join(failure.node for failure in failures)
        status.message = f"the list is not whole: nothing new of {nodes}" + (
            f": {first.message}" if first.message else ""
        )
        super().__init__(status)
        self.failures = tuple(failures)


class Pages:
    """Keeps where a list is.

    Args:
        request: The request of the first page; it is copied.

    Attributes:
        request: The request of the next page.
    """

    def __init__(self, request: Message) -> None:
        self.request: Any = type(request).FromString(request.SerializeToString())
        # Nodes that are away are in the lists of the gateway's own resources all the same. With allow_stale the caller
        # has said that what was last seen will do.
        whole = self.request.DESCRIPTOR.file.package == "virtfleet.fleet.v1"
        self._tells_missing = not whole and not getattr(self.request, "allow_stale", False)
        self._missing: dict[str, resource_pb2.NodeFailure] = {}

    def items(self, answer: Any) -> Iterable[Any]:  # noqa: ANN401  # the answer of any list
        """Take an answer and return its resources."""
        if self._tells_missing and "unreachable" in answer.DESCRIPTOR.fields_by_name:
            for one in answer.unreachable:
                # Lists of operations are Google's: they have names alone.
                failure = resource_pb2.NodeFailure(node=one) if isinstance(one, str) else one
                self._missing[failure.node] = failure
        found: Iterable[Any] = getattr(answer, answer.DESCRIPTOR.fields_by_number[1].name)
        return found

    def goes_on(self, answer: Any) -> bool:  # noqa: ANN401  # as above
        """Set the request for the next page; False: there is none.

        Raises:
            PartialList: There is none, and nodes were missing.
        """
        if answer.next_page_token:
            self.request.page_token = answer.next_page_token
            return True
        if self._missing:
            raise PartialList(list(self._missing.values()))
        return False
