"""What each reason of an error means, why it comes, and what to do: the catalogue for people."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources


@dataclass(frozen=True, slots=True)
class Reason:
    """Is one entry.

    Attributes:
        name: The reason: `WRONG_STATE`.
        means: What it says.
        cause: Why it comes.
        remedy: What to do.
        retry: `no`: the same call fails again; `same`: the same call, with the same request_id, may succeed later;
            `changed`: read again, decide again, then call.
    """

    name: str
    means: str
    cause: str
    remedy: str
    retry: str


@cache
def catalogue() -> Mapping[str, Reason]:
    """Return all entries by reason."""
    text = resources.files("virtfleet_client").joinpath("data/reasons.toml").read_text(encoding="utf-8")
    return {name: Reason(name, **fields) for name, fields in tomllib.loads(text).items()}
