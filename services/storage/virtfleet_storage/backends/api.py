"""What the service asks of a kind of pool.

A backend is one `PoolBackend`: it probes, makes and opens places. An open place is an `OpenPool` with the small
required set (usage, scan, inspect, create, publish, delete) and any of the facets below; the capability report of a
pool and every CAPABILITY_MISSING answer come from which facets its class has (`capabilities`).

A volume is known here by its key inside the pool (of a directory: the file's name). Everything is async, may be
cancelled at each await, and says what holds after failure. A backend knows no store, no servicer and no other
backend; it takes messages of the API as its model and gives back the frozen dataclasses of this module.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Container, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol, TypeAlias, runtime_checkable

from virtfleet.storage.v1 import volume_pb2
from virtfleet_service.errors import CapabilityMissing

Format: TypeAlias = "volume_pb2.VolumeFormat.ValueType"
RAW = volume_pb2.VOLUME_FORMAT_RAW
QCOW2 = volume_pb2.VOLUME_FORMAT_QCOW2

Progress = Callable[[int, int], None]
"""Is told (bytes done, bytes in all) now and then, from any thread."""


@dataclass(frozen=True, slots=True)
class Probe:
    """Says whether a kind of pool can run here.

    Attributes:
        reason: Why not, for people; empty: it can.
        version: The version of the tool behind it.
        formats: Those of its formats that it can make and change now.
    """

    reason: str = ""
    version: str = ""
    formats: tuple[Format, ...] = ()


@dataclass(frozen=True, slots=True)
class Usage:
    """Is the room of a place.

    Attributes:
        read_only: Whether nothing in it can be changed at the moment.
    """

    capacity_bytes: int
    allocation_bytes: int
    available_bytes: int
    read_only: bool = False


@dataclass(frozen=True, slots=True)
class Header:
    """Is what an image says of itself; of a raw volume, nothing.

    Attributes:
        backing: The name of the image below, as it is written there; empty: none.
        backing_format: The format that it says the one below has; empty: it does not say.
    """

    backing: str = ""
    backing_format: str = ""
    cluster_size_bytes: int = 0
    version: int = 0


@dataclass(frozen=True, slots=True)
class Facts:
    """Is what can be seen of a volume.

    Attributes:
        identity: Changes when the volume is replaced by another of the same key (of a file: device and inode).
        version: Changes when the content may have changed (of a file: size and time of the last write).
        refusal: The reason (of ErrorInfo) for which the volume must not be given to a guest; empty: none.
        refusal_message: The same for people.
    """

    key: str
    format: Format
    capacity_bytes: int
    allocation_bytes: int
    physical_bytes: int
    identity: str
    version: str
    header: Header = Header()
    refusal: str = ""
    refusal_message: str = ""


@dataclass(frozen=True, slots=True)
class Layer:
    """Is one volume of a chain, in a pool that is open.

    Attributes:
        pool: Where it is.
        key: Its key there.
        format: Its format as the service knows it; never read from the data.
    """

    pool: OpenPool
    key: str
    format: Format


@dataclass(frozen=True, slots=True)
class Plan:
    """Is a volume to be made. All that the spec leaves open is decided.

    Attributes:
        backing_name: What is written into the image as the name of the one below; empty: none.
    """

    format: Format
    capacity_bytes: int
    preallocation: volume_pb2.Preallocation.ValueType = volume_pb2.PREALLOCATION_OFF
    cluster_size_bytes: int = 65536
    compat: volume_pb2.Qcow2Compat.ValueType = volume_pb2.QCOW2_COMPAT_1_1
    backing_name: str = ""
    backing_format: Format = volume_pb2.VOLUME_FORMAT_UNSPECIFIED


@dataclass(frozen=True, slots=True)
class Grant:
    """Is the access that one guest has to a volume.

    Attributes:
        uid: The numeric user.
        owner: Whether the volume becomes that user's own while this holds (its one writer).
        write: Whether it may write.
    """

    uid: int
    owner: bool
    write: bool


@dataclass(frozen=True, slots=True)
class Piece:
    """Is a run of bytes, or of zeros that are not stored (`data` is None)."""

    offset: int
    length: int
    data: bytes | None


class StagedVolume(Protocol):
    """Is a volume in the making that nobody can see; owned by one caller at a time.

    Attributes:
        token: Finds it again with `OpenPool.reopen` after a restart.
        identity: As in `Facts`, and kept when it is published.
    """

    token: str
    identity: str

    async def close(self) -> None:
        """Let go of it; it stays where it is. Repeatable."""

    async def discard(self) -> None:
        """Remove it. Repeatable; succeeds after it was published, and leaves that alone."""


class StagedUpload(StagedVolume, Protocol):
    """Is a staged volume that is being written from its beginning, with a running digest."""

    @property
    def position(self) -> int:
        """How much stands."""

    async def rewind(self, position: int) -> None:
        """Drop what stands behind a position and go on from there; reads all before it again for the digest."""

    async def write(self, pieces: Sequence[Piece]) -> None:
        """Add pieces that follow each other. A caller that adds the next only after this returns has bounded memory.

        Raises:
            PoolFull: There is no room; `position` says how much stands.
        """

    async def flush(self) -> int:
        """Make what is written safe from a power cut; returns how much that is. May run beside `write`."""

    def digest(self) -> str:
        """Return `sha256:…` of all that stands."""

    async def inspect(self, format: Format) -> Facts:
        """Look at what stands as a volume of that format."""


class OpenPool(Protocol):
    """Is a place in use. Holds it open, so that a renamed or replaced directory on the way is noticed, not followed."""

    kind: str
    path: str

    async def usage(self) -> Usage:
        """Return the room.

        Raises:
            BackendUnreachable: The place is gone, or is another one than was opened.
        """

    async def scan(self, known: Mapping[str, Format]) -> list[Facts]:
        """Look at all volumes.

        Args:
            known: The formats of those that are known; those of others are told by their first bytes.

        Raises:
            BackendUnreachable: The place is gone.
        """

    async def inspect(self, key: str, format: Format) -> Facts:
        """Look at one volume, which is of that format whatever it holds.

        Raises:
            ResourceNotFound: There is none.
            PathOutsidePool: It is a link, or nothing that a volume may be.
            BackendUnreachable: The place is gone, or is another one than was opened: its path leads elsewhere.
        """

    async def create(self, plan: Plan) -> StagedVolume:
        """Make an empty volume, unseen. After a failure or a cancel nothing is left.

        Raises:
            PoolFull: There is no room.
            BackendFailed: The tool refused.
        """

    async def reopen(self, token: str) -> StagedVolume | None:
        """Find a staged volume again; None if it is gone (or was published)."""

    async def publish(self, staged: StagedVolume, key: str) -> None:
        """Give a staged volume its place, all at once and safe from a power cut.

        Raises:
            WouldOverwrite: There is something of that key.
        """

    async def delete(self, key: str, identity: str = "", *, unchanged_since_ns: int = 0) -> None:
        """Remove a volume. Succeeds if there is none, or another than is meant.

        Args:
            key: Its key.
            identity: Only the one of this identity; empty: whatever is there.
            unchanged_since_ns: Only one that nobody has touched since, nanoseconds of the clock; 0: that too.
        """

    async def sweep(self, keep: frozenset[str]) -> int:
        """Remove staged volumes whose token is not to be kept; returns how many."""

    def changes(self) -> AbstractAsyncContextManager[AsyncIterator[None]]:
        """Watch the place: yields when something in it was made, removed, renamed or finished being written."""

    async def retire(self) -> None:
        """Remove all that the service itself keeps in the place; volumes stay. Used when the pool is forgotten."""

    async def close(self) -> None:
        """Let go of the place. Repeatable."""


@runtime_checkable
class Copying(Protocol):
    """Can make a volume out of another one."""

    async def copy(self, plan: Plan, chain: Sequence[Layer], progress: Progress) -> StagedVolume:
        """Make a volume with the content that a guest sees in a chain (top first), unseen. A cancel leaves nothing."""


@runtime_checkable
class Resizing(Protocol):
    """Can change the size of a volume."""

    async def resize(
        self, key: str, format: Format, capacity_bytes: int, *, chain: Sequence[Layer], shrink: bool, allocate: bool
    ) -> None:
        """Change the size. After a failure it is the old one or the new one."""


@runtime_checkable
class Wiping(Protocol):
    """Can overwrite a volume."""

    async def wipe(self, key: str, format: Format, plan: Plan, progress: Progress) -> None:
        """Overwrite all that the volume stores with zeros. After a failure or a cancel it may be partly done."""


@runtime_checkable
class Uploading(Protocol):
    """Can replace the content of a volume at once."""

    async def begin_upload(self, *, token: str) -> StagedUpload:
        """Begin, or go on with the one of that token: `position` says where."""

    async def replace(self, staged: StagedUpload, key: str, identity: str) -> None:
        """Put a staged upload in the place of a volume, all at once and safe from a power cut; owner and mode stay.

        Raises:
            BackingMissing: The volume is gone, or is another than the identity says.
        """


@runtime_checkable
class Downloading(Protocol):
    """Can read a volume's bytes."""

    def read(self, key: str, offset: int, length: int) -> AbstractAsyncContextManager[Download]:
        """Open for reading; length 0: to the end.

        Raises:
            RangeBeyondEnd: The offset is behind the end.
        """


@runtime_checkable
class Granting(Protocol):
    """Can let guests reach a volume by its path."""

    async def present(self, key: str) -> tuple[int, int, int]:
        """Return owner, group and mode of a volume that no guest has access to."""

    async def grant(self, key: str, grants: Sequence[Grant], restore: tuple[int, int, int]) -> None:
        """Give exactly these guests access. Repeatable.

        Args:
            key: The volume.
            grants: All that hold it now.
            restore: Owner, group and mode where no grant says another; what is left when there is none.
        """


@dataclass(frozen=True, slots=True)
class Download:
    """Is an open reading; the content stays that of the moment of opening even when the volume is replaced."""

    offset: int
    length: int
    physical_bytes: int
    pieces: AsyncIterator[Piece]


class PoolBackend(Protocol):
    """Is a kind of pool."""

    kind: str
    display_name: str
    formats: tuple[Format, ...]
    pool_class: type[OpenPool]

    async def probe(self) -> Probe:
        """Say whether it can run here, as things are now: asked again whenever it matters, and quick. Never raises."""

    async def build(self, path: str) -> bool:
        """Make the place if it is missing; returns whether it was. Nothing that exists is touched.

        Raises:
            BackingMissing: What it should be made in is missing.
            PathOutsidePool: A link is on the way.
        """

    async def unbuild(self, path: str) -> None:
        """Remove an empty place. Succeeds if it is gone; leaves one that is not empty."""

    async def retire(self, path: str, pool_uid: str) -> None:
        """Do what `OpenPool.retire` does in the place of a pool that is closed, or that a crash kept from being opened.

        Succeeds if the place cannot be opened. What is another pool's stays; what a crash has left without a word of
        whose it is goes.
        """

    async def open(self, path: str, pool_uid: str, *, claim: bool, others: Container[str] = frozenset()) -> OpenPool:
        """Open a place for a pool.

        Args:
            path: Where.
            pool_uid: Whose; remembered in the place, so that an empty mount point is not taken for an emptied pool.
            claim: Take the place for this pool whatever it remembers, unless that is one of `others`.
            others: The uids of pools whose place must not be taken.

        Raises:
            BackingMissing: It is missing, or does not know this pool and is not to be claimed.
            IdentityInUse: It is the place of another pool, under another path: metadata `holder` is that one's uid.
            PathOutsidePool: A link is on the way.
        """

    def close(self) -> None:
        """Let go of what the kind itself holds, when all its pools are closed."""


FACETS: Mapping[str, tuple[type, str]] = MappingProxyType(
    {
        "volume.copy": (Copying, "makes a volume out of another"),
        "volume.resize": (Resizing, "changes the size of a volume"),
        "volume.wipe.zero": (Wiping, "overwrites a volume with zeros"),
        "volume.upload": (Uploading, "takes the content of a volume from a client"),
        "volume.download": (Downloading, "sends the content of a volume to a client"),
        "volume.attach.file": (Granting, "gives volumes to guests as files"),
    }
)
"""Capability id → the facet that it stands for and its meaning."""


def capabilities(pool_class: type[OpenPool], formats: Sequence[Format]) -> dict[str, str]:
    """Return the capabilities of a kind of pool, id → meaning, read off its class."""
    found = {id: meaning for id, (facet, meaning) in FACETS.items() if issubclass(pool_class, facet)}
    for format in formats:
        word = format_word(format)
        found[f"volume.format.{word}"] = f"keeps volumes of the format {word}"
    return found


def copying(pool: OpenPool) -> Copying:
    """Return the pool as one that has the facet; CapabilityMissing: it has not."""
    if isinstance(pool, Copying):
        return pool
    raise _missing(pool, Copying)


def resizing(pool: OpenPool) -> Resizing:
    """Return the pool as one that has the facet; CapabilityMissing: it has not."""
    if isinstance(pool, Resizing):
        return pool
    raise _missing(pool, Resizing)


def wiping(pool: OpenPool) -> Wiping:
    """Return the pool as one that has the facet; CapabilityMissing: it has not."""
    if isinstance(pool, Wiping):
        return pool
    raise _missing(pool, Wiping)


def uploading(pool: OpenPool) -> Uploading:
    """Return the pool as one that has the facet; CapabilityMissing: it has not."""
    if isinstance(pool, Uploading):
        return pool
    raise _missing(pool, Uploading)


def downloading(pool: OpenPool) -> Downloading:
    """Return the pool as one that has the facet; CapabilityMissing: it has not."""
    if isinstance(pool, Downloading):
        return pool
    raise _missing(pool, Downloading)


def granting(pool: OpenPool) -> Granting:
    """Return the pool as one that has the facet; CapabilityMissing: it has not."""
    if isinstance(pool, Granting):
        return pool
    raise _missing(pool, Granting)


def _missing(pool: OpenPool, wanted: type) -> CapabilityMissing:
    capability = next((id for id, (kind, _) in FACETS.items() if kind is wanted), wanted.__name__)
    return CapabilityMissing(
        f"pools of kind {pool.kind} cannot do that: {capability}", capability=capability, backend=pool.kind
    )


def format_word(format: Format) -> str:
    """Return a format as QEMU and capability ids write it: `raw`, `qcow2`."""
    return volume_pb2.VolumeFormat.Name(format).removeprefix("VOLUME_FORMAT_").lower()
