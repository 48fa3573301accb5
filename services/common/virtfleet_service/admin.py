"""AdminService and AccessService of `virtfleet.common.v1`: what a server is, and who the caller is to it."""

from __future__ import annotations

import datetime as dt
import functools
import os
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Final

from google.protobuf import duration_pb2, timestamp_pb2

from virtfleet.common.v1 import admin_pb2
from virtfleet_service.errors import ResourceNotFound
from virtfleet_service.validation import REQUEST_LIMIT_BYTES

if TYPE_CHECKING:
    from google.protobuf.descriptor import ServiceDescriptor

    from virtfleet_service.authorization import Authorizer
    from virtfleet_service.call import Call
    from virtfleet_service.server import Server

ADMIN: Final[ServiceDescriptor] = admin_pb2.DESCRIPTOR.services_by_name["AdminService"]
ACCESS: Final[ServiceDescriptor] = admin_pb2.DESCRIPTOR.services_by_name["AccessService"]

OPERATION_RETENTION: Final = dt.timedelta(days=7)
REQUEST_ID_RETENTION: Final = dt.timedelta(hours=24)

_DISTRIBUTION: Final = "virtfleet-service"


@functools.cache
def version() -> str:
    """Return the release of virtfleet; `0.0.0.dev0` when it runs from a working tree without being installed."""
    try:
        return metadata.version(_DISTRIBUTION)
    except metadata.PackageNotFoundError:
        return "0.0.0.dev0"


@functools.cache
def boot_id() -> str:
    """Return the boot id of the host."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _check_name(given: str, own: str) -> None:
    if given not in ("", own):
        raise ResourceNotFound(f"`{given}` is not served here; this is `{own}`", resource=given, server=own)


class AdminService:
    """Shows and steers one server process.

    Args:
        server: The server.
    """

    def __init__(self, server: Server) -> None:
        self._server = server
        self._start_time = timestamp_pb2.Timestamp()
        self._start_time.GetCurrentTime()
        self._boot_id = boot_id()
        self._version = version()

    async def get_server(self, request: admin_pb2.GetServerRequest, _call: Call) -> admin_pb2.Server:
        """Answer GetServer."""
        _check_name(request.name, self._server.name)
        return self._describe()

    async def reload_certificates(self, request: admin_pb2.ReloadCertificatesRequest, _call: Call) -> admin_pb2.Server:
        """Answer ReloadCertificates. Doing it twice is doing it once, so request_id needs no memory."""
        _check_name(request.name, self._server.name)
        self._server.reload_certificates(validate_only=request.validate_only)
        return self._describe()

    def _describe(self) -> admin_pb2.Server:
        server = self._server
        answer = admin_pb2.Server(
            name=server.name,
            version=self._version,
            start_time=self._start_time,
            pid=os.getpid(),
            boot_id=self._boot_id,
            store_id=server.store_id(),
            request_limit_bytes=REQUEST_LIMIT_BYTES,
            active_calls_count=server.active_calls_count,
            denial_list_number=server.denial_list_number,
        )
        credentials = server.credentials
        if credentials is not None:
            answer.identity = credentials.identity
            answer.certificate_expire_time.FromDatetime(credentials.not_after)
        retention = duration_pb2.Duration()
        retention.FromTimedelta(OPERATION_RETENTION)
        answer.operation_retention.CopyFrom(retention)
        retention.FromTimedelta(REQUEST_ID_RETENTION)
        answer.request_id_retention.CopyFrom(retention)
        return answer


class AccessService:
    """Tells callers who they are here.

    Args:
        name: The name of the server.
        authorizer: Knows what roles give.
    """

    def __init__(self, name: str, authorizer: Authorizer) -> None:
        self._name = name
        self._authorizer = authorizer

    async def who_am_i(self, request: admin_pb2.WhoAmIRequest, call: Call) -> admin_pb2.WhoAmIResponse:
        """Answer WhoAmI."""
        _check_name(request.name, self._name)
        caller = call.caller
        return admin_pb2.WhoAmIResponse(
            subject=caller.subject,
            roles=caller.roles,
            transport=caller.transport,
            via=caller.via,
            permissions=self._authorizer.permissions(caller),
            name_prefixes=caller.name_prefixes,
        )
