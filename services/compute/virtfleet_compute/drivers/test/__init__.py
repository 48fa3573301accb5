"""The test driver: guests in memory, with faults, latencies and seeds on demand.

A first-class driver, for fleets of any size.
"""

from __future__ import annotations

from virtfleet_compute.drivers.test.driver import create

__all__ = ["create"]
