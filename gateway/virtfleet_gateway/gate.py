"""Who calls through the gateway, and whether they may call that method on that node.

The node decides about everything that a call touches; the gateway checks what it can see: the method's permission, on
the name by which it routes. The caller is serialised once a certificate, not once a call.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import grpc

from virtfleet_gateway.relay import Passport
from virtfleet_service.authorization import lookup_scope
from virtfleet_service.errors import PermissionMissing, Unauthenticated, VirtfleetError
from virtfleet_service.identity import encode_caller

if TYPE_CHECKING:
    from collections.abc import Callable

    from virtfleet_gateway.relay import Context
    from virtfleet_service.authorization import Authorizer
    from virtfleet_service.call import Caller
    from virtfleet_service.identity import Identity
    from virtfleet_service.logs import AuditLog
    from virtfleet_service.pipeline import Listener, Pipeline

_CACHE_LIMIT: Final = 4096
_REFUSALS: Final = frozenset({grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNAUTHENTICATED})


class CallerPassport:
    """Is one caller, with what nodes are told about it."""

    __slots__ = ("_authorizer", "_pipeline", "_policy", "caller", "conveyed", "identity")

    def __init__(
        self,
        caller: Caller,
        identity: Identity | None,
        authorizer: Authorizer,
        pipeline: Pipeline,
        conveyed: bytes,
    ) -> None:
        self.caller = caller
        self.identity = identity
        self.conveyed = conveyed
        self._authorizer = authorizer
        self._pipeline = pipeline
        self._policy = authorizer.generation

    def permit(self, permission: str, name: str, *, checks_name: bool = True) -> None:
        """Check that the caller holds a permission on what a call names.

        Args:
            permission: What the method needs.
            name: The name in the call.
            checks_name: False: it says nothing of what the call is about, and the caller may hold it on anything.

        Raises:
            PermissionMissing: It does not.
        """
        prefixes = self._authorizer.prefixes(self.caller, permission)
        if prefixes is None:
            raise self._authorizer.refusal(self.caller, permission, name)
        if checks_name and prefixes and not name.startswith(prefixes):
            # A parent, of which the caller may use a part, or a uid: the node judges each thing that it finds.
            self._authorizer.authorize_within(self.caller, permission, lookup_scope(name))

    def still_good(self, permission: str = "") -> VirtfleetError | None:
        """Return why a call of the caller may not go on; None: it may.

        Args:
            permission: What the call needs, if it is a stream; empty: only the certificate is judged.
        """
        try:
            if self.identity is not None and self._pipeline.authenticator is not None:
                self._pipeline.authenticator.recheck(self.identity)
                if self._policy != self._authorizer.generation:
                    self._pipeline.authenticator.recheck_roles(self.identity, self.caller, permission, "")
        except (Unauthenticated, PermissionMissing) as error:
            return error
        return None


class CertificateGate:
    """Authenticates the callers of one listener.

    Args:
        pipeline: Knows who calls.
        listener: Where the calls come in.
        authorizer: Judges what they may do.
        audit: Gets the refusals.
        identity: Returns the identity of this gateway.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        listener: Listener,
        authorizer: Authorizer,
        audit: AuditLog,
        identity: Callable[[], str],
    ) -> None:
        self._pipeline = pipeline
        self._listener = listener
        self._authorizer = authorizer
        self._audit = audit
        self._identity = identity
        self._passports: dict[int, CallerPassport] = {}

    def authenticate(self, context: Context, conveyed: str | bytes | None = None) -> Passport:
        """Return the caller of a call.

        Args:
            context: The call.
            conveyed: Whom it says to be made for; taken from gateways alone.

        Raises:
            Unauthenticated: Nobody knows who calls, or the caller may convey no other.
            PermissionMissing: The caller is a node.
            ServiceDraining: The gateway is about to stop.
        """
        self._pipeline.check_draining()
        caller, identity = self._pipeline.authenticate(self._listener, context, conveyed)
        # The authenticator gives the same object for the same certificate for as long as nothing about it has changed.
        passport = self._passports.get(id(caller))
        if passport is None or passport.caller is not caller:
            if len(self._passports) >= _CACHE_LIMIT:
                self._passports.clear()
            conveyed = encode_caller(caller, via=self._identity())
            passport = CallerPassport(caller, identity, self._authorizer, self._pipeline, conveyed)
            self._passports[id(caller)] = passport
        return passport

    def refused(self, method: str, context: Context, error: VirtfleetError, *, mutates: bool) -> None:
        """Note a refusal before it is told."""
        if error.code not in _REFUSALS and not mutates:
            return
        self._audit.refused(
            method,
            peer=context.peer(),
            subject=error.metadata.get("subject", ""),
            code=error.code.name,
            reason=error.reason,
            message=error.message,
        )
