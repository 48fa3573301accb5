"""What a driver may do beyond the required part: each facet is a capability, asked for by `driver.facet(Suspend)`.

The rules of `api.py` hold for every method here too.
"""

from __future__ import annotations

import enum
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple, Protocol, runtime_checkable

from virtfleet.compute.v1 import domain_spec_pb2, stats_pb2
from virtfleet_compute.drivers.api import DomainObservation, DomainRef


@runtime_checkable
class GracefulStop(Protocol):
    """Can ask a guest to end."""

    async def shut_down(self, domain: DomainRef, *, timeout_seconds: float) -> DomainObservation:
        """Ask the guest to end and wait until it is gone, as `stop` leaves it. Succeeds if there is none.

        After a failure or cancellation the guest has been asked and may end at any later time; that is told by an
        event.

        Raises:
            GuestDidNotComply: It runs on after the time.
        """
        ...


@runtime_checkable
class Reboot(Protocol):
    """Can ask a guest to boot again."""

    async def reboot(self, domain: DomainRef, *, timeout_seconds: float | None) -> DomainObservation:
        """Ask the guest to boot again; with a time, wait until it does. Each call asks once.

        Raises:
            WrongState: There is no guest.
            GuestDidNotComply: It has not in that time.
        """
        ...


@runtime_checkable
class Reset(Protocol):
    """Can reset a guest."""

    async def reset(self, domain: DomainRef) -> DomainObservation:
        """Reset the guest without asking it. Each call resets once. A paused one stays paused.

        Raises:
            WrongState: There is no guest.
        """
        ...


@runtime_checkable
class Suspend(Protocol):
    """Can pause a guest."""

    async def suspend(self, domain: DomainRef) -> DomainObservation:
        """Stop the guest's processors. Succeeds if they are stopped.

        Raises:
            WrongState: There is no guest.
        """
        ...

    async def resume(self, domain: DomainRef) -> DomainObservation:
        """Let the guest's processors go on. Succeeds if they do.

        Raises:
            WrongState: There is no guest.
        """
        ...


@dataclass(frozen=True, slots=True)
class LivePlan:
    """Says which of some changed paths can be changed in a running guest."""

    live: tuple[str, ...] = ()
    refused: tuple[tuple[str, str, str], ...] = ()
    """(path, stable reason, sentence): `NEEDS_RESTART`, `CAPABILITY_MISSING`."""


@runtime_checkable
class LiveUpdate(Protocol):
    """Can change a running guest."""

    def plan_live_update(
        self, current: domain_spec_pb2.DomainSpec, wanted: domain_spec_pb2.DomainSpec, paths: Sequence[str]
    ) -> LivePlan:
        """Sort the changed paths (`spec.disks.data1.throttle`) into those that can go live and the others. Pure."""
        ...

    async def update_live(
        self,
        domain: DomainRef,
        current: domain_spec_pb2.DomainSpec,
        wanted: domain_spec_pb2.DomainSpec,
        paths: Sequence[str],
    ) -> None:
        """Change a running guest in these paths, all of which `plan_live_update` called live.

        After a failure none of them is changed, as far as the hypervisor lets it; the error says what is not.

        Raises:
            WrongState: There is no guest.
            HypervisorFailed: It refused.
        """
        ...


@runtime_checkable
class Stats(Protocol):
    """Can read counters."""

    async def domain_stats(
        self, domains: Sequence[DomainRef], groups: frozenset[stats_pb2.StatsGroup.ValueType]
    ) -> Sequence[stats_pb2.DomainStats]:
        """Read the counters of active domains, one answer per domain in their order, within 2 s in all.

        `name`, `uid`, `state` and `runtime_id` are filled by the service. A domain that does not answer has `failure`
        and no counters; the method does not raise for it.
        """
        ...


@dataclass(frozen=True, slots=True)
class ConsolePosition:
    """Is where a console session begins."""

    device_id: str
    epoch: str
    """Changes when offsets begin anew: a new run, a lost history."""
    offset: int
    writable: bool


@dataclass(frozen=True, slots=True)
class ConsoleOutput:
    """Is output of a guest."""

    offset: int
    data: bytes


@dataclass(frozen=True, slots=True)
class ConsoleGap:
    """Is output that is no longer held."""

    epoch: str
    offset: int
    length_bytes: int
    """0: unknown, because a new epoch began."""


class ConsoleEndReason(enum.Enum):
    """Says why a console ended."""

    GUEST_ENDED = "guest_ended"
    TAKEN_OVER = "taken_over"
    END_OF_LOG = "end_of_log"


@dataclass(frozen=True, slots=True)
class ConsoleEnd:
    """Is the end of a console; nothing follows."""

    reason: ConsoleEndReason
    offset: int


ConsoleItem = ConsoleOutput | ConsoleGap | ConsoleEnd


class ConsoleSession(Protocol):
    """Is one caller's place at a console."""

    position: ConsolePosition

    def output(self) -> AsyncIterator[ConsoleItem]:
        """Tell what the guest puts out, from `position` on, pieces of at most 64 KiB.

        Ends with a ConsoleEnd. A reader that is slow gets a gap. One consumer.
        """
        ...

    async def write(self, data: bytes) -> None:
        """Give input to the guest; waits while the guest does not take it.

        Raises:
            WrongState: The session may not write (any more), or the guest has ended.
        """
        ...

    async def resize(self, columns: int, rows: int) -> None:
        """Tell the size of the caller's window. Does nothing where the port has none."""
        ...

    async def close(self) -> None:
        """Leave. May be called at any time, and again. The guest notices nothing."""
        ...


@runtime_checkable
class Console(Protocol):
    """Has serial or console ports that can be read and written."""

    async def open_console(
        self, domain: DomainRef, device_id: str, *, writable: bool, force: bool, epoch: str, offset: int | None
    ) -> ConsoleSession:
        """Join a port of an active guest.

        Args:
            domain: The domain.
            device_id: A serial or console port of its running spec.
            writable: Whether the caller is to be the one writer.
            force: Takes the port from the present writer, whose session ends with TAKEN_OVER.
            epoch: The epoch of `offset`; empty: the present one. Another than the present one begins with a gap.
            offset: Where output begins; None: with what comes from now on.

        Raises:
            WrongState: There is no guest.
            ResourceInUse: Another session writes, and `force` is not given.
            RangeBeyondEnd: The offset is behind the end.
        """
        ...

    async def read_console_log(
        self, domain: DomainRef, device_id: str, *, epoch: str, offset: int, follow: bool
    ) -> ConsoleSession:
        """Read the kept output of a port, of an ended guest too.

        The session is not writable. Without `follow` it ends with END_OF_LOG.

        Raises:
            RangeBeyondEnd: The offset is behind the end.
            ResourceNotFound: Nothing is kept (the domain never ran).
        """
        ...


@dataclass(frozen=True, slots=True)
class AddressObservation:
    """Is an address that the driver itself knows."""

    device_id: str
    address: str
    prefix_length: int = 0
    mac_address: str = ""
    hostname: str = ""


@runtime_checkable
class Addresses(Protocol):
    """Knows addresses of guests by itself."""

    async def guest_addresses(self, domain: DomainRef) -> Sequence[AddressObservation]:
        """List them; empty for a domain without a guest."""
        ...


class FoundDomain(NamedTuple):
    """Is a definition that the hypervisor holds."""

    domain_id: str
    uid: str
    spec: domain_spec_pb2.DomainSpec
    observation: DomainObservation | None = None
    """Its present run, if it has one; None: it does not run.

    Equal domains may share one: of whom and which run it is, it does not say.
    """
    runtime_id: str = ""
    """The run."""
    display_name: str = ""
    labels: Mapping[str, str] = MappingProxyType({})


@runtime_checkable
class Inventory(Protocol):
    """Holds definitions of its own, which the service takes over once."""

    def inventory_digest(self) -> str:
        """Return what tells this inventory from another.

        The service takes over each digest once. Empty: there is nothing to take over.
        """
        ...

    def inventory(self) -> AsyncIterator[Sequence[FoundDomain]]:
        """List the definitions in batches of at most a thousand."""
        ...


FACETS: Mapping[type, tuple[str, str]] = {
    GracefulStop: ("domain.stop.graceful", "asks a guest to end"),
    Reboot: ("domain.reboot", "asks a guest to boot again"),
    Reset: ("domain.reset", "resets a guest"),
    Suspend: ("domain.suspend", "pauses a guest and lets it go on"),
    LiveUpdate: ("domain.update.live", "changes running guests"),
    Stats: ("domain.stats", "reads counters"),
    Console: ("console", "reads and writes serial and console ports"),
    Addresses: ("domain.addresses", "knows addresses of guests by itself"),
    Inventory: ("domain.inventory", "holds definitions of its own"),
}
"""The capability that each facet stands for, with its meaning."""
