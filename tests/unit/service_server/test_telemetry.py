"""What is counted, while somebody else reads it."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator

import pytest

from virtfleet_service.telemetry import Meters


@pytest.fixture
def _hurried() -> Iterator[None]:
    """Let threads take turns as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("_hurried")
def test_metrics_are_read_while_methods_and_codes_come_to_be() -> None:
    for _ in range(10):
        meters = Meters()

        def count(meters: Meters = meters) -> None:
            for number in range(300):
                meters.method(f"m{number}").observe("OK", 0.1)
                meters.method("m0").observe(f"CODE_{number}", 0.1)

        counting = threading.Thread(target=count)
        counting.start()
        try:
            while counting.is_alive():
                assert list(meters.collect())
        finally:
            counting.join()
        (calls, _) = meters.collect()
        assert len(calls.samples) == 300 + 300
