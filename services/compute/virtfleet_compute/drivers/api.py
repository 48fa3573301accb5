"""What a driver must do, what it may do, and what holds after each failure.

A driver is the code for one hypervisor. It implements `Driver` and any of the facets of `facets.py`; the service asks
`driver.facet(Suspend)` and answers CAPABILITY_MISSING where there is none. Reports of capabilities are made from the
same fact, so that no list can disagree with the code.

Rules for every method:

* It is async, never blocks the event loop, and may be cancelled at each await; what holds after a cancellation is what
  holds after a failure.
* It is idempotent: a repetition after success, failure, cancellation or a crash of the service is right, and does no
  harm.
* It raises the classes of `virtfleet_service.errors` and nothing else on purpose. `CapabilityMissing` where a spec
  wants what the driver lacks.
* Calls for one domain never overlap, except `inspect`, `Stats`, `Console` and `Addresses`, which may come at any time.
  Calls for different domains run side by side.
* It gets the API's own spec messages and must not change them. It returns the frozen dataclasses below.
* It knows no gRPC context, no store, no servicer, no use case, no other driver.

A domain is known to a driver by its uid; the id in its name is for file names and people.
"""

from __future__ import annotations

import enum
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Protocol, TypeVar

from virtfleet.compute.v1 import domain_pb2, domain_spec_pb2

DomainState = domain_pb2.DomainState
DomainStateReason = domain_pb2.DomainStateReason

Facet = TypeVar("Facet")

KERNEL_DEVICE_ID = "os.kernel"
"""The device id under which the kernel volume is attached; no device of a spec can have it."""

INITRD_DEVICE_ID = "os.initrd"
"""The device id under which the volume of the initial file system is attached."""


class DefinitionAuthority(enum.Enum):
    """Says who holds the definitions of a driver's domains."""

    SERVICE = "service"
    """Our store does. The driver learns a spec by `define` and `start`."""
    HYPERVISOR = "hypervisor"
    """The hypervisor does, and others edit them there."""


@dataclass(frozen=True, slots=True)
class DomainRef:
    """Names a domain to a driver."""

    name: str
    """`nodes/{node}/domains/{domain}`."""
    uid: str
    """Its identity; what a driver keys everything by."""

    @property
    def domain_id(self) -> str:
        """The last segment of the name: safe in file names, at most 63 characters, may change."""
        return self.name.rpartition("/")[2]


@dataclass(frozen=True, slots=True)
class DriverEnvironment:
    """Is all that a driver is given when it is made."""

    node: str
    """The id of the node."""
    state_directory: Path
    """A directory of the driver's own that outlives a boot; made by the driver."""
    run_directory: Path
    """A directory of the driver's own that does not outlive a boot.

    Made by the driver. One directory per guest goes below it.
    """
    launcher_socket: Path | None
    """The socket of the node's launcher.

    None: there is none, and a driver that needs it reports itself broken in `probe`.
    """
    settings: Mapping[str, object] = field(default_factory=dict)
    """The table `[drivers.<id>]` of the service's settings, unchecked.

    The driver checks it and raises `DriverBroken` in `probe`.
    """


@dataclass(frozen=True, slots=True)
class AcceleratorReport:
    """Is a way to drive guests, as a probe found it."""

    name: str
    """`kvm`, `tcg`."""
    usable: bool
    """Whether it ran guest code when tried."""
    reason: str
    """Why not, or what was seen."""


@dataclass(frozen=True, slots=True)
class IsolationReport:
    """Is one layer that keeps guests in."""

    name: str
    """`user`, `seccomp`, `cgroup`, `session`."""
    enabled: bool
    """Whether new guests get it."""
    reason: str
    """Why not, or how."""


@dataclass(frozen=True, slots=True)
class DriverReport:
    """Is what a driver found out about its hypervisor."""

    version: str
    """The hypervisor's version: `7.2.15`."""
    capabilities: tuple[tuple[str, str], ...] = ()
    """(id, meaning) of what is finer than a facet: `disk.format.qcow2`, `device.rng`.

    Facets are added by the service.
    """
    machines: tuple[str, ...] = ()
    """Versioned machine types."""
    archs: tuple[str, ...] = ()
    """Architectures that it runs."""
    accelerators: tuple[AcceleratorReport, ...] = ()
    isolation_layers: tuple[IsolationReport, ...] = ()
    uses_host_memory: bool = True
    """Whether its guests take memory of this node, and are counted against it before they start."""


@dataclass(frozen=True, slots=True)
class BackingFile:
    """Is one file of a backing chain."""

    path: str
    format: str


@dataclass(frozen=True, slots=True)
class FileConnection:
    """Is an attached volume, or a host path, ready for use: the guest's user may open every file of it."""

    path: str
    """The absolute path of the top file."""
    format: str
    """`raw` or `qcow2`."""
    backing_chain: tuple[BackingFile, ...] = ()
    """The files behind it, nearest first."""
    capacity_bytes: int = 0
    """The size that the guest sees; 0: unknown."""
    attachment_id: str = ""
    """The record at storage; empty for a host path."""


@dataclass(frozen=True, slots=True)
class TapConnection:
    """Is a plugged port: a persistent tap in the node's network namespace, already on its bridge.

    The launcher opens it.
    """

    interface_name: str
    bridge_name: str
    mac_address: str
    mtu_bytes: int
    port: str
    """`nodes/{node}/networks/{network}/ports/{port}`."""


@dataclass(frozen=True, slots=True)
class StartPlan:
    """Is all that a start needs.

    Every connection in it is ready and stays so until the service is told that the guest has ended.
    """

    domain: DomainRef
    runtime_id: str
    """Identifies this run; the driver keeps it where the next instance of the service finds it."""
    spec: domain_spec_pb2.DomainSpec
    """The resolved spec: nothing is left to decide but what `resolve` leaves to the start."""
    run_as_uid: int
    """The numeric user (and group) for the guest's process; 0: the service's own."""
    paused: bool
    """Leaves the guest paused before its first instruction."""
    disks: Mapping[str, FileConnection] = field(default_factory=dict)
    """By device id; a drive without a medium is missing here."""
    kernel: FileConnection | None = None
    initrd: FileConnection | None = None
    interfaces: Mapping[str, TapConnection] = field(default_factory=dict)
    """By device id; a card without a cable is missing here."""


@dataclass(frozen=True, slots=True)
class DiskError:
    """Is an error of a disk that still stands."""

    device_id: str
    error: str
    """`enospc`, `other`."""


@dataclass(frozen=True, slots=True)
class DomainObservation:
    """Is what a driver sees of one domain now."""

    uid: str
    state: domain_pb2.DomainState.ValueType
    reason: domain_pb2.DomainStateReason.ValueType
    runtime_id: str = ""
    """That of the StartPlan; empty where the driver knows of no run."""
    start_time: datetime | None = None
    """Aware, UTC."""
    pid: int = 0
    run_as_uid: int = 0
    active_spec: domain_spec_pb2.DomainSpec | None = None
    """What runs, where the driver keeps it (from the run directory); None: as started."""
    disk_errors: tuple[DiskError, ...] = ()
    failure: str = ""
    """Why the run failed, in a sentence, with the redacted end of what the hypervisor said; empty: it did not."""
    control_lost: bool = False
    """The hypervisor does not answer; the state is the last one known, or UNKNOWN."""
    name: str = ""
    """The name in the run directory, for a domain that the store does not have."""

    @property
    def active(self) -> bool:
        """Whether there is a guest."""
        return self.state not in (DomainState.DOMAIN_STATE_SHUT_OFF, DomainState.DOMAIN_STATE_CRASHED)


class EventKind(enum.Enum):
    """Names what a driver tells by itself."""

    STATE_CHANGED = "state_changed"
    """`observation` is the new state. Also told for changes that a call of the service caused."""
    REBOOTED = "rebooted"
    """The guest booted again."""
    CLOCK_CHANGED = "clock_changed"
    WATCHDOG = "watchdog"
    """The guest's watchdog fired; a change of state comes apart."""
    IO_ERROR = "io_error"
    """`device_id`, `cause`, `paused`."""
    PANICKED = "panicked"
    """The guest's kernel panicked; a change of state comes apart."""
    CONTROL_CHANGED = "control_changed"
    """The hypervisor stopped answering, or does again; `observation` says which."""
    DRIFTED = "drifted"
    """Something outside virtfleet changed the running guest; `message` says what."""
    GAP = "gap"
    """Events may have been lost; the service lists and compares everything. `uid` is empty."""


@dataclass(frozen=True, slots=True)
class DriverEvent:
    """Is something that a driver saw."""

    kind: EventKind
    uid: str
    time: datetime
    """Aware, UTC."""
    observation: DomainObservation | None = None
    reason: str = ""
    """A stable cause in UPPER_SNAKE_CASE."""
    message: str = ""
    """A sentence for people."""
    device_id: str = ""
    cause: str = ""
    paused: bool = False


class Driver(Protocol):
    """Is the required part of a driver."""

    driver_id: str
    """Its id in specs and names: `qemu`."""
    definition_authority: DefinitionAuthority

    def running(self) -> AbstractAsyncContextManager[None]:
        """Hold what the driver needs while the service lives: tasks, connections, watches.

        Entered once, before any other method but `probe`. Leaving ends the driver's tasks and connections and never a
        guest.
        """
        ...

    async def probe(self) -> DriverReport:
        """Find out whether the hypervisor can be used, and how. Bounded in time (10 s); may be called again.

        Raises:
            DriverBroken: It cannot; the message says why in a sentence that an operator can act on.
        """
        ...

    async def resolve(
        self, domain: DomainRef, spec: domain_spec_pb2.DomainSpec, previous: domain_spec_pb2.DomainSpec | None
    ) -> domain_spec_pb2.DomainSpec:
        """Decide everything that a spec leaves open, once: versioned machine, CPU model, buses, slots.

        Pure apart from what `probe` found, and quick (bulk definitions call it a thousand times). The service has
        filled lifetime, counts, sizes and MACs before. What `previous` has decided stays, unless the spec now asks for
        something else. `disks[].format` of a volume stays open: storage tells it at start, in the connection.

        Args:
            domain: The domain.
            spec: What was asked for, with the service's own defaults filled in.
            previous: The resolved spec of the generation before; None: the domain is new.

        Returns:
            A new message.

        Raises:
            CapabilityMissing: The spec asks for something that the driver lacks; `field` and metadata `capability` say
                what.
            FieldOutOfRange, FieldConflict, FieldRequired: The spec cannot be met in itself; `field` says where.
        """
        ...

    async def define(self, domain: DomainRef, resolved: domain_spec_pb2.DomainSpec) -> None:
        """Make known a definition, new or changed.

        Succeeds if it is known. A driver of authority SERVICE may do nothing.

        After a failure the former definition holds, or none.
        """
        ...

    async def undefine(self, domain: DomainRef) -> None:
        """Forget a definition and all that is kept of it: run directory, console history.

        Succeeds if there is none. The domain is not active.

        After a failure some of it may be left; a repetition removes it.
        """
        ...

    async def start(self, plan: StartPlan) -> DomainObservation:
        """Start a guest and answer when it runs (or is paused, if asked to): its hypervisor answers and has not died.

        Removes what the last run left. A guest of the same `runtime_id` that runs is a success; one of another is ended
        first.
        After a failure or cancellation nothing of this run is left: no process, no file but the console history.

        Raises:
            HypervisorFailed: It refused or died; the message holds the redacted end of what it said.
            DriverBroken: The driver cannot run now.
            BackendUnreachable: The launcher does not answer.
        """
        ...

    async def stop(self, domain: DomainRef) -> DomainObservation:
        """End a guest by force and answer when it is gone: no process of it is left, its disks and tap are free.

        Succeeds if there is none. The console history stays until the next `start` or `undefine`. After a failure the
        guest may run or not; `inspect` tells.
        """
        ...

    async def inspect(self, domain: DomainRef) -> DomainObservation:
        """Look at one domain.

        One that is unknown is SHUT_OFF with an empty `runtime_id`. Never waits for a guest longer than 2 s
        (`control_lost`).
        """
        ...

    async def list(self) -> Sequence[DomainObservation]:
        """List every domain that has a guest, or whose last run's end is still on record (with its reason).

        Called at start, before `events`.
        """
        ...

    def events(self) -> AsyncIterator[DriverEvent]:
        """Tell what happens, in order per domain, from the call of `list` on.

        One consumer; ends never (cancel it). Bounded: overflow becomes GAP.
        """
        ...

    def facet(self, kind: type[Facet]) -> Facet | None:
        """Return the driver's implementation of a facet, or None. The answer does not change after `probe`."""
        ...


class DriverFactory(Protocol):
    """Makes a driver. The registry and the entry points of group `virtfleet_compute.drivers` name one per driver."""

    def __call__(self, environment: DriverEnvironment) -> Driver:
        """Return the driver; must not do any input or output, nor raise for a missing hypervisor (`probe` does)."""
        ...
