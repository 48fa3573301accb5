"""Figures with their targets: what is printed, written and held against its mark."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class Target:
    """Is the mark of a figure.

    Attributes:
        bound: The value.
        at_least: Whether the figure must not be below it; otherwise it must not be above.
    """

    bound: float
    at_least: bool = False

    def met(self, value: float) -> bool:
        """Tell whether a value meets the mark."""
        return value >= self.bound if self.at_least else value <= self.bound

    def __str__(self) -> str:
        """Return the mark as people write it."""
        return f"{'≥' if self.at_least else '≤'} {self.bound:g}"


TARGETS: Final = {
    "direct_over_echo_p50": Target(1.4),
    "gateway_over_direct_p50": Target(3.0),
    "gateway_over_direct_throughput": Target(0.33, at_least=True),
    "qemu_start_over_bare": Target(1.3),
    "qemu_cycles_over_bare": Target(0.7, at_least=True),
    "destroy_p50_ms": Target(15),
    "list_1000_over_codec": Target(3),
    "node_private_mib": Target(170),
    "upload_over_tls": Target(0.5, at_least=True),
    "download_over_tls": Target(0.5, at_least=True),
    "upload_gateway_growth_mib": Target(16),
    "upload_storage_growth_mib": Target(16),
    "download_gateway_growth_mib": Target(16),
    "download_storage_growth_mib": Target(16),
    "command_help_ms": Target(250),
    "command_get_ms": Target(400),
    "fake_start_s": Target(2),
    "fake_private_mib": Target(200),
    "go_informer_updates_per_s": Target(950, at_least=True),
}
"""The marks, by key. A figure without one is reported as it is."""

NAMED: Final = frozenset(TARGETS) | {
    "fleet_50x100_ms",
    "event_p50_ms",
    "event_p99_ms",
    "go_informer_50k_sync_s",
    "go_informer_bytes_per_object",
    "go_informer_message_bytes",
    "go_informer_lag_p99_ms",
    "define_1000_ms",
    "start_1000_ms",
    "gateway_private_mib",
}
"""The keys at the head of `results.json`; `cold_start_ms` stands there too, with a value for each process."""


@dataclass(frozen=True, slots=True)
class Figure:
    """Is one result.

    Attributes:
        key: Its name in `results.json`.
        value: The value.
        unit: `ratio`, `µs`, `ms`, `/s`, `MiB` …
        count: Of how many measurements.
        note: What one must know to read it.
    """

    key: str
    value: float
    unit: str
    count: int = 1
    note: str = ""

    @property
    def target(self) -> Target | None:
        """Its mark; None: it has none."""
        return TARGETS.get(self.key)

    @property
    def verdict(self) -> str:
        """`met`, `MISSED`, or nothing where there is no mark."""
        target = self.target
        if target is None:
            return ""
        return "met" if target.met(self.value) else "MISSED"


@dataclass(frozen=True, slots=True)
class Failure:
    """Is a leg that could not be measured.

    Attributes:
        leg: Its name.
        error: What went wrong.
    """

    leg: str
    error: str

    @classmethod
    def of(cls, leg: str, error: Exception) -> Failure:
        """Return the failure that an error makes: its first line, and its last if it has more (the end of a log)."""
        lines = [line.strip() for line in f"{type(error).__name__}: {error}".splitlines() if line.strip()]
        return cls(leg, " … ".join(lines if len(lines) < 3 else [lines[0], lines[-1]]))
