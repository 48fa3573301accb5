"""Certificates and join tokens that have ended: told as such, forgotten a day later. The authority warns before."""

from __future__ import annotations

import asyncio
import datetime as dt
import logging
from typing import TYPE_CHECKING, Final

from virtfleet_service.errors import VirtfleetError

if TYPE_CHECKING:
    from virtfleet_gateway.authority import Authority
    from virtfleet_gateway.certificates import Certificates
    from virtfleet_gateway.join_tokens import JoinTokens
    from virtfleet_service.store import Store

_log = logging.getLogger(__name__)

LOOK_SECONDS: Final = 60.0
AUTHORITY_WARNING: Final = dt.timedelta(days=366)
"""So long before its end the authority is said to end: what it signs for people may live for as long."""
_WARNING_INTERVAL: Final = dt.timedelta(days=1)


class Lapses:
    """Looks every minute at what has ended.

    Args:
        store: The gateway's store.
        authority: Says in its log that it ends, a year before it does.
        certificates: Are told to look.
        tokens: Are told to look.
    """

    def __init__(self, store: Store, authority: Authority, certificates: Certificates, tokens: JoinTokens) -> None:
        self._store = store
        self._authority = authority
        self._certificates = certificates
        self._tokens = tokens
        self._warned: dt.datetime | None = None

    async def run(self) -> None:
        """Look until cancelled."""
        while True:
            self.warn(dt.datetime.now(dt.UTC))
            try:
                await self.look()
            except VirtfleetError as error:
                _log.warning("what has ended is told later: %s", error)
            await asyncio.sleep(LOOK_SECONDS)

    async def look(self) -> None:
        """Tell what has ended and forget what has long ended; in slices, so that writers go on."""
        await self._store.write(self._tokens.lapse)
        place = ""
        while True:
            # The work runs before this goes on: it sees the place of its own round.
            place = await self._store.write(lambda tx: self._certificates.lapse(tx, place))  # noqa: B023
            if not place:
                return

    def warn(self, now: dt.datetime) -> None:
        """Say once a day that the authority ends, when that is near: nothing in the fleet outlives it."""
        left = self._authority.not_after - now
        if left > AUTHORITY_WARNING or (self._warned is not None and now - self._warned < _WARNING_INTERVAL):
            return
        self._warned = now
        _log.error(
            "the authority of the fleet ends in %d days, and with it every certificate",
            left.days,
            extra={"not_after": self._authority.not_after.isoformat()},
        )
