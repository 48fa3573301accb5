"""The QEMU driver: guests as processes that the node's launcher starts, held by QMP."""

from __future__ import annotations

from virtfleet_compute.drivers.qemu.driver import create

__all__ = ["create"]
