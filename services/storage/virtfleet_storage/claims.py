"""Who is at work on which volume right now: a copy is not wiped under the copier, a half-made file is not adopted.

Claims live in memory: they protect work that runs in this process. What outlives it (attachments, children) is in
the store; two exclusive operations on one target are kept apart by their records.
"""

from __future__ import annotations

import itertools
import threading
from dataclasses import dataclass, field

from virtfleet_service.errors import OperationConflict

_RELEASED_LIMIT = 10_000


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

    def read(self, claim: Claim, name: str) -> None:
        """Let a claim hold a volume against changes; see `Claim.read`."""
        with self._lock:
            self._refuse(name, writing=False, but=claim)
            self._readers.setdefault(name, []).append(claim)
            claim.read_names.append(name)

    def write(self, claim: Claim, name: str) -> None:
        """Let a claim hold a volume against everybody; see `Claim.write`."""
        with self._lock:
            self._refuse(name, writing=True, but=claim)
            self._writers[name] = claim
            claim.written_names.append(name)

    def take(self, claim: Claim, name: str) -> None:
        """Let a claim have what only one may have; see `Claim.take`."""
        with self._lock:
            self._refuse(name, writing=True, but=claim)
            self._writers[name] = claim
            claim.taken_names.append(name)

    def release(self, claim: Claim) -> None:
        """Let go of all that a claim holds."""
        with self._lock:
            now = next(self._ticks)
            for name in claim.written_names:
                self._writers.pop(name, None)
                self._released.pop(name, None)
                self._released[name] = now
            for name in claim.taken_names:
                self._writers.pop(name, None)
            for name in claim.read_names:
                readers = self._readers[name]
                readers.remove(claim)
                if not readers:
                    del self._readers[name]
            claim.read_names.clear()
            claim.written_names.clear()
            claim.taken_names.clear()
            # Oldest first: whoever looks at a pool has begun long after those.
            for name in list(self._released)[: max(len(self._released) - _RELEASED_LIMIT, 0)]:
                del self._released[name]


@dataclass(slots=True, eq=False)
class Claim:
    """Is what one piece of work holds; released as a whole, and more than once without harm."""

    claims: Claims
    purpose: str
    read_names: list[str] = field(default_factory=list)
    written_names: list[str] = field(default_factory=list)
    taken_names: list[str] = field(default_factory=list)

    def read(self, name: str) -> None:
        """Hold a volume against changes.

        Raises:
            OperationConflict: Somebody changes it.
        """
        self.claims.read(self, name)

    def write(self, name: str) -> None:
        """Hold a volume against everybody.

        Raises:
            OperationConflict: Somebody uses it.
        """
        self.claims.write(self, name)

    def take(self, name: str) -> None:
        """Have a uid or a place that nothing is recorded of yet; unlike of a volume nobody asks about it afterwards.

        Raises:
            OperationConflict: Somebody else is about to have it.
        """
        self.claims.take(self, name)

    def release(self) -> None:
        """Let go of everything."""
        self.claims.release(self)
