"""What the use cases of the compute service share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING

from virtfleet.compute.v1 import domain_pb2
from virtfleet_compute.admission import Admission
from virtfleet_compute.drivers.api import DomainRef, Driver, Facet
from virtfleet_compute.holds import Holds
from virtfleet_compute.hypervisors import Hypervisors
from virtfleet_compute.settings import ComputeSettings
from virtfleet_service import resources
from virtfleet_service.errors import OperationConflict
from virtfleet_service.operations import Operations
from virtfleet_service.store import Store, Transaction

if TYPE_CHECKING:
    from virtfleet_compute.occupation import Occupation
    from virtfleet_compute.wiring import Wiring

KIND = "domain"


@dataclass(slots=True)
class Context:
    """Is the parts that use cases work with."""

    settings: ComputeSettings
    store: Store
    operations: Operations
    hypervisors: Hypervisors
    admission: Admission
    holds: Holds
    wiring: Wiring
    occupation: Occupation
    batched: dict[str, str]
    """The name of the batch operation that works on a domain now, by the domain's name."""

    @property
    def node(self) -> str:
        """The id of the node."""
        return self.settings.node

    def domain(self, name: str) -> domain_pb2.Domain:
        """Read a domain.

        Raises:
            ResourceNotFound: There is none of that name.
        """
        return domain_pb2.Domain.FromString(self.store.need(name).body)

    def find(self, name: str) -> domain_pb2.Domain:
        """Read a domain by a name whose last segment may be the uid.

        Raises:
            ResourceNotFound: There is none.
        """
        return domain_pb2.Domain.FromString(self.store.find(KIND, name).body)

    def by_uid(self, uid: str) -> domain_pb2.Domain | None:
        """Read a domain by its uid; None: there is none."""
        row = self.store.get_by_uid(KIND, uid)
        return domain_pb2.Domain.FromString(row.body) if row is not None else None

    def recorded(self, space: str) -> Iterator[domain_pb2.Domain]:
        """Read the domains that a space of private records holds (`records.ACTIVE`), without waiting in between."""
        with closing(self.store.iterate_recorded(KIND, space)) as rows:
            for row in rows:
                yield domain_pb2.Domain.FromString(row.body)

    def driver(self, domain: domain_pb2.Domain) -> Driver:
        """Return the driver of a domain.

        Raises:
            DriverBroken: It cannot run.
        """
        return self.hypervisors.get(domain.status.resolved_spec.driver)

    async def look_again(self, name: str) -> None:
        """Give the driver of a domain another chance if it could not run; for a call that is about to use it."""
        row = self.store.get(name) if self.hypervisors.any_broken else None
        if row is not None:
            await self.hypervisors.look_again(domain_pb2.Domain.FromString(row.body).status.resolved_spec.driver)

    def facet(self, domain: domain_pb2.Domain, kind: type[Facet]) -> Facet:
        """Return a facet of the driver of a domain.

        Raises:
            CapabilityMissing: The driver lacks it.
            DriverBroken: The driver cannot run.
        """
        return self.hypervisors.facet(domain.status.resolved_spec.driver, kind)

    def counted(self, domain: domain_pb2.Domain) -> bool:
        """Tell whether the guest of a domain takes memory of this node."""
        return self.hypervisors.report(domain.status.resolved_spec.driver).uses_host_memory


def ref(domain: domain_pb2.Domain) -> DomainRef:
    """Return how a driver knows a domain."""
    return DomainRef(domain.name, domain.uid)


def read(tx: Transaction, name: str) -> domain_pb2.Domain:
    """Read a domain inside of a transaction.

    Raises:
        ResourceNotFound: There is none of that name.
    """
    return domain_pb2.Domain.FromString(tx.need(name).body)


def read_checked(
    tx: Transaction, context: Context, name: str, etag: str = "", expected_uid: str = ""
) -> domain_pb2.Domain:
    """Read a domain that a call is about to change.

    Raises:
        ResourceNotFound: There is none of that name.
        UidMismatch: The name is now that of another domain.
        EtagMismatch: It has changed.
        OperationConflict: A batch works on it.
    """
    domain = read(tx, name)
    resources.check_preconditions(domain, etag, expected_uid)
    refuse_batched(context, name)
    return domain


def refuse_batched(context: Context, name: str) -> None:
    """Refuse a change of a domain that a batch works on.

    Raises:
        OperationConflict: One does.
    """
    operation = context.batched.get(name)
    if operation is not None:
        raise OperationConflict(
            f"{operation} works on {name}: wait for it or cancel it",
            resource=name,
            retry_delay_seconds=1.0,
            operation=operation,
        )
