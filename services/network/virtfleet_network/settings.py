"""The settings of the network service."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from virtfleet_service.settings import ServiceSettings

__all__ = ["NetworkSettings"]


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkSettings(ServiceSettings):
    """Is what the network service needs beside what every server has.

    Attributes:
        launcher_socket: The socket of the launcher; unset: `{run_dir}/launcher/network.sock`.
        backend: The back end of networks.
        dnsmasq: The program.
        nft: The program.
        dnsmasq_uid: The numeric user and group of dnsmasq; unset: the last one of the launcher's range.
        repair_seconds: How often the node is looked at although nothing was noticed.
        autostart_seconds: How long after a boot what starts by itself is tried again.
    """

    launcher_socket: Path | None = None
    backend: str = "bridge"
    dnsmasq: Path = Path("/usr/sbin/dnsmasq")
    nft: Path = Path("/usr/sbin/nft")
    dnsmasq_uid: int | None = None
    repair_seconds: float = 5.0
    autostart_seconds: float = 180.0

    @property
    def launcher(self) -> Path:
        """Where the launcher is."""
        return self.launcher_socket or self.run_dir / "launcher" / "network.sock"
