"""What can be read of networks, ports and leases.

Get and List, straight from the stored bytes where that is possible.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from virtfleet_service import names, paging, views
from virtfleet_service.errors import ResourceNotFound
from virtfleet_service.store import Store

if TYPE_CHECKING:
    from google.protobuf.message import Message

    from virtfleet_service.call import Call

__all__ = ["Catalog"]


class Catalog:
    """Answers reads from the store."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def get(self, kind: str, name: str, view: int, call: Call) -> Any:  # noqa: ANN401  # the message of the kind, or its bytes
        """Return a resource by its name, or by its uid as the last segment.

        Raises:
            ResourceNotFound: There is none.
            PermissionMissing: The caller may not see it.
        """
        row = self._store.find(kind, name)
        call.authorize(row.name)
        if view != views.BASIC:
            return row.body
        return views.apply_view(self._store.codec.resource_types[kind].FromString(row.body), view)

    def list(self, kind: str, request: Message, response_class: type[Message], call: Call) -> bytes:
        """Answer a List request.

        Raises:
            ResourceNotFound: The network that is named as the parent does not exist.
            PageTokenInvalid: The token is of another list.
            FilterSyntax: The filter does not parse.
        """
        parent: str = request.parent  # type: ignore[attr-defined]  # field 1 of every List request
        is_network = names.collection_of(parent) == "networks" and names.id_of(parent) != "-"
        if is_network and self._store.get(parent) is None:
            raise ResourceNotFound(f"{parent} does not exist", resource=parent, name=parent)
        return paging.list_reply(self._store, kind, request, response_class, call=call)
