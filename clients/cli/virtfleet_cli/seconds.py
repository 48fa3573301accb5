"""Numbers of seconds on the command line."""

from __future__ import annotations

import math
from typing import Any, Final

import click

LIMIT_SECONDS: Final = 365 * 86_400.0


class Seconds(click.ParamType[float]):
    """Is a parameter that is a number of seconds: neither endless, nor no number, as Python would let it be.

    Args:
        least: The smallest that it may be.
    """

    name = "seconds"

    def __init__(self, least: float = 0.0) -> None:
        self._least = least

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:  # noqa: ANN401 - click's own
        """Return the seconds."""
        try:
            found = float(value)
        except ValueError:
            found = math.nan
        if not self._least <= found <= LIMIT_SECONDS:
            self.fail(f"`{value}` is no number of seconds from {self._least:g} to a year", param, ctx)
        return found
