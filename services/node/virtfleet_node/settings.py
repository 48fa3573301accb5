"""The settings of a node in one process: which services run; each reads its own from the same file."""

from __future__ import annotations

from dataclasses import dataclass

from virtfleet_service.settings import ServiceSettings, SettingsError

SERVICES = ("storage", "network", "compute")
"""In the order in which they start: providers first, though none needs another to start."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeSettings(ServiceSettings):
    """Is what the process itself needs.

    Attributes:
        services: The services that run.
    """

    services: tuple[str, ...] = SERVICES

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            SettingsError: One cannot be used.
        """
        ServiceSettings.__post_init__(self)
        unknown = set(self.services) - set(SERVICES)
        if unknown or not self.services:
            raise SettingsError(f"services: must be some of {', '.join(SERVICES)}")
