"""The table of drivers, and how one is found.

A driver that cannot be imported or made is listed with its reason, like one whose probe fails.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

from virtfleet_compute.drivers.api import Driver, DriverEnvironment, DriverFactory
from virtfleet_service.errors import DriverBroken

ENTRY_POINT_GROUP = "virtfleet_compute.drivers"
"""Other distributions add drivers under this group: `name = module:factory`."""

DRIVERS: Mapping[str, str] = {
    "qemu": "virtfleet_compute.drivers.qemu:create",
    "test": "virtfleet_compute.drivers.test:create",
}
"""Our own drivers: id to `module:factory`. Imported only when enabled."""


@dataclass(frozen=True, slots=True)
class Missing:
    """Is a driver that could not even be made."""

    driver_id: str
    error: DriverBroken


@functools.cache
def known() -> Mapping[str, str]:
    """Return every driver that is installed, by id; looked for once a process."""
    found = {point.name: point.value for point in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP)}
    return {**found, **DRIVERS}


def make(driver_id: str, environment: DriverEnvironment) -> Driver | Missing:
    """Import and make one driver. Never raises for a driver that is at fault: it becomes `Missing`."""
    # The search among all that is installed takes 20 ms.
    target = DRIVERS.get(driver_id) or known().get(driver_id)
    if target is None:
        return Missing(
            driver_id, DriverBroken(f"no driver {driver_id!r} is installed", driver=driver_id, cause="not installed")
        )
    module_name, _, attribute = target.partition(":")
    try:
        factory = cast("DriverFactory", getattr(importlib.import_module(module_name), attribute))
        return factory(environment)
    except DriverBroken as error:
        return Missing(driver_id, error)
    # A driver from elsewhere may fail in any way; it must not take the service with it.
    except Exception as error:  # noqa: BLE001
        cause = f"{type(error).__name__}: {error}"
        return Missing(
            driver_id, DriverBroken(f"driver {driver_id!r} cannot be loaded: {cause}", driver=driver_id, cause=cause)
        )
