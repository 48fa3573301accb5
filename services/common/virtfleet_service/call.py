"""One call as its handler sees it: the method, who calls, what time remains, and what the caller may touch."""

from __future__ import annotations

import time
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from virtfleet_service.authorization import Authorizer
    from virtfleet_service.errors import VirtfleetError
    from virtfleet_service.identity import Identity
    from virtfleet_service.methods import MethodFacts

CALLER_KEY: Final = "x-virtfleet-caller-bin"
"""The metadata key of the conveyed caller (`virtfleet.node.v1.ConveyedCaller`, serialised)."""

NODE_KEY: Final = "x-virtfleet-node"
"""The metadata key that may name the node, or `node/service`, that a call is for."""


@dataclass(frozen=True, slots=True)
class Caller:
    """Is who calls, as far as the right to do something goes.

    Attributes:
        subject: A SPIFFE id, or `local:{role}` on a local socket.
        roles: The roles bound to it; `role@prefix` holds for names with that prefix only.
        transport: How the call came: `tls`, `unix`.
        via: The identity of the gateway that conveyed the call; empty: it came directly.
        name_prefixes: The names that all roles hold for; empty: all.
    """

    subject: str
    roles: tuple[str, ...] = ()
    transport: str = "unix"
    via: str = ""
    name_prefixes: tuple[str, ...] = ()


class Context(Protocol):
    """Is what a call needs of the transport."""

    def time_remaining(self) -> float | None:
        """Return the seconds until the deadline; None: there is none."""

    def invocation_metadata(self) -> Iterable[tuple[str, str | bytes]] | None:
        """Return the metadata of the call."""


class Call:
    """Is one call on its way through its handler.

    Work that outlives the call (an operation) keeps the object: the caller stays the same, the deadline falls away.

    Attributes:
        method: What the method is and needs.
        caller: Who calls.
        node: The node of this server; empty at a gateway.
        resource: The value of the routing field, for logs and the audit; empty: it has none, or is not decoded yet.
        request_id: The request_id of the request, for the audit.
        peer: The certificate identity at the other end of the connection; None on local sockets.
    """

    __slots__ = (
        "_authorizer",
        "_context",
        "_deadline",
        "_metadata",
        "caller",
        "ended_by",
        "method",
        "node",
        "peer",
        "request_id",
        "resource",
    )

    def __init__(
        self,
        method: MethodFacts,
        caller: Caller,
        authorizer: Authorizer,
        *,
        node: str = "",
        context: Context | None = None,
        peer: Identity | None = None,
    ) -> None:
        self.method = method
        self.caller = caller
        self.node = node
        self.resource = ""
        self.request_id = ""
        self.peer = peer
        self.ended_by: VirtfleetError | None = None
        self._authorizer = authorizer
        self._context = context
        self._deadline: float | None = None
        self._metadata: Mapping[str, str | bytes] | None = None

    def remaining(self) -> float | None:
        """Return the seconds until the caller's deadline, never below 0; None: it set none, or has its answer."""
        if self._context is not None:
            left = self._context.time_remaining()
            return None if left is None else max(left, 0.0)
        if self._deadline is not None:
            return max(self._deadline - time.monotonic(), 0.0)
        return None

    def authorize(self, resource_name: str, permission: str | None = None) -> None:
        """Check that the caller holds a permission on a resource.

        The pipeline has done this for the target of the call and for every reference in the request; a handler does it
        for what it finds on the way.

        Args:
            resource_name: The full name of the resource.
            permission: `noun.verb`; None: that of the method.

        Raises:
            PermissionMissing: No role of the caller gives it.
            ReadOnlySocket: The same on the local socket of viewers.
        """
        self._authorizer.authorize(
            self.caller, self.method.permission if permission is None else permission, resource_name
        )

    def may_see(self, resource_name: str) -> bool:
        """Tell whether the caller holds the permission of the method on a resource.

        Lists and watches leave out what their caller may not see. True at once for callers without name prefixes.
        """
        prefixes = self._authorizer.prefixes(self.caller, self.method.permission)
        if prefixes is None:
            return False
        return not prefixes or resource_name.startswith(prefixes)

    @property
    def sees_all(self) -> bool:
        """Whether `may_see` is true for every name, so that a list need not ask for each."""
        return self._authorizer.prefixes(self.caller, self.method.permission) == ()

    def metadata(self, key: str) -> str | bytes | None:
        """Return one metadata value of the call; None: it has none."""
        if self._metadata is None:
            given = self._context.invocation_metadata() if self._context is not None else None
            self._metadata = dict(given or ())
        return self._metadata.get(key)

    @property
    def trace_id(self) -> str:
        """The trace id that the caller sent (W3C `traceparent`); empty: none."""
        value = self.metadata("traceparent")
        parts = value.split("-") if isinstance(value, str) else []
        return parts[1] if len(parts) >= 4 and len(parts[1]) == 32 else ""

    def answered(self) -> None:
        """Let go of the transport: the call has ended, and what works on for it has no deadline from it."""
        if self._context is not None:
            self.metadata("")
            self._context = None

    def detached(self, *, deadline_seconds: float | None = None) -> Call:
        """Return a call of the same caller that lives apart from the transport, for work that survives the client.

        Args:
            deadline_seconds: Its own deadline from now; None: it has none.
        """
        twin = Call(self.method, self.caller, self._authorizer, node=self.node, peer=self.peer)
        self.metadata("")
        twin.resource, twin.request_id, twin._metadata = self.resource, self.request_id, self._metadata
        if deadline_seconds is not None:
            twin._deadline = time.monotonic() + deadline_seconds
        return twin

    def acting_for(self, method: MethodFacts) -> Call:
        """Return a call of the same caller and deadline for another method, as an item of a batch is one."""
        twin = Call(method, self.caller, self._authorizer, node=self.node, context=self._context, peer=self.peer)
        twin._deadline = self._deadline
        return twin


CURRENT: ContextVar[Call | None] = ContextVar("virtfleet_call", default=None)
"""The call that the present task works for; log entries take their trace and resource from it."""
