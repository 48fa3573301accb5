"""Who is at work on which volume right now: a copy is not wiped under the copier, a half-made file is not adopted.

Claims live in memory: they protect work that runs in this process. What outlives it (attachments, children) is in
the store; two exclusive operations on one target are kept apart by their records.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from virtfleet_service.errors import OperationConflict


@dataclass(slots=True)
class Claims:
    """Is the table of claims. Safe in all threads: claims are taken in the store's writer, and released anywhere."""

    _lock: threading.Lock = field(default_factory=threading.Lock)
    _readers: dict[str, list[Claim]] = field(default_factory=dict)
    _writers: dict[str, Claim] = field(default_factory=dict)
    _looks: list[Look] = field(default_factory=list)

    def claim(self, purpose: str) -> Claim:
        """Return a claim on nothing yet; `purpose` says in errors who it is."""
        return Claim(self, purpose)

    @contextmanager
    def look(self) -> Iterator[Look]:
        """Take note of who changes a volume for as long as somebody looks at a pool."""
        look = Look(self)
        with self._lock:
            self._looks.append(look)
        try:
            yield look
        finally:
            with self._lock:
                self._looks.remove(look)

    def unstable(self, look: Look, name: str) -> bool:
        """Tell whether somebody has been changing a volume at any time of a look; see `Look.unstable`."""
        with self._lock:
            return name in self._writers or name in look.changed_names

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
            for name in claim.written_names:
                self._writers.pop(name, None)
            for look in self._looks:
                look.changed_names.update(claim.written_names)
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


@dataclass(slots=True, eq=False)
class Look:
    """Is one look at a pool: what it sees of a volume that somebody changes meanwhile says nothing."""

    claims: Claims
    changed_names: set[str] = field(default_factory=set)

    def unstable(self, name: str) -> bool:
        """Tell whether somebody is changing a volume, or has since the look began."""
        return self.claims.unstable(self, name)


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
