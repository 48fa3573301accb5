"""The settings of the compute service."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from virtfleet_service.settings import ServiceSettings, SettingsError

MIB = 1024 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class ComputeSettings(ServiceSettings):
    """Is what the compute service has beside what every server has.

    Attributes:
        enabled_drivers: The drivers that are loaded; the first is the default one.
        drivers: A table of settings per driver: `[compute.drivers.test]`.
        launcher_socket: The socket of the node's launcher; unset: `<run_dir>/launcher/compute.sock`.
        guest_uid_first: The first of the numeric users that guests run as.
        guest_uid_count: How many there are; 0: guests run as the service's own user.
        memory_reserve_bytes: Memory that is kept back for the host.
        memory_overcommit_ratio: How much of the rest guests may have; 1.5: half as much again.
        domain_limit: How many domains may be defined; 0: any number.
        parallel_count: How many items of a batch run at once unless the call says so.
        autostart_seconds: How long the start of a domain after a boot waits for pools and networks.
        peer_seconds: How long one call of the storage or the network service may take.
        stop_grace_seconds: How long a guest may take to end unless the call says so.
        address_seconds: How often the leases of the network service are looked at while no watch of them is open.
    """

    enabled_drivers: tuple[str, ...] = ("qemu",)
    drivers: dict[str, Any] = field(default_factory=dict)
    launcher_socket: Path | None = None
    guest_uid_first: int = 20_000
    guest_uid_count: int = 10_000
    memory_reserve_bytes: int = 512 * MIB
    memory_overcommit_ratio: float = 1.0
    domain_limit: int = 0
    parallel_count: int = 32
    autostart_seconds: float = 180.0
    peer_seconds: float = 20.0
    stop_grace_seconds: float = 30.0
    address_seconds: float = 3.0

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            SettingsError: One cannot be used.
        """
        # Not super(): a dataclass with slots is another class than the one that this method was made for.
        ServiceSettings.__post_init__(self)
        if not self.enabled_drivers:
            raise SettingsError("enabled_drivers: at least one driver is needed")
        unknown = set(self.drivers) - set(self.enabled_drivers)
        if unknown:
            raise SettingsError(f"drivers.{min(unknown)}: the driver is not in enabled_drivers")
        if self.guest_uid_first < 1 or self.guest_uid_count < 0:
            raise SettingsError("guest_uid_first: a guest never runs as user 0")
        if self.memory_overcommit_ratio <= 0:
            raise SettingsError("memory_overcommit_ratio: must be more than 0")
        if self.parallel_count < 1:
            raise SettingsError("parallel_count: must be at least 1")

    @property
    def launcher_path(self) -> Path:
        """The socket of the launcher."""
        return self.launcher_socket or self.run_dir / "launcher" / "compute.sock"
