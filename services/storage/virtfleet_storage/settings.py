"""The settings of the storage service."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from virtfleet_service.settings import ServiceSettings, SettingsError


@dataclass(frozen=True, slots=True, kw_only=True)
class StorageSettings(ServiceSettings):
    """Is what every service has, and what this one adds.

    Attributes:
        pools_root: Where pools without a `target_path` lie, each in a folder named like it; unset: `{state_dir}/pools`.
        rescan_seconds: How long a change that the kernel does not tell of may stay unseen.
        upload_retention_seconds: For how long a cut upload waits for its client.
    """

    pools_root: Path | None = None
    rescan_seconds: float = 5.0
    upload_retention_seconds: float = 24 * 3600.0

    def __post_init__(self) -> None:
        """Check what can be checked without looking at the machine.

        Raises:
            SettingsError: A value cannot be used.
        """
        ServiceSettings.__post_init__(self)
        if not self.node:
            raise SettingsError("node: is required")
        if self.pools_root is not None and not self.pools_root.is_absolute():
            raise SettingsError("pools_root: must be an absolute path")
        if not 0.1 <= self.rescan_seconds <= 10:
            raise SettingsError("rescan_seconds: must be 0.1 to 10")
        if self.upload_retention_seconds <= 0:
            raise SettingsError("upload_retention_seconds: must be more than 0")

    @property
    def root(self) -> Path:
        """The root of pools in force, without links."""
        return (self.pools_root or self.state_dir / "pools").resolve()
