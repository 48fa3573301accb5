"""Who is at work on which volume right now, so that a copy is not wiped under the copier and a half-made file is not adopted.

Claims live in memory: they protect work that runs in this process. What outlives it (attachments, children) is in the store;
two exclusive operations on one target are kept apart by their records.
"""

from __future__ import annotations

import itertools
import threading
from dataclasses import dataclass, field

from virtfleet_service.errors import OperationConflict


@dataclass(slots=True)
class Claims:
    """Is the table of claims. Safe in all threads: claims are taken in the store's writer, and released anywhere."""

    _lock: threading.Lock = field(default_factory=threading.Lock)
    _readers: dict[str, list[Claim]] = field(default_factory=dict)
    _writers: dict[str, Claim] = field(default_factory=dict)
    _released: dict[str, int] = field(default_factory=dict)
    _ticks: itertools.count[int] = field(default_factory=lambda: itertools.count(1))

    def claim(self, purpose: str) -> Claim:
        """Return a claim on nothing yet; `purpose` says in errors who it is."""
        return Claim(self, purpose)

    def tick(self) -> int:
        """Return a moment, for `unstable`."""
        with self._lock:
            return next(self._ticks)

    def unstable(self, name: str, since: int) -> bool:
        """Tell whether somebody has been changing a volume at any time since a moment."""
        with self._lock:
            return name in self._writers or self._released.get(name, 0) > since

    def refuse(self, name: str, *, writing: bool) -> None:
        """Accept a volume on which nobody works in a way that excludes this.

        Raises:
            OperationConflict: Somebody does.
        """
        with self._lock:
            self._refuse(name, writing=writing)

    def _refuse(self, name: str, *, writing: bool, but: Claim | None = None) -> None:
        other = self._writers.get(name)
        if other is None and writing:
            other = next((claim for claim in self._readers.get(name, ()) if claim is not but), None)
        if other is not None and other is not but:
            raise OperationConflict(
                f"{other.purpose} is at work on {name}: wait for it",
                resource=name,
                retry_delay_seconds=1.0,
                holder=other.purpose,
            )


@dataclass(slots=True, eq=False)
class Claim:
    """Is what one piece of work holds; released as a whole, and more than once without harm."""

    claims: Claims
    purpose: str
    _read: list[str] = field(default_factory=list)
    _written: list[str] = field(default_factory=list)

    def read(self, name: str) -> None:
        """Hold a volume against changes.

        Raises:
            OperationConflict: Somebody changes it.
        """
        claims = self.claims
        with claims._lock:  # noqa: SLF001  # the two are one
            claims._refuse(name, writing=False, but=self)  # noqa: SLF001
            claims._readers.setdefault(name, []).append(self)  # noqa: SLF001
            self._read.append(name)

    def write(self, name: str) -> None:
        """Hold a volume against everybody.

        Raises:
            OperationConflict: Somebody uses it.
        """
        claims = self.claims
        with claims._lock:  # noqa: SLF001  # the two are one
            claims._refuse(name, writing=True, but=self)  # noqa: SLF001
            claims._writers[name] = self  # noqa: SLF001
            self._written.append(name)

    def release(self) -> None:
        """Let go of everything."""
        claims = self.claims
        with claims._lock:  # noqa: SLF001  # the two are one
            now = next(claims._ticks)  # noqa: SLF001
            for name in self._written:
                claims._writers.pop(name, None)  # noqa: SLF001
                claims._released[name] = now  # noqa: SLF001
            for name in self._read:
                readers = claims._readers.get(name, [])  # noqa: SLF001
                readers.remove(self)
                if not readers:
                    claims._readers.pop(name, None)  # noqa: SLF001
            self._read.clear()
            self._written.clear()
            if len(claims._released) > 10_000:  # noqa: SLF001
                for name in list(claims._released)[:5_000]:  # noqa: SLF001
                    del claims._released[name]  # noqa: SLF001
