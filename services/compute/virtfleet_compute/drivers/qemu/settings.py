"""The settings of the QEMU driver: `[drivers.qemu]`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from virtfleet_service.errors import DriverBroken


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Are the settings of the QEMU driver."""

    binary: str = ""
    """The QEMU for this host's architecture, an absolute path; empty: the one of the system."""
    accelerator: str = ""
    """`kvm` or `tcg`: the one that guests get unless they ask for another; empty: the best that works."""
    start_seconds: float = 20.0
    """How long QEMU may take until it answers."""
    command_seconds: float = 10.0
    """How long QEMU may take for a command."""
    end_seconds: float = 10.0
    """How long the kernel may take to end a process that was killed."""


def from_table(table: Mapping[str, object]) -> Settings:
    """Check a table of a settings file.

    Raises:
        DriverBroken: It has an unknown key, or a value that cannot be used.
    """
    kinds = {field.name: (int, float) if field.type == "float" else (str,) for field in dataclasses.fields(Settings)}
    for key, value in table.items():
        if key not in kinds:
            raise _wrong(f"there is no {key}")
        if not isinstance(value, kinds[key]) or isinstance(value, bool):
            raise _wrong(f"{key} must be of type {kinds[key][-1].__name__}")
    settings = Settings(**table)  # type: ignore[arg-type]  # checked above
    if settings.binary and not Path(settings.binary).is_absolute():
        raise _wrong("binary must be an absolute path")
    if settings.accelerator not in ("", "kvm", "tcg"):
        raise _wrong("accelerator must be kvm or tcg")
    if min(settings.start_seconds, settings.command_seconds, settings.end_seconds) <= 0:
        raise _wrong("a time must be more than 0")
    return settings


def _wrong(text: str) -> DriverBroken:
    return DriverBroken(f"the settings of the QEMU driver are wrong: {text}", driver="qemu", cause=text)
