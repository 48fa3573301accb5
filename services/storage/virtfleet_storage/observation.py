"""What the files of a pool show, written into the status of its volumes; files that nobody knows become volumes."""

from __future__ import annotations

import re
import uuid
from dataclasses import dataclass

from virtfleet.storage.v1 import volume_pb2, watch_pb2
from virtfleet_service import names, resources
from virtfleet_service.errors import VirtfleetError
from virtfleet_service.transaction import Transaction
from virtfleet_storage import catalog
from virtfleet_storage.backends.api import Facts
from virtfleet_storage.chains import Link

REFUSED = "Refused"

_READY = volume_pb2.VOLUME_STATE_READY
_MISSING = volume_pb2.VOLUME_STATE_MISSING
_ID_LIMIT = 63
_SUFFIX_HEX = 6

# Of a volume that a guest writes, a growth is told when it is worth telling.
_WORTH_BYTES = 64 << 20
_WORTH_SHARE = 20


@dataclass(frozen=True, slots=True)
class Sighting:
    """Is what was seen of one volume.

    Attributes:
        facts: What its file shows.
        chain: What is below it.
        refusal: Why it is not given to a guest; None: it may be.
        settled: Whether the file was the same at the look before.
    """

    facts: Facts
    chain: tuple[Link, ...] = ()
    refusal: VirtfleetError | None = None
    settled: bool = True

    @property
    def standing(self) -> object:
        """What does not follow from the file alone: what is below it, and whether it is refused."""
        refusal = None if self.refusal is None else (self.refusal.reason, self.refusal.message)
        return refusal, tuple((link.volume.uid, link.volume.status.path, link.facts.format) for link in self.chain)


def fill(volume: volume_pb2.Volume, path: str, sighting: Sighting) -> None:
    """Write what was seen into the status of a volume, in place."""
    facts, status = sighting.facts, volume.status
    status.type = volume_pb2.VOLUME_TYPE_FILE
    status.path = status.key = path
    status.observed_generation = volume.generation
    status.capacity_bytes = facts.capacity_bytes
    status.allocation_bytes = facts.allocation_bytes
    status.physical_bytes = facts.physical_bytes
    del status.backing_chain[:]
    status.backing_chain.extend(link.shown() for link in sighting.chain)
    if sighting.refusal is None:
        status.state, status.state_reason = _READY, ""
        resources.clear_condition(status.conditions, REFUSED)
    else:
        status.state, status.state_reason = volume_pb2.VOLUME_STATE_REFUSED, sighting.refusal.reason
        resources.set_condition(
            status.conditions, REFUSED, reason=sighting.refusal.reason, message=sighting.refusal.message
        )


def see(tx: Transaction, volume: volume_pb2.Volume, path: str, sighting: Sighting) -> bool:
    """Store what was seen of a known volume; returns whether anything is worth telling."""
    before = volume_pb2.Volume()
    before.CopyFrom(volume)
    fill(volume, path, sighting)
    version = (tx.get_record(catalog.DIGESTS, volume.uid) or b"").decode()
    if volume.status.digest and version != sighting.facts.version:
        volume.status.digest = ""
    held = bool(catalog.attachments(tx, volume.uid))
    if held and not sighting.settled and not _worth_telling(before.status, volume.status):
        return False
    changed = catalog.put_volume(tx, volume, cause=catalog.OBSERVED)
    if changed and not held and before.status.physical_bytes != volume.status.physical_bytes:
        catalog.tell(tx, volume, watch_pb2.EVENT_TYPE_VOLUME_CHANGED, reason="CHANGED_OUTSIDE")
    return changed


def _worth_telling(before: volume_pb2.VolumeStatus, after: volume_pb2.VolumeStatus) -> bool:
    grown = abs(after.allocation_bytes - before.allocation_bytes)
    if grown >= max(_WORTH_BYTES, before.allocation_bytes // _WORTH_SHARE):
        return True
    twin = volume_pb2.VolumeStatus()
    twin.CopyFrom(after)
    twin.allocation_bytes, twin.physical_bytes = before.allocation_bytes, before.physical_bytes
    return twin != before


def adopt(tx: Transaction, pool: str, path: str, sighting: Sighting) -> volume_pb2.Volume:
    """Make a volume of a file that nobody knows."""
    facts = sighting.facts
    volume = volume_pb2.Volume(display_name=facts.key)
    volume.spec.format = facts.format
    volume.spec.capacity_bytes = facts.capacity_bytes
    if sighting.chain:
        volume.spec.backing.volume = sighting.chain[0].shown().volume
        volume.spec.backing.format = sighting.chain[0].facts.format
    uid = str(uuid.uuid4())
    resources.create_head(volume, _free_name(tx, pool, facts.key, uid), uid=uid)
    fill(volume, path, sighting)
    catalog.put_volume(tx, volume, cause=catalog.OBSERVED)
    catalog.tell(tx, volume, watch_pb2.EVENT_TYPE_VOLUME_ADDED, reason="ADOPTED", message=f"found {path}")
    return volume


def _free_name(tx: Transaction, pool: str, key: str, uid: str) -> str:
    slug = re.sub(r"[^a-z0-9]+", "-", key.lower()).strip("-")
    name = names.child(pool, "volumes", slug)
    if names.is_id(slug) and tx.get(name) is None:
        return name
    slug = slug if slug[:1].isalpha() else f"v-{slug}".rstrip("-")
    short = slug[: _ID_LIMIT - _SUFFIX_HEX - 1].rstrip("-")
    return names.child(pool, "volumes", f"{short}-{uid.replace('-', '')[:_SUFFIX_HEX]}")


def lose(tx: Transaction, volume: volume_pb2.Volume) -> None:
    """Record that the file of a volume is gone: the volume goes too, unless somebody depends on it."""
    if catalog.attachments(tx, volume.uid) or catalog.children(tx, volume.uid):
        if volume.status.state != _MISSING:
            volume.status.state, volume.status.state_reason = _MISSING, "BACKING_MISSING"
            volume.status.digest = ""
            resources.set_condition(
                volume.status.conditions, REFUSED, reason="BACKING_MISSING", message=f"{volume.status.path} is gone"
            )
            catalog.put_volume(tx, volume, cause=catalog.OBSERVED)
        return
    catalog.delete_volume(tx, volume, cause=catalog.OBSERVED)
    catalog.tell(
        tx, volume, watch_pb2.EVENT_TYPE_VOLUME_DELETED, reason="VANISHED", message=f"{volume.status.path} is gone"
    )
