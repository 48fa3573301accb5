"""The settings of the test driver: `[drivers.test]`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from virtfleet_service.errors import DriverBroken

T = TypeVar("T")


def from_table(of: type[T], table: object, where: str) -> T:
    """Make a dataclass from a table of a settings file.

    Raises:
        DriverBroken: It is no table, has an unknown key, or a value of another type than the default's.
    """
    if not isinstance(table, Mapping):
        raise _wrong(f"{where} is no table")
    known = {field.name: field for field in dataclasses.fields(of)}  # type: ignore[arg-type]  # any dataclass
    values: dict[str, Any] = {}
    for key, value in table.items():
        field = known.get(key)
        if field is None:
            raise _wrong(f"{where} has no {key}")
        wanted = field.metadata.get("of")
        if wanted is not None:
            values[key] = wanted(value, f"{where}.{key}")
        elif not isinstance(value, _plain(field.default)) or (
            isinstance(value, bool) != isinstance(field.default, bool)
        ):
            raise _wrong(f"{where}.{key} must be of type {type(field.default).__name__}")
        else:
            values[key] = value
    try:
        return of(**values)
    except (TypeError, ValueError) as error:
        raise _wrong(f"{where}: {error}") from error


def _plain(default: object) -> tuple[type, ...]:
    return (
        (int, float) if isinstance(default, float) else (str,) if default is dataclasses.MISSING else (type(default),)
    )


def _wrong(text: str) -> DriverBroken:
    return DriverBroken(f"the settings of the test driver are wrong: {text}", driver="test", cause=text)


def _path(value: object, where: str) -> Path:
    if not isinstance(value, str | Path):
        raise _wrong(f"{where} must be a path")
    return Path(value)


def _faults(value: object, where: str) -> tuple[Fault, ...]:
    if not isinstance(value, list | tuple):
        raise _wrong(f"{where} must be a list of tables")
    return tuple(from_table(Fault, item, f"{where}[{number}]") for number, item in enumerate(value))


def _words(value: object, where: str) -> frozenset[str]:
    if not isinstance(value, list | tuple | set | frozenset):
        raise _wrong(f"{where} must be a list")
    return frozenset(map(str, value))


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """Is a fault of one method. The first fault that matches a call and is not used up strikes."""

    method: str
    """The method of `drivers/api.py`: `start`, `stop`, `shut_down`, `resolve`, …; `*`: all."""
    domains: str = "*"
    """A pattern (`web-*`) that the id of the domain must match."""
    reason: str = ""
    """The reason of the error that is raised: `HYPERVISOR_FAILED`; empty: none is."""
    message: str = "injected by the settings of the test driver"
    when: str = "before"
    """Whether the error comes `before` the effect or `after` it, as from a driver whose answer was lost."""
    count: int = 0
    """How many calls it strikes; 0: all."""
    skip: int = 0
    """How many matching calls it lets pass first."""
    probability: float = 1.0
    latency_seconds: float = 0.0
    """How long the call takes before its effect."""
    hang: bool = False
    """Whether the call waits for ever (until it is cancelled) before its effect."""

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ValueError: One cannot be used.
        """
        if self.when not in ("before", "after"):
            raise ValueError("when must be `before` or `after`")
        if self.count < 0 or self.skip < 0 or self.latency_seconds < 0 or not 0 <= self.probability <= 1:
            raise ValueError("a number is out of its range")


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Are the settings of the test driver."""

    seed_file: Path | None = dataclasses.field(default=None, metadata={"of": _path})
    """Domains that exist from the first start on: TOML or JSON (see `seeds`)."""
    state_file: Path | None = dataclasses.field(default=None, metadata={"of": _path})
    """Keeps what runs over restarts of the service, like a hypervisor that lives on.

    Without it guests end with the process."""
    faults: tuple[Fault, ...] = dataclasses.field(default=(), metadata={"of": _faults})
    without: frozenset[str] = dataclasses.field(default=frozenset(), metadata={"of": _words})
    """Facets that are left out, by class name: `Suspend`. For callers that want to see CAPABILITY_MISSING."""
    broken: str = ""
    """Why the driver cannot run; empty: it can."""
    random_seed: int = 0
    """Makes the chance of faults repeatable."""
    version: str = "1.0"
    """The version that the driver gives itself; its machine type is `test-<version>`."""
    uses_host_memory: bool = False
    """Whether its guests are counted against the memory of the node, as those of a real hypervisor are."""
