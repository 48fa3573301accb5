"""The back ends of networks: one literal table, and entry points for those outside the tree."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module, metadata
from pathlib import Path
from typing import TYPE_CHECKING

from virtfleet_network.backends.api import NetworkBackend

if TYPE_CHECKING:
    from virtfleet_service.launcher import LauncherClient

__all__ = ["BUILT_IN", "BackendContext", "backend_ids", "create"]

ENTRY_POINTS = "virtfleet.network_backends"


@dataclass(frozen=True, slots=True)
class BackendContext:
    """Is what a back end may use of its service."""

    node: str
    state_dir: Path
    launcher: LauncherClient
    dnsmasq: Path
    nft: Path
    dnsmasq_uid: int | None = None
    """The numeric user of dnsmasq; None: the last one of the launcher's range."""


BUILT_IN: Mapping[str, str] = {
    "bridge": "virtfleet_network.backends.bridge.backend:create",
}
"""The id of a back end → `module:factory`; imported when it is used."""


def _load(reference: str) -> Callable[[BackendContext], NetworkBackend]:
    module, _, name = reference.partition(":")
    factory: Callable[[BackendContext], NetworkBackend] = getattr(import_module(module), name)
    return factory


def _references() -> dict[str, str]:
    found = {point.name: point.value for point in metadata.entry_points(group=ENTRY_POINTS)}
    return {**found, **BUILT_IN}


def backend_ids() -> tuple[str, ...]:
    """List the ids of all back ends that are installed."""
    return tuple(sorted(_references()))


def create(backend_id: str, context: BackendContext) -> NetworkBackend:
    """Make a back end; it does nothing before `open`.

    Raises:
        KeyError: There is none of that id.
    """
    return _load(_references()[backend_id])(context)
