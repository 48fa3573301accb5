"""Named places at which a test lets the process die, as by SIGKILL, between an intent, its effect and its commit.

The environment variable `VIRTFLEET_FAILPOINT` names them: `compute.start.attached` kills at the first passage,
`compute.start.attached:3` at the third; several are separated by commas. Unset, as always outside of tests, a passage
costs
a look into an empty dictionary.
"""

from __future__ import annotations

import os
import signal
from typing import Final

VARIABLE: Final = "VIRTFLEET_FAILPOINT"


def _parse(text: str) -> dict[str, int]:
    armed: dict[str, int] = {}
    for item in filter(None, text.split(",")):
        name, _, passage = item.partition(":")
        armed[name.strip()] = int(passage) if passage else 1
    return armed


_armed = _parse(os.environ.get(VARIABLE, ""))


def reach(name: str) -> None:
    """Pass a place. Does not return if the place is armed and this is the passage that kills."""
    if name not in _armed:
        return
    _armed[name] -= 1
    if _armed[name] <= 0:
        os.kill(os.getpid(), signal.SIGKILL)
