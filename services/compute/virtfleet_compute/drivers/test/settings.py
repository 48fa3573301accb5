"""The settings of the test driver: `[drivers.test]`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class Fault(BaseModel):
    """Is a fault of one method. The first fault that matches a call and is not used up strikes."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: str
    """The method of `drivers/api.py`: `start`, `stop`, `shut_down`, `resolve`, …; `*`: all."""
    domains: str = "*"
    """A pattern (`web-*`) that the id of the domain must match."""
    reason: str = ""
    """The reason of the error that is raised: `HYPERVISOR_FAILED`; empty: none is."""
    message: str = "injected by the settings of the test driver"
    when: Literal["before", "after"] = "before"
    """Whether the error comes before the effect or after it, as from a driver whose answer was lost."""
    count: int = Field(default=0, ge=0)
    """How many calls it strikes; 0: all."""
    skip: int = Field(default=0, ge=0)
    """How many matching calls it lets pass first."""
    probability: float = Field(default=1.0, ge=0, le=1)
    latency_seconds: float = Field(default=0.0, ge=0)
    """How long the call takes before its effect."""
    hang: bool = False
    """Whether the call waits for ever (until it is cancelled) before its effect."""


class Settings(BaseModel):
    """Are the settings of the test driver."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    seed_file: Path | None = None
    """Domains that exist from the first start on: TOML or JSON (see `seeds`)."""
    state_file: Path | None = None
    """Keeps what runs over restarts of the service, like a hypervisor that lives on.

    Without it guests end with the process.
    """
    faults: tuple[Fault, ...] = ()
    without: frozenset[str] = frozenset()
    """Facets that are left out, by class name: `Suspend`. For callers that want to see CAPABILITY_MISSING."""
    broken: str = ""
    """Why the driver cannot run; empty: it can."""
    random_seed: int = 0
    """Makes the chance of faults repeatable."""
    version: str = "1.0"
    """The version that the driver gives itself; its machine type is `test-<version>`."""
