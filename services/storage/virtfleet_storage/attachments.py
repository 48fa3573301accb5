"""Gives volumes to domains of the same node and takes them back.

The record comes first, then the access to the files: a crash in between leaves a record that compute finds and
either uses (the call may be repeated) or releases. Access to a file is always worked out of all records that concern
it, never out of one call.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress

from virtfleet.node.v1 import attachment_pb2
from virtfleet.storage.v1 import volume_pb2, watch_pb2
from virtfleet_service import failpoints
from virtfleet_service.call import Call
from virtfleet_service.errors import OperationConflict, ResourceInUse
from virtfleet_service.locks import Locks
from virtfleet_service.store import Store, StoreUnwritable
from virtfleet_service.transaction import Transaction
from virtfleet_storage import catalog, chains, lifecycle
from virtfleet_storage.backends.api import Facts, Grant, format_word, granting
from virtfleet_storage.catalog import Attachment, Reader
from virtfleet_storage.chains import Link
from virtfleet_storage.claims import Claims
from virtfleet_storage.places import Places
from virtfleet_storage.volumes import USE

_log = logging.getLogger(__name__)

SERVICE = "virtfleet.node.v1.AttachmentService"

FORGET_OWNERS_SECONDS = 0.1
"""So much later than the access of guests the owners of files are forgotten: whoever waits for an end comes first."""


class Attachments:
    """Keeps who holds which volume, and lets holders reach the files."""

    def __init__(self, store: Store, places: Places, claims: Claims) -> None:
        self._store = store
        self._places = places
        self._claims = claims
        self._granting = Locks()
        self.turns: dict[str, int] = {}
        """Who has the turn on a volume, by its uid: while somebody attaches or releases it."""
        self._numbers = itertools.count(1)
        self._ownerless: dict[str, str] = {}
        """The volumes of whose files the owner may be forgotten, uid → name."""
        self._forgetting: set[asyncio.Task[None]] = set()

    async def attach(
        self, request: attachment_pb2.AttachVolumeRequest, call: Call
    ) -> attachment_pb2.AttachVolumeResponse:
        """Make a volume ready for a device of a domain."""
        volume = catalog.need_volume(self._store, request.name)
        call.authorize(volume.name, USE)
        lifecycle.check_volume(volume)
        place = self._places.need(catalog.pool_of(volume.name))
        facts = await chains.look(place, volume)
        chains.refuse(facts, volume.name)
        with chains.about(volume.name):
            links = await chains.below(self._store, self._places, place, facts)
        for link in links:
            call.authorize(link.volume.name, USE)
        attachment = Attachment(
            attachment_id=f"{request.domain_uid}:{request.device_id}",
            volume=volume.name,
            domain_uid=request.domain_uid,
            domain=request.domain,
            device_id=request.device_id,
            mode=request.mode,
            run_as_uid=request.run_as_uid,
            time_ns=time.time_ns(),
        )
        with self.turn(volume.uid) as turn:
            first: tuple[int, int, int] | None = None
            if attachment.exclusive and catalog.get_owner(self._store, volume.uid) is None:
                # Recorded with the attachment: one commit instead of two.
                first = await granting(place.open).present(catalog.key_of(volume))

            def record(tx: Transaction) -> bool:
                recorded = self._record(tx, volume, attachment, links)
                # Whoever began to attach or release since the look may have changed what was seen.
                alone = self.has_turn(volume.uid, turn) and catalog.get_owner(tx, volume.uid) is None
                if recorded and first is not None and alone:
                    catalog.put_owner(tx, volume.uid, first)
                return recorded

            fresh = await self._store.write(record)
        failpoints.reach("storage.attach.recorded")
        try:
            await self._grant([volume.name, *(link.volume.name for link in links)])
        except BaseException:
            if fresh:
                await asyncio.shield(asyncio.ensure_future(self._take_back(volume, attachment, links)))
            raise
        return _response(attachment, volume, facts, links)

    @contextmanager
    def turn(self, uid: str) -> Iterator[int]:
        """Have the turn on a volume, until somebody else begins; the number of a turn is never that of another."""
        turn = self.turns[uid] = next(self._numbers)
        try:
            yield turn
        finally:
            if self.has_turn(uid, turn):
                del self.turns[uid]

    def has_turn(self, uid: str, turn: int) -> bool:
        """Tell whether nobody else has begun since."""
        return self.turns.get(uid) == turn

    async def _take_back(self, volume: volume_pb2.Volume, attachment: Attachment, links: list[Link]) -> None:
        await self._store.write(lambda tx: self._forget(tx, volume.uid, attachment.attachment_id))
        await self._grant([volume.name, *(link.volume.name for link in links)])

    def _record(self, tx: Transaction, volume: volume_pb2.Volume, attachment: Attachment, links: list[Link]) -> bool:
        current = catalog.need_volume(tx, volume.name)
        lifecycle.check_volume(current)
        held = catalog.attachments(tx, current.uid)
        same = next((one for one in held if one.attachment_id == attachment.attachment_id), None)
        if same is not None and (same.mode, same.run_as_uid) == (attachment.mode, attachment.run_as_uid):
            return False
        for other in held:
            if other is same or other.mode != attachment.mode or attachment.exclusive:
                raise _in_use(current, other)
        if attachment.writes:
            catalog.refuse_children(tx, current)
        self._claims.refuse(catalog.pool_of(current.name), writing=False)
        self._claims.refuse(current.name, writing=attachment.writes)
        for link in links:
            self._claims.refuse(catalog.pool_of(link.volume.name), writing=False)
            self._claims.refuse(link.volume.name, writing=False)
        catalog.put_attachment(tx, current.uid, attachment)
        if attachment.writes:
            current.status.digest = ""
        catalog.put_volume(tx, current, cause=f"{SERVICE}.AttachVolume")
        catalog.tell(tx, current, watch_pb2.EVENT_TYPE_VOLUME_ATTACHED, attachment=attachment.shown())
        return True

    async def release(self, request: attachment_pb2.ReleaseVolumeRequest) -> attachment_pb2.ReleaseVolumeResponse:
        """End an attachment. Succeeds if there is none."""
        volume = catalog.get_volume(self._store, request.name)
        if volume is not None:
            node = volume.name.split("/pools/", 1)[0]
            below = [f"{node}/{link.volume}" for link in volume.status.backing_chain]
            claim = self._claims.claim(f"ReleaseVolume of {volume.name}")

            def forget(tx: Transaction) -> None:
                # From the moment at which the record is gone its pools could be closed, with the files still a guest's.
                for name in (volume.name, *below):
                    with suppress(OperationConflict):
                        claim.read(catalog.pool_of(name))
                self._forget(tx, volume.uid, request.attachment_id)

            try:
                with self.turn(volume.uid):
                    await self._store.write(forget)
                failpoints.reach("storage.release.recorded")
                await self._grant([volume.name, *below])
            finally:
                claim.release()
        return attachment_pb2.ReleaseVolumeResponse()

    @staticmethod
    def _forget(tx: Transaction, uid: str, attachment_id: str) -> None:
        row = tx.get_by_uid(catalog.VOLUME, uid)
        held = next((one for one in catalog.attachments(tx, uid) if one.attachment_id == attachment_id), None)
        if row is None or held is None:
            return
        current = catalog.need_volume(tx, row.name)
        catalog.delete_attachment(tx, uid, attachment_id)
        catalog.put_volume(tx, current, cause=f"{SERVICE}.ReleaseVolume")
        catalog.tell(tx, current, watch_pb2.EVENT_TYPE_VOLUME_RELEASED, attachment=held.shown())

    def list(self) -> attachment_pb2.ListAttachmentsResponse:
        """Return all attachments of the node."""
        answer = attachment_pb2.ListAttachmentsResponse()
        for one in catalog.attachments(self._store):
            answer.attachments.add(
                attachment_id=one.attachment_id,
                volume=one.volume,
                domain_uid=one.domain_uid,
                domain=one.domain,
                device_id=one.device_id,
                mode=attachment_pb2.AttachmentMode.ValueType(one.mode),
            )
        return answer

    # Access to files.

    async def _grant(self, volumes: Iterable[str]) -> None:
        for name in volumes:
            # One at a time: two calls about a common backing file would each give it the access that they saw. And no
            # more than that: a file system that hangs must hold up nobody else.
            async with self._granting.of(name):
                await self._grant_one(name)

    async def _grant_one(self, name: str) -> None:
        volume = catalog.get_volume(self._store, name)
        place = self._places.get(catalog.pool_of(name))
        if volume is None or place is None or volume.status.state == volume_pb2.VOLUME_STATE_MISSING:
            return
        grants = grants_of(self._store, volume)
        owner = catalog.get_owner(self._store, volume.uid)
        if not grants and owner is None:
            return
        uid = volume.uid
        if grants:
            # What was about to be forgotten is needed again, until the file is given back the next time.
            self._ownerless.pop(uid, None)
        if owner is None:
            # Recorded before anything is changed, so that a crash does not take a guest for the owner to go back to.
            owner = await granting(place.open).present(catalog.key_of(volume))
            first = owner
            await self._store.write(lambda tx: catalog.put_owner(tx, uid, first))
        await granting(place.open).grant(catalog.key_of(volume), grants, owner)
        if not grants:
            # Nobody waits for it: the file is as it was, and after a crash `settle` sees to it again.
            if not self._ownerless:
                task = asyncio.create_task(self._forget_owners(), name="forget owners")
                self._forgetting.add(task)
                task.add_done_callback(self._forgetting.discard)
            self._ownerless[uid] = name

    async def _forget_owners(self) -> None:
        """Forget the owners of files that no guest has any more, all of a while at once."""
        await asyncio.sleep(FORGET_OWNERS_SECONDS)
        ownerless, self._ownerless = self._ownerless, {}

        def work(tx: Transaction) -> None:
            for uid, name in ownerless.items():
                current = catalog.get_volume(tx, name)
                # Who has attached it since, or what lies on top of it, needs the record.
                if current is None or current.uid != uid or not grants_of(tx, current):
                    catalog.put_owner(tx, uid, None)

        try:
            await self._store.write(work)
        except StoreUnwritable as error:
            _log.warning("the owners of %d volumes stay recorded for now: %s", len(ownerless), error)

    async def settle(self, pool: str = "") -> None:
        """Bring the access to files in line with the records: after a crash, or of a pool that could not be reached."""
        names = {one.volume for one in catalog.attachments(self._store)}
        for uid, _ in self._store.list_records(catalog.OWNERS):
            row = self._store.get_by_uid(catalog.VOLUME, uid)
            if row is not None:
                names.add(row.name)
        await self._grant(sorted(name for name in names if pool in ("", catalog.pool_of(name))))


def grants_of(reader: Reader, volume: volume_pb2.Volume) -> list[Grant]:
    """Work out which guests may reach the file of a volume: its holders, and those of what lies on top of it."""
    grants = {
        Grant(one.run_as_uid, owner=one.exclusive, write=one.writes)
        for one in catalog.attachments(reader, volume.uid)
        if one.run_as_uid
    }
    above = catalog.children(reader, volume.uid)
    seen: set[str] = set()
    while above:
        child = catalog.get_volume(reader, above.pop())
        if child is None or child.uid in seen:
            continue
        seen.add(child.uid)
        above += catalog.children(reader, child.uid)
        for one in catalog.attachments(reader, child.uid):
            if one.run_as_uid:
                grants.add(Grant(one.run_as_uid, owner=False, write=False))
    return sorted(grants, key=lambda grant: (grant.uid, grant.owner, grant.write))


def _in_use(volume: volume_pb2.Volume, other: Attachment) -> ResourceInUse:
    holder = other.domain or other.domain_uid
    word = attachment_pb2.AttachmentMode.Name(attachment_pb2.AttachmentMode.ValueType(other.mode))
    mode = word.removeprefix("ATTACHMENT_MODE_")
    return ResourceInUse(
        f"{volume.name} is attached to {holder} as {other.device_id} ({mode})",
        resource=volume.name,
        holder=holder,
        attachment_id=other.attachment_id,
        mode=mode,
    )


def _response(
    attachment: Attachment, volume: volume_pb2.Volume, facts: Facts, links: list[Link]
) -> attachment_pb2.AttachVolumeResponse:
    answer = attachment_pb2.AttachVolumeResponse(
        attachment_id=attachment.attachment_id, capacity_bytes=facts.capacity_bytes
    )
    answer.file.path = volume.status.path
    answer.file.format = format_word(facts.format)
    for link in links:
        answer.file.backing_chain.add(path=link.volume.status.path, format=format_word(link.facts.format))
    return answer
