"""The Python client of virtfleet.

Example:
    with connect("tls://127.0.0.1:7443", credentials) as fleet:
        operation = fleet.domains.StartDomain(domain_service_pb2.StartDomainRequest(name="nodes/n1/domains/web"))
        domain = fleet.wait(operation, domain_pb2.Domain)

`connect` and `Fleet` are for programs with threads, `connect_async` and `AsyncFleet` for asyncio; both have the same
methods.
"""

from virtfleet_client.aio import AsyncFleet, connect_async
from virtfleet_client.aio_informer import AsyncInformer
from virtfleet_client.endpoint import Credentials, Endpoint
from virtfleet_client.errors import VirtfleetError
from virtfleet_client.informer import Informer
from virtfleet_client.pages import PartialList
from virtfleet_client.sync import Fleet, connect

__all__ = [
    "AsyncFleet",
    "AsyncInformer",
    "Credentials",
    "Endpoint",
    "Fleet",
    "Informer",
    "PartialList",
    "VirtfleetError",
    "connect",
    "connect_async",
]
