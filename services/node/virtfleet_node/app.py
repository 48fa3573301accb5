"""The composition root: enters the services, each with its own settings, store, sockets and listener."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import TypeVar

from virtfleet_compute.settings import ComputeSettings
from virtfleet_network.settings import NetworkSettings
from virtfleet_node.settings import SERVICES
from virtfleet_service.settings import ServiceSettings
from virtfleet_storage.settings import StorageSettings

SettingsT = TypeVar("SettingsT", bound=ServiceSettings)

SETTINGS: Mapping[str, type[ServiceSettings]] = {
    "compute": ComputeSettings,
    "storage": StorageSettings,
    "network": NetworkSettings,
}


@dataclass(frozen=True, slots=True)
class Node:
    """Is the running node: the app of each service by its name."""

    apps: Mapping[str, object]


def _running(service: str) -> Callable[[ServiceSettings], AbstractAsyncContextManager[object]]:
    """Import a service only if it runs."""
    if service == "compute":
        from virtfleet_compute import app as compute

        return lambda settings: compute.running(_as(settings, ComputeSettings))
    if service == "storage":
        from virtfleet_storage import app as storage

        return lambda settings: storage.running(_as(settings, StorageSettings))
    from virtfleet_network import app as network

    return lambda settings: network.running(_as(settings, NetworkSettings))


def _as(settings: ServiceSettings, kind: type[SettingsT]) -> SettingsT:
    if not isinstance(settings, kind):
        raise TypeError(f"{type(settings).__name__} are no {kind.__name__}")
    return settings


@asynccontextmanager
async def running(settings: Mapping[str, ServiceSettings]) -> AsyncIterator[Node]:
    """Run services while entered; they drain in reverse order at the end.

    Args:
        settings: The settings of each service that runs, by its name.
    """
    async with AsyncExitStack() as stack:
        apps: dict[str, object] = {}
        for service in SERVICES:
            if service in settings:
                apps[service] = await stack.enter_async_context(_running(service)(settings[service]))
        yield Node(apps)
