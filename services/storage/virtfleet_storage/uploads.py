"""Replaces the content of volumes by what clients send.

What comes goes to a staged file, with a running digest. When all of it is there, safe and right, the file takes the
place of the volume's own by a rename. Receiving, checking, storing and syncing overlap: while a thread writes one
batch the next comes in, and no more than that is held in memory.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import secrets
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import google_crc32c

from virtfleet.storage.v1 import volume_pb2, watch_pb2
from virtfleet_service import failpoints, names, requests, resources
from virtfleet_service.call import Call
from virtfleet_service.errors import (
    ChecksumMismatch,
    FieldConflict,
    FieldOutOfRange,
    FieldRequired,
    RangeBeyondEnd,
    VirtfleetError,
)
from virtfleet_service.store import Store
from virtfleet_service.transaction import Transaction
from virtfleet_storage import catalog, chains, observation
from virtfleet_storage.backends.api import Piece, StagedUpload, uploading
from virtfleet_storage.catalog import UploadSession
from virtfleet_storage.claims import Claims
from virtfleet_storage.observation import Sighting
from virtfleet_storage.places import Place, Places
from virtfleet_storage.volumes import USE

METHOD = "virtfleet.storage.v1.VolumeService.UploadVolume"
BATCH_BYTES = 2 << 20
"""How much is handed to a thread at a time; twice as much is in memory at most."""

SYNC_BYTES = 64 << 20
"""How much of a resumable upload a power cut may take; the disk works beside the network."""

PIECE_LIMIT_BYTES = 1 << 20
HOLE_BYTES = 256 << 20


@dataclass(slots=True)
class _Stream:
    """Is one stream of one upload."""

    volume: volume_pb2.Volume
    place: Place
    start: volume_pb2.UploadStart
    staged: StagedUpload
    session: UploadSession | None
    received: int
    begun: bool = False
    end: int = 0
    batch: list[Piece] = field(default_factory=list)
    batch_bytes: int = 0
    writing: asyncio.Task[None] | None = None
    syncing: asyncio.Task[None] | None = None
    synced: int = 0


class Uploads:
    """Takes uploads."""

    def __init__(self, store: Store, places: Places, claims: Claims, *, node: str, retention_seconds: float) -> None:
        self._store = store
        self._places = places
        self._claims = claims
        self._node = node
        self._retention_seconds = retention_seconds

    async def upload(
        self, messages: AsyncIterator[volume_pb2.UploadVolumeRequest], call: Call
    ) -> volume_pb2.UploadVolumeResponse:
        """Take one stream of an upload; the content is replaced when it is the last one."""
        first = await anext(messages)
        if first.WhichOneof("content") != "start":
            raise FieldRequired("the first message carries `start`", field="start")
        answered = await self._answered(first, call)
        if answered is not None:
            return answered
        volume = catalog.need_volume(self._store, first.name)
        self._check(self._store, first, volume)
        place = self._places.need(catalog.pool_of(first.name))
        backend = uploading(place.open)
        if first.validate_only:
            return volume_pb2.UploadVolumeResponse(volume=volume)
        claim = self._claims.claim(f"UploadVolume of {first.name}")
        # Of the upload, not of the volume: until the content is replaced the volume can be used as it is.
        claim.write(f"{first.name}#upload")
        try:
            claim.read(catalog.pool_of(first.name))
            session = await self._session(volume, first.start)
            token = session.token if session is not None else f"upload-{secrets.token_hex(16)}"
            async with AsyncExitStack() as leave:
                staged = await backend.begin_upload(token=token)
                stream = _Stream(volume, place, first.start, staged, session, session.received_bytes if session else 0)
                leave.push_async_callback(self._leave, stream)
                complete = await self._receive(stream, first, messages)
                if not complete:
                    return await self._pause(stream)
                completing = asyncio.ensure_future(self._complete(stream, first, call))
                try:
                    response = await asyncio.shield(completing)
                except asyncio.CancelledError:
                    # The client went when all was there: the file is in use until the volume has it, or has not.
                    await asyncio.wait([completing])
                    if completing.exception() is None:
                        leave.pop_all()
                        await staged.close()
                    raise
                leave.pop_all()
                await staged.close()
                return response
        finally:
            claim.release()

    async def _answered(
        self, first: volume_pb2.UploadVolumeRequest, call: Call
    ) -> volume_pb2.UploadVolumeResponse | None:
        key = requests.key_of(call, first)
        if key is None:
            return None
        answer = await self._store.write(lambda tx: requests.recall(tx.connection, key))
        if answer is None or answer.response is None:
            return None
        return volume_pb2.UploadVolumeResponse.FromString(answer.response.value)

    @staticmethod
    def _check(reader: catalog.Reader, first: volume_pb2.UploadVolumeRequest, volume: volume_pb2.Volume) -> None:
        resources.check_preconditions(volume, first.etag, first.expected_uid)
        catalog.refuse_held(reader, volume)
        catalog.refuse_children(reader, volume)

    # Sessions.

    async def _session(self, volume: volume_pb2.Volume, start: volume_pb2.UploadStart) -> UploadSession | None:
        if not start.upload_id:
            return None
        found = catalog.get_upload(self._store, volume.uid, start.upload_id)
        if found is not None:
            if (found.length_bytes, found.digest) != (start.length_bytes, start.digest):
                raise FieldConflict(
                    f"upload {start.upload_id} began with another length or digest",
                    field="start",
                    upload_id=start.upload_id,
                    length_bytes=found.length_bytes,
                )
            return found
        # The name follows from the ids, so that nothing a client chose becomes part of a path.
        token = f"upload-{hashlib.sha256(f'{volume.uid}/{start.upload_id}'.encode()).hexdigest()[:32]}"
        session = self._renewed(UploadSession(start.upload_id, token, start.length_bytes, start.digest, 0, 0, 0), 0)
        await self._record(volume, session)
        return session

    def _renewed(self, session: UploadSession, received_bytes: int) -> UploadSession:
        now = time.time_ns()
        expire = now + int(self._retention_seconds * 1e9)
        return replace(session, received_bytes=received_bytes, update_ns=now, expire_ns=expire)

    async def _record(self, volume: volume_pb2.Volume, session: UploadSession) -> None:
        def work(tx: Transaction) -> None:
            current = catalog.get_volume(tx, volume.name)
            if current is not None and current.uid == volume.uid:
                catalog.put_upload(tx, volume.uid, session)
                catalog.put_volume(tx, current, cause=METHOD)

        await self._store.write(work)

    async def _leave(self, stream: _Stream) -> None:
        """End a stream that did not replace the content: keep what came of a resumable upload, drop any other."""
        await asyncio.shield(asyncio.ensure_future(self._settle_stream(stream)))

    async def _settle_stream(self, stream: _Stream) -> None:
        tasks = [task for task in (stream.writing, stream.syncing) if task is not None]
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        staged, session = stream.staged, stream.session
        if session is not None and stream.batch and not any(outcomes):
            # What had come when the client went.
            await staged.write(stream.batch)
        if session is None:
            await staged.discard()
        elif catalog.get_upload(self._store, stream.volume.uid, session.upload_id) is None:
            # Wrong, or the volume is gone: it cannot be gone on with.
            await staged.discard()
        else:
            try:
                received = await staged.flush() if stream.begun else stream.received
            finally:
                await staged.close()
            await self._record(stream.volume, self._renewed(session, received))

    async def _pause(self, stream: _Stream) -> volume_pb2.UploadVolumeResponse:
        if stream.session is None:
            raise FieldOutOfRange(
                f"the stream ended at {stream.end} of {stream.start.length_bytes} bytes",
                field="start.length_bytes",
                received_bytes=stream.end,
                length_bytes=stream.start.length_bytes,
            )
        received = await stream.staged.flush() if stream.begun else stream.received
        await self._record(stream.volume, self._renewed(stream.session, received))
        volume = catalog.need_volume(self._store, stream.volume.name)
        return volume_pb2.UploadVolumeResponse(volume=volume, received_bytes=received)

    async def expire(self) -> None:
        """Drop uploads that nobody has gone on with."""
        now = time.time_ns()
        for row in self._store.list(catalog.VOLUME):
            for session in catalog.uploads(self._store, row.uid):
                volume = catalog.get_volume(self._store, row.name)
                place = self._places.get(catalog.pool_of(row.name))
                if session.expire_ns > now or volume is None or place is None:
                    continue
                staged = await place.open.reopen(session.token)
                if staged is not None:
                    await staged.discard()
                await self._forget(volume, session.upload_id)

    async def _forget(self, volume: volume_pb2.Volume, upload_id: str) -> None:
        def work(tx: Transaction) -> None:
            catalog.delete_upload(tx, volume.uid, upload_id)
            current = catalog.get_volume(tx, volume.name)
            if current is not None:
                catalog.put_volume(tx, current, cause=METHOD)

        await self._store.write(work)

    # Receiving.

    async def _receive(
        self,
        stream: _Stream,
        first: volume_pb2.UploadVolumeRequest,
        messages: AsyncIterator[volume_pb2.UploadVolumeRequest],
    ) -> bool:
        """Store what comes until the stream or the content ends; returns whether all of the content is there."""
        async for message in messages:
            if message.name not in ("", first.name):
                raise FieldConflict("a stream is about one volume", field="name", name=message.name)
            await self._take(stream, self._piece(stream, message))
        while stream.batch or stream.writing is not None:
            await self._written(stream)
            if stream.batch:
                self._write(stream)
        if stream.syncing is not None:
            await stream.syncing
        if not stream.begun and stream.received == stream.start.length_bytes:
            await self._begin(stream, stream.received)
        return stream.begun and stream.end == stream.start.length_bytes

    async def _take(self, stream: _Stream, piece: Piece) -> None:
        if not stream.begun:
            await self._begin(stream, piece.offset)
        for part in _parts(piece):
            self._accept(stream, part)
            if stream.writing is not None and (stream.writing.done() or stream.batch_bytes >= BATCH_BYTES):
                await self._written(stream)
            if stream.writing is None:
                self._write(stream)

    @staticmethod
    def _piece(stream: _Stream, message: volume_pb2.UploadVolumeRequest) -> Piece:
        if message.WhichOneof("content") != "chunk":
            raise FieldConflict("`start` stands in the first message only", field="start")
        chunk = message.chunk
        kind = chunk.WhichOneof("content")
        if kind == "hole_length":
            length, data = chunk.hole_length, None
        else:
            data = chunk.data
            length = len(data)
        if length <= 0 or (data is not None and length > PIECE_LIMIT_BYTES):
            raise FieldOutOfRange("a chunk has 1 byte to 1 MiB of data, or a hole", field="chunk.data", length=length)
        if data is not None and chunk.HasField("crc32c"):
            found = int(google_crc32c.value(data))
            if found != chunk.crc32c:
                raise ChecksumMismatch(
                    f"the chunk at {chunk.offset} has the CRC32C {found:#010x}, not {chunk.crc32c:#010x} as sent",
                    field="chunk.crc32c",
                    offset=chunk.offset,
                    crc32c=f"{found:#010x}",
                    expected_crc32c=f"{chunk.crc32c:#010x}",
                )
        if chunk.offset < 0 or chunk.offset + length > stream.start.length_bytes:
            raise FieldOutOfRange(
                f"the chunk at {chunk.offset} goes beyond the {stream.start.length_bytes} bytes announced",
                field="chunk.offset",
                offset=chunk.offset,
                length_bytes=stream.start.length_bytes,
            )
        return Piece(chunk.offset, length, data)

    @staticmethod
    async def _begin(stream: _Stream, offset: int) -> None:
        if offset > stream.received:
            raise RangeBeyondEnd(
                f"{stream.received} bytes stand: what comes next begins there, not at {offset}",
                field="chunk.offset",
                received_bytes=stream.received,
                offset=offset,
            )
        stream.begun = True
        stream.end = stream.synced = offset
        await stream.staged.rewind(offset)

    @staticmethod
    def _accept(stream: _Stream, piece: Piece) -> None:
        if piece.offset != stream.end:
            raise RangeBeyondEnd(
                f"the chunk at {piece.offset} does not follow the one before, which ended at {stream.end}",
                field="chunk.offset",
                received_bytes=stream.end,
                offset=piece.offset,
            )
        stream.end += piece.length
        stream.batch.append(piece)
        # A hole costs no memory, but its zeros are digested: a thread must not be busy with it for long.
        stream.batch_bytes += piece.length if piece.data is not None else BATCH_BYTES

    def _write(self, stream: _Stream) -> None:
        batch, stream.batch, stream.batch_bytes = stream.batch, [], 0
        stream.writing = asyncio.create_task(stream.staged.write(batch), name="store an upload")

    async def _written(self, stream: _Stream) -> None:
        if stream.writing is not None:
            writing, stream.writing = stream.writing, None
            try:
                await asyncio.shield(writing)
            except VirtfleetError:
                # What waits behind it cannot be stored either.
                stream.batch, stream.batch_bytes = [], 0
                raise
        if stream.syncing is not None and stream.syncing.done():
            await stream.syncing
            stream.syncing = None
        if stream.syncing is None and stream.staged.position - stream.synced >= SYNC_BYTES:
            stream.synced = stream.staged.position
            stream.syncing = asyncio.create_task(self._sync(stream), name="sync an upload")

    async def _sync(self, stream: _Stream) -> None:
        safe = await stream.staged.flush()
        if stream.session is not None:
            await self._record(stream.volume, self._renewed(stream.session, safe))

    # The end.

    async def _complete(
        self, stream: _Stream, first: volume_pb2.UploadVolumeRequest, call: Call
    ) -> volume_pb2.UploadVolumeResponse:
        volume, place, staged = stream.volume, stream.place, stream.staged
        try:
            digest = self._digest(stream)
            facts = await staged.inspect(volume.spec.format)
            chains.refuse(facts, f"what was sent for {volume.name}")
            links = await chains.below(self._store, self._places, place, facts)
            for link in links:
                call.authorize(link.volume.name, USE)
        except VirtfleetError:
            if stream.session is not None:
                await self._forget(volume, stream.session.upload_id)
            raise
        claim = self._claims.claim(f"UploadVolume of {volume.name}")
        key = catalog.key_of(volume)
        key_of_request = requests.key_of(call, first)
        before = await chains.look(place, volume)

        def intend(tx: Transaction) -> None:
            current = catalog.need_volume(tx, volume.name)
            resources.check_preconditions(current, first.etag, volume.uid)
            self._check(tx, first, current)
            claim.write(volume.name)
            note = {
                "token": staged.token,
                "identity": staged.identity,
                "digest": digest,
                "upload_id": first.start.upload_id,
                "length_bytes": first.start.length_bytes,
                "request": key_of_request.encode() if key_of_request is not None else "",
            }
            tx.put_record(catalog.REPLACING, volume.uid, json.dumps(note).encode())

        try:
            await staged.flush()
            await self._store.write(intend)
            failpoints.reach("storage.upload.intended")
            await uploading(place.open).replace(staged, key, before.identity)
            failpoints.reach("storage.upload.replaced")
            facts = await place.open.inspect(key, volume.spec.format)
            sighting = Sighting(facts, tuple(links))
            return await self._store.write(lambda tx: self._record_new(tx, volume, sighting, digest, first, call))
        except BaseException:
            await self._store.write(partial(_forget_replacing, uid=volume.uid))
            raise
        finally:
            claim.release()

    @staticmethod
    def _digest(stream: _Stream) -> str:
        digest = stream.staged.digest()
        if stream.start.digest and stream.start.digest != digest:
            raise ChecksumMismatch(
                f"what was sent for {stream.volume.name} has the digest {digest}, not {stream.start.digest}: "
                "it is discarded, and the volume is as it was",
                field="start.digest",
                resource=stream.volume.name,
                digest=digest,
                expected_digest=stream.start.digest,
            )
        return digest

    def _record_new(
        self,
        tx: Transaction,
        volume: volume_pb2.Volume,
        sighting: Sighting,
        digest: str,
        first: volume_pb2.UploadVolumeRequest,
        call: Call,
    ) -> volume_pb2.UploadVolumeResponse:
        current = record_content(tx, volume.name, sighting, digest, self._node)
        if first.start.upload_id:
            catalog.delete_upload(tx, volume.uid, first.start.upload_id)
        catalog.put_volume(tx, current, cause=METHOD)
        response = volume_pb2.UploadVolumeResponse(
            volume=current, complete=True, received_bytes=first.start.length_bytes
        )
        key = requests.key_of(call, first)
        if key is not None:
            requests.remember_response(tx, key, response)
        return response

    # After a crash.

    async def settle(self) -> None:
        """End what a crash has left: a replacing that has happened is recorded, one that has not is forgotten."""
        for uid, body in self._store.list_records(catalog.REPLACING):
            note = json.loads(body)
            row = self._store.get_by_uid(catalog.VOLUME, uid)
            place = None if row is None else self._places.get(catalog.pool_of(row.name))
            if row is None:
                await self._store.write(partial(_forget_replacing, uid=uid))
            elif place is not None:
                await self._settle_one(row.name, place, note)
        for row in self._store.list(catalog.VOLUME):
            place = self._places.get(catalog.pool_of(row.name))
            for session in catalog.uploads(self._store, row.uid) if place is not None else ():
                staged = await place.open.reopen(session.token) if place is not None else None
                if staged is None:
                    await self._forget(catalog.need_volume(self._store, row.name), session.upload_id)
                else:
                    await staged.close()

    async def _settle_one(self, name: str, place: Place, note: dict[str, Any]) -> None:
        volume = catalog.need_volume(self._store, name)
        staged = await place.open.reopen(note["token"])
        if staged is not None:
            # It has not taken its place. One that can be gone on with is kept.
            if catalog.get_upload(self._store, volume.uid, note["upload_id"]) is None:
                await staged.discard()
            else:
                await staged.close()
            await self._store.write(partial(_forget_replacing, uid=volume.uid))
            return
        facts = await chains.look(place, volume)
        if facts.identity != note["identity"]:
            # Neither here nor there: somebody else has removed it.
            await self._store.write(partial(_forget_replacing, uid=volume.uid))
            return
        links = await chains.below(self._store, self._places, place, facts)

        def record(tx: Transaction) -> None:
            current = record_content(tx, name, Sighting(facts, tuple(links)), note["digest"], self._node)
            catalog.delete_upload(tx, volume.uid, note["upload_id"])
            catalog.put_volume(tx, current, cause=METHOD)
            if note.get("request"):
                # Whoever was not answered asks again, and is told what came out.
                response = volume_pb2.UploadVolumeResponse(
                    volume=current, complete=True, received_bytes=note["length_bytes"]
                )
                requests.remember_response(tx, requests.RequestKey.decode(note["request"]), response)

        await self._store.write(record)


def _forget_replacing(tx: Transaction, uid: str) -> None:
    tx.delete_record(catalog.REPLACING, uid)


def _parts(piece: Piece) -> Iterator[Piece]:
    """Cut a hole into parts of which each takes a moment only."""
    if piece.data is not None:
        yield piece
        return
    for offset in range(piece.offset, piece.offset + piece.length, HOLE_BYTES):
        yield Piece(offset, min(HOLE_BYTES, piece.offset + piece.length - offset), None)


def record_content(tx: Transaction, name: str, sighting: Sighting, digest: str, node: str) -> volume_pb2.Volume:
    """Write into a volume that its content is new; the caller stores it."""
    current = catalog.need_volume(tx, name)
    current.spec.capacity_bytes = sighting.facts.capacity_bytes
    if sighting.chain:
        current.spec.backing.volume = names.relative(sighting.chain[0].volume.name, node)
        current.spec.backing.format = sighting.chain[0].facts.format
    else:
        current.spec.ClearField("backing")
    catalog.touched(current)
    current.status.digest = digest
    current.status.upload_time.CopyFrom(resources.now())
    observation.fill(current, current.status.path, sighting)
    tx.put_record(catalog.DIGESTS, current.uid, sighting.facts.version.encode())
    tx.delete_record(catalog.REPLACING, current.uid)
    catalog.tell(tx, current, watch_pb2.EVENT_TYPE_VOLUME_CHANGED, reason="UPLOADED")
    return current
