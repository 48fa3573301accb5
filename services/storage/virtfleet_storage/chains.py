"""What lies below a volume: followed by what the service knows, never by letting a tool follow what an image says.

A name inside an image may be a bare file name (the same pool) or the path of a file directly in a pool that runs
here. Anything else (a folder, a link, `..`, `json:`, `nbd:`) leaves the pools and is refused. Each file below must
be a volume; its format is the one recorded for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from virtfleet.storage.v1 import volume_pb2
from virtfleet_service import errors, names
from virtfleet_storage import catalog
from virtfleet_storage.backends.api import Facts, Format, Layer, format_word
from virtfleet_storage.catalog import Reader
from virtfleet_storage.places import Place, Places

DEPTH_LIMIT = 64
"""Longer chains are refused: each step costs an open file and a look at every start of a guest."""


@dataclass(frozen=True, slots=True)
class Link:
    """Is one volume of a chain, with what its file shows at this moment."""

    volume: volume_pb2.Volume
    place: Place
    facts: Facts

    @property
    def layer(self) -> Layer:
        """Return it as a backend takes it."""
        return Layer(self.place.open, self.facts.key, self.facts.format)

    def shown(self) -> volume_pb2.BackingLink:
        """Return it as the status of a volume shows it."""
        return volume_pb2.BackingLink(
            volume=names.relative(self.volume.name, names.node_of(self.volume.name)),
            path=self.volume.status.path,
            format=self.facts.format,
        )


@contextmanager
def about(name: str) -> Iterator[None]:
    """Name the volume in refusals that name none: its file alone says nothing to somebody who starts a domain."""
    try:
        yield
    except errors.VirtfleetError as error:
        error.resource = error.resource or name
        raise


def target_of(place: Place, name: str) -> tuple[str, str]:
    """Return directory and file that a name inside an image of a pool means.

    Raises:
        PathOutsidePool: It means nothing that can be in a pool.
    """
    directory, slash, key = name.rpartition("/")
    if not slash:
        directory = place.open.path
    # What a tool takes for a protocol ends with a colon before the first slash.
    plain = directory.startswith("/") if slash else ":" not in name
    if not plain or not key or key.startswith(".") or not key.isprintable():
        raise _outside(name)
    return directory, key


async def below(
    reader: Reader, places: Places, place: Place, facts: Facts, seen: Mapping[str, Facts] | None = None
) -> list[Link]:
    """Follow the chain below a volume, nearest first.

    Args:
        reader: The store.
        places: The open pools.
        place: The pool of the volume.
        facts: What its file shows.
        seen: What a look at that pool has just found, so that it need not be looked at again.

    Raises:
        PathOutsidePool: An image points out of the pools.
        BackingMissing: Something below is missing, or in a pool that does not run.
        ImageCorrupt: Something below is not what its format says, or the chain has no end.
        CapabilityMissing: Something below needs what this service cannot do.
    """
    found: list[Link] = []
    here = place
    while facts.header.backing:
        directory, key = target_of(here, facts.header.backing)
        following = places.by_path(directory)
        if following is None:
            raise _not_a_pool(reader, directory, facts.header.backing)
        path = f"{directory}/{key}"
        volume = catalog.volume_at(reader, path)
        if volume is None:
            raise errors.BackingMissing(f"{path} is no volume of {following.pool}", path=path, resource=following.pool)
        known = seen.get(key) if seen is not None and following is place else None
        link = Link(volume, following, known or await look(following, volume))
        _check(link, facts)
        if len(found) >= DEPTH_LIMIT or any(link.volume.uid == other.volume.uid for other in found):
            raise errors.ImageCorrupt(f"the chain below {facts.key} is a ring or longer than {DEPTH_LIMIT}", path=path)
        found.append(link)
        here, facts = following, link.facts
    return found


async def look(place: Place, volume: volume_pb2.Volume) -> Facts:
    """Look at the file of a volume.

    Raises:
        BackingMissing: It is gone; the volume is known still.
        PathOutsidePool: It is a link by now, or nothing that a volume may be.
        BackendUnreachable: The place of its pool is gone, or is another one.
    """
    try:
        with about(volume.name):
            return await place.open.inspect(catalog.key_of(volume), volume.spec.format)
    except errors.ResourceNotFound as error:
        raise errors.BackingMissing(
            f"the file of {volume.name} is missing", resource=volume.name, path=volume.status.path
        ) from error


def _check(link: Link, above: Facts) -> None:
    refuse(link.facts, link.volume.name)
    claimed = above.header.backing_format
    known = format_word(link.facts.format)
    if claimed and claimed != known:
        raise errors.ImageCorrupt(
            f"{above.key} says that {link.volume.name} below it is {claimed}, but it is {known}",
            resource=link.volume.name,
            format=known,
            claimed_format=claimed,
        )


def refuse(facts: Facts, name: str) -> None:
    """Accept what a file shows, or raise why a guest must not have it."""
    if facts.refusal:
        kind = errors.BY_REASON.get(facts.refusal, errors.ImageCorrupt)
        raise kind(f"{name} is not given out: {facts.refusal_message}", resource=name, path=facts.key)


def _not_a_pool(reader: Reader, directory: str, name: str) -> errors.VirtfleetError:
    # The pool may be known and stopped: that is another matter than a path to anywhere.
    for pool in catalog.pools(reader.list(catalog.POOL)):
        if pool.status.target_path == directory:
            return errors.BackingMissing(
                f"{pool.name}, which holds {name}, does not run", resource=pool.name, path=name
            )
    return _outside(name)


def _outside(name: str) -> errors.PathOutsidePool:
    return errors.PathOutsidePool(
        f"the image says that {name!r} is below it, which is in no pool of this node", path=name
    )


def backing_name(place: Place, below_place: Place, key: str) -> str:
    """Return how an image names the one below: bare in the same pool, so that the pool can move.

    A name with a colon cannot stand bare: it would be taken for a protocol.
    """
    return key if below_place is place and ":" not in key else f"{below_place.open.path}/{key}"


def layers(links: list[Link]) -> list[Layer]:
    """Return a chain as a backend takes it."""
    return [link.layer for link in links]


def top_layer(place: Place, key: str, format: Format) -> Layer:
    """Return a volume as a backend takes it."""
    return Layer(place.open, key, format)
