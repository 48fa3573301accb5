"""Our table of packet filter rules in the kernel: put there by `nft`, held against what it was."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from virtfleet_network.backends.api import NetworkPlan
from virtfleet_network.backends.bridge.ruleset import TABLE, empty_ruleset, normalised, ruleset
from virtfleet_service import process
from virtfleet_service.errors import BackendFailed, DriverBroken

__all__ = ["Firewall"]

_TIMEOUT_SECONDS = 10.0
_SAID_BYTES = 200
_LISTING_LIMIT_BYTES = 16 * 1024 * 1024


class Firewall:
    """Holds the rules of all running networks; one change at a time.

    Args:
        nft: The program.
        plans: Gives the networks that run at the moment; asked when it is this change's turn.
    """

    def __init__(self, nft: Path, plans: Callable[[], Sequence[NetworkPlan]]) -> None:
        self._nft = nft
        self._plans = plans
        self._lock = asyncio.Lock()
        self._text = ""
        self._expected: Sequence[Any] | None = None
        self.adopted = False
        """Whether networks ran before this process, so that their rules should be there."""

    async def apply(self) -> None:
        """Replace the table in one transaction: at each moment a packet meets the old rules or the new ones.

        Raises:
            DriverBroken: nft is missing.
            BackendFailed: The rules were refused; the old ones stand.
        """
        async with self._lock:
            await self._apply()

    async def _apply(self) -> None:
        text = ruleset(self._plans())
        (await self._run(["-f", "-"], text)).check()
        self._text = text
        self._expected = await self._list()
        self.adopted = False

    async def repair(self) -> bool:
        """Hold the kernel's rules against ours and replace them if they differ.

        After a restart nothing is known about what the kernel made of our rules: they are replaced, and only their
        absence counts as a change.

        Returns:
            Whether somebody else had changed them.

        Raises:
            DriverBroken, BackendFailed: as `apply`.
        """
        async with self._lock:
            wanted = ruleset(self._plans())
            if wanted == empty_ruleset() and self._text in ("", wanted):
                return False
            there = await self._list()
            if self._text == wanted and there == self._expected:
                return False
            # Rules of other networks than before: their start or stop comes to it itself, and nobody else has done
            # anything.
            changed = self._text == wanted or (self.adopted and there is None)
            await self._apply()
            return changed

    async def _list(self) -> Sequence[Any] | None:
        done = await self._run(["-j", "list", "table", *TABLE.split()])
        if done.exit_code:
            return None
        try:
            return normalised(done.stdout.decode())
        except (ValueError, KeyError, TypeError) as error:
            raise BackendFailed(
                f"nft lists what is no JSON of a table: {done.stdout[:_SAID_BYTES]!r}", tool="nft"
            ) from error

    async def _run(self, arguments: Sequence[str], text: str = "") -> process.Completed:
        if not self._nft.exists():
            raise DriverBroken(f"{self._nft} is missing: install nftables", cause="NFT_MISSING", path=self._nft)
        return await process.run(
            [self._nft, *arguments],
            timeout_seconds=_TIMEOUT_SECONDS,
            input=text.encode() if text else None,
            limit_bytes=_LISTING_LIMIT_BYTES,
        )
