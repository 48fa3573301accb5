"""Tells which kinds of pools there are, what each can do, and why one cannot run."""

from __future__ import annotations

import uuid

from virtfleet.storage.v1 import pool_pb2
from virtfleet_service import filters, names, paging, resources, tokens
from virtfleet_service.call import Call
from virtfleet_service.views import apply_view
from virtfleet_storage.backends.api import capabilities, format_word
from virtfleet_storage.places import Places

_UIDS = uuid.UUID("5b1d3a0e-63a1-4b7f-9c0e-2f4f0e2f8a11")


class Kinds:
    """Shows the kinds of pools as they are now.

    Args:
        places: The open pools, with the back ends.
        node: The id of the node.
        key: Authenticates page tokens.
    """

    def __init__(self, places: Places, node: str, key: bytes) -> None:
        self._places = places
        self._node = node
        self._key = key

    async def _look(self) -> list[pool_pb2.PoolBackend]:
        """Look which kinds can run here, and what each can do today."""
        found = []
        for kind, backend in sorted(self._places.backends.items()):
            probe = await backend.probe()
            name = f"nodes/{self._node}/poolBackends/{names.check_id(kind, 'kind')}"
            known = pool_pb2.PoolBackend(display_name=backend.display_name)
            resources.create_head(known, name, uid=str(uuid.uuid5(_UIDS, name)))
            known.status.available = not probe.reason
            known.status.unavailable_reason = probe.reason
            known.status.version = probe.version
            known.status.volume_formats.extend(format_word(format).upper() for format in probe.formats)
            for id_, meaning in sorted(capabilities(backend.pool_class, probe.formats).items()):
                known.status.capabilities.add(id=id_, description=meaning)
            found.append(known)
        return found

    async def list(self, request: pool_pb2.ListPoolBackendsRequest, call: Call) -> pool_pb2.ListPoolBackendsResponse:
        """Return the kinds, in pages as other lists are.

        Raises:
            FilterSyntax: The filter does not parse.
            PageTokenInvalid: The token is of another list.
        """
        size = paging.page_size_of(request)
        binding = tokens.binding_of("kinds", request.parent, request.filter, request.view)
        after = tokens.unseal(self._key, binding, request.page_token).decode() if request.page_token else ""
        matches = filters.compile_filter(request.filter, pool_pb2.PoolBackend) if request.filter else None
        answer = pool_pb2.ListPoolBackendsResponse()
        for known in await self._look():
            if known.name <= after or not call.may_see(known.name) or (matches is not None and not matches(known)):
                continue
            if len(answer.pool_backends) == size:
                answer.next_page_token = tokens.seal(self._key, binding, answer.pool_backends[-1].name.encode())
                break
            answer.pool_backends.append(apply_view(known, request.view))
        return answer
