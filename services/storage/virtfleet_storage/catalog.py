"""What the store holds of pools and volumes beside the resources: who is where, on top of what, and held by whom.

    resource `pool`, `volume`
    record   paths        path on the node → name of the volume
             backing      uid of a volume → uid of the volume below
             children     uid of a volume / uid of one on top of it → the name of that
             attachments  uid of a volume / id → Attachment
             owners       uid of a volume → owner, group and mode of its file before guests had access
             digests      uid of a volume → version of the file that `status.digest` is of
             uploads      uid of a volume / upload_id → UploadSession
             replacing    uid of a volume → what is about to take the place of its file
             undone       uid of a pool / key → Undone

Every change of a volume goes through `put_volume` and `delete_volume`, so that the records follow in the same
transaction.
"""

from __future__ import annotations

import builtins
import json
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from virtfleet.node.v1 import attachment_pb2
from virtfleet.storage.v1 import pool_pb2, volume_pb2, watch_pb2
from virtfleet_service import errors, names, resources
from virtfleet_service.transaction import Row, Transaction

POOL = "pool"
VOLUME = "volume"
PATHS = "paths"
BACKING = "backing"
CHILDREN = "children"
ATTACHMENTS = "attachments"
OWNERS = "owners"
DIGESTS = "digests"
UPLOADS = "uploads"
REPLACING = "replacing"
UNDONE = "undone"

OBSERVED = "observed"


class Reader(Protocol):
    """Is what the store and a transaction have in common."""

    def get(self, name: str) -> Row | None:
        """Read a resource."""

    def get_by_uid(self, kind: str, uid: str) -> Row | None:
        """Read a resource by its uid."""

    def list(self, kind: str, *, parent: str = "", after: str = "", limit: int | None = None) -> builtins.list[Row]:
        """Read the resources of a kind."""

    def get_record(self, space: str, key: str) -> bytes | None:
        """Read a record."""

    def list_records(self, space: str, prefix: str = "") -> builtins.list[tuple[str, bytes]]:
        """Read records."""


@dataclass(frozen=True, slots=True)
class Attachment:
    """Says who holds a volume.

    Attributes:
        mode: An `AttachmentMode`.
        run_as_uid: The numeric user of the guest; 0: none.
        time_ns: Since when.
    """

    attachment_id: str
    volume: str
    domain_uid: str
    domain: str
    device_id: str
    mode: int
    run_as_uid: int
    time_ns: int

    @property
    def writes(self) -> bool:
        """Whether the holder may write."""
        return self.mode != attachment_pb2.ATTACHMENT_MODE_READ_ONLY

    @property
    def exclusive(self) -> bool:
        """Whether nobody else may hold the volume."""
        return self.mode == attachment_pb2.ATTACHMENT_MODE_EXCLUSIVE

    def shown(self) -> volume_pb2.VolumeAttachment:
        """Return it as the status of a volume shows it."""
        message = volume_pb2.VolumeAttachment(
            attachment_id=self.attachment_id,
            domain=self.domain,
            domain_uid=self.domain_uid,
            device_id=self.device_id,
            mode=volume_pb2.VolumeAttachmentMode.ValueType(self.mode),
        )
        message.attach_time.FromNanoseconds(self.time_ns)
        return message


@dataclass(frozen=True, slots=True)
class UploadSession:
    """Is an upload that can go on after a cut.

    Attributes:
        token: Finds the staged file.
        received_bytes: How much is safely stored.
    """

    upload_id: str
    token: str
    length_bytes: int
    digest: str
    received_bytes: int
    update_ns: int
    expire_ns: int

    def shown(self) -> volume_pb2.VolumeUpload:
        """Return it as the status of a volume shows it."""
        message = volume_pb2.VolumeUpload(
            upload_id=self.upload_id, received_bytes=self.received_bytes, length_bytes=self.length_bytes
        )
        message.update_time.FromNanoseconds(self.update_ns)
        message.expire_time.FromNanoseconds(self.expire_ns)
        return message


@dataclass(frozen=True, slots=True)
class Undone:
    """Is a file whose creation was undone.

    Attributes:
        key: Its name in the pool.
        identity: As in `Facts`.
        time_ns: When it was undone. A file that somebody has touched since is his.
    """

    key: str
    identity: str
    time_ns: int


def _encode(value: Attachment | UploadSession | Undone) -> bytes:
    return json.dumps(asdict(value), separators=(",", ":")).encode()


def _fields(body: bytes) -> dict[str, Any]:
    fields: dict[str, Any] = json.loads(body)
    return fields


# Resources.


def need_pool(reader: Reader, name: str) -> pool_pb2.Pool:
    """Return a pool.

    Raises:
        ResourceNotFound: There is none of that name.
    """
    row = reader.get(name)
    if row is None or row.kind != POOL:
        raise errors.ResourceNotFound(f"{name} does not exist", resource=name, name=name)
    return pool_pb2.Pool.FromString(row.body)


def get_volume(reader: Reader, name: str) -> volume_pb2.Volume | None:
    """Return a volume; None if there is none of that name."""
    row = reader.get(name)
    return None if row is None or row.kind != VOLUME else volume_pb2.Volume.FromString(row.body)


def need_volume(reader: Reader, name: str) -> volume_pb2.Volume:
    """Return a volume.

    Raises:
        ResourceNotFound: There is none of that name.
    """
    volume = get_volume(reader, name)
    if volume is None:
        raise errors.ResourceNotFound(f"{name} does not exist", resource=name, name=name)
    return volume


def volume_at(reader: Reader, path: str) -> volume_pb2.Volume | None:
    """Return the volume whose file has a path; None: no volume's has."""
    name = reader.get_record(PATHS, path)
    return None if name is None else get_volume(reader, name.decode())


def pool_of(volume_name: str) -> str:
    """Return the name of the pool that a volume is in."""
    return names.parent_of(volume_name)


def key_of(volume: volume_pb2.Volume) -> str:
    """Return the key of a volume in its pool: its file's name."""
    return volume.status.path.rpartition("/")[2]


def put_volume(tx: Transaction, volume: volume_pb2.Volume, *, cause: str) -> bool:
    """Store a volume with what follows from it; returns whether anything is different from before."""
    _show_holders(tx, volume)
    before = get_volume(tx, volume.name)
    if before is not None and (before.uid != volume.uid or before.status.path != volume.status.path):
        tx.delete_record(PATHS, before.status.path)
    _remember(tx, PATHS, volume.status.path, volume.name)
    chain = volume.status.backing_chain
    below = volume_at(tx, chain[0].path) if chain else None
    if below is None and volume.spec.backing.volume:
        # While the chain is broken, what was asked for still says what must not be thrown away.
        node = names.node_of(volume.name)
        below = get_volume(tx, names.absolute(volume.spec.backing.volume, node))
    _set_backing(tx, volume, below.uid if below is not None else "")
    return tx.put(VOLUME, volume, cause=cause)


def delete_volume(tx: Transaction, volume: volume_pb2.Volume, *, cause: str) -> bool:
    """Forget a volume with all that was recorded of it."""
    if tx.get_record(PATHS, volume.status.path) == volume.name.encode():
        tx.delete_record(PATHS, volume.status.path)
    _set_backing(tx, volume, "")
    for space in (OWNERS, DIGESTS):
        tx.delete_record(space, volume.uid)
    for space in (ATTACHMENTS, UPLOADS):
        for key, _ in tx.list_records(space, f"{volume.uid}/"):
            tx.delete_record(space, key)
    return tx.delete(volume.name, cause=cause)


def _set_backing(tx: Transaction, volume: volume_pb2.Volume, below: str) -> None:
    before = (tx.get_record(BACKING, volume.uid) or b"").decode()
    if before and before != below:
        tx.delete_record(CHILDREN, f"{before}/{volume.uid}")
        tx.delete_record(BACKING, volume.uid)
    if below:
        _remember(tx, BACKING, volume.uid, below)
        _remember(tx, CHILDREN, f"{below}/{volume.uid}", volume.name)


def _remember(tx: Transaction, space: str, key: str, text: str) -> None:
    """Store a record; what is there already costs no write."""
    if tx.get_record(space, key) != text.encode():
        tx.put_record(space, key, text.encode())


def _show_holders(reader: Reader, volume: volume_pb2.Volume) -> None:
    del volume.status.attachments[:]
    volume.status.attachments.extend(one.shown() for one in attachments(reader, volume.uid))
    del volume.status.uploads[:]
    volume.status.uploads.extend(one.shown() for one in uploads(reader, volume.uid))


def children(reader: Reader, uid: str) -> list[str]:
    """Return the names of the volumes that lie directly on top of one."""
    return [body.decode() for _, body in reader.list_records(CHILDREN, f"{uid}/")]


# Who holds a volume.


def attachments(reader: Reader, uid: str = "") -> list[Attachment]:
    """Return the attachments of a volume; of all without a uid."""
    return [Attachment(**_fields(body)) for _, body in reader.list_records(ATTACHMENTS, f"{uid}/" if uid else "")]


def put_attachment(tx: Transaction, uid: str, attachment: Attachment) -> None:
    """Record an attachment of a volume."""
    tx.put_record(ATTACHMENTS, f"{uid}/{attachment.attachment_id}", _encode(attachment))


def delete_attachment(tx: Transaction, uid: str, attachment_id: str) -> bool:
    """Forget an attachment; False if there is none."""
    return tx.delete_record(ATTACHMENTS, f"{uid}/{attachment_id}")


def refuse_held(reader: Reader, volume: volume_pb2.Volume) -> None:
    """Accept a volume that no domain holds.

    Raises:
        ResourceInUse: One does: metadata `holder`.
    """
    for held in attachments(reader, volume.uid):
        raise errors.ResourceInUse(
            f"{volume.name} is attached to {held.domain or held.domain_uid} as {held.device_id}: "
            "stop that domain or detach the device first",
            resource=volume.name,
            holder=held.domain or held.domain_uid,
            attachment_id=held.attachment_id,
        )


def refuse_children(reader: Reader, volume: volume_pb2.Volume) -> None:
    """Accept a volume that no other lies on top of.

    Raises:
        HasChildren: One does: metadata `holder`.
    """
    for child in children(reader, volume.uid):
        raise errors.HasChildren(
            f"{volume.name} backs {child}, which would lose its data", resource=volume.name, holder=child
        )


# Uploads.


def uploads(reader: Reader, uid: str = "") -> list[UploadSession]:
    """Return the upload sessions of a volume; of all without a uid."""
    return [UploadSession(**_fields(body)) for _, body in reader.list_records(UPLOADS, f"{uid}/" if uid else "")]


def get_upload(reader: Reader, uid: str, upload_id: str) -> UploadSession | None:
    """Return an upload session; None if there is none."""
    body = reader.get_record(UPLOADS, f"{uid}/{upload_id}")
    return None if body is None else UploadSession(**_fields(body))


def put_upload(tx: Transaction, uid: str, session: UploadSession) -> None:
    """Record an upload session."""
    tx.put_record(UPLOADS, f"{uid}/{session.upload_id}", _encode(session))


def delete_upload(tx: Transaction, uid: str, upload_id: str) -> bool:
    """Forget an upload session; False if there is none."""
    return tx.delete_record(UPLOADS, f"{uid}/{upload_id}")


def staged_tokens(reader: Reader) -> frozenset[str]:
    """Return the tokens of all staged files that somebody still needs."""
    about = [str(_fields(body)["token"]) for _, body in reader.list_records(REPLACING)]
    return frozenset([*about, *(session.token for session in uploads(reader))])


# Files of creations that are undone.


def undone(reader: Reader, pool: pool_pb2.Pool) -> list[Undone]:
    """Return the files in a pool that are to go because nothing is recorded of them."""
    return [Undone(**_fields(body)) for _, body in reader.list_records(UNDONE, f"{pool.uid}/")]


def put_undone(tx: Transaction, pool: pool_pb2.Pool, file: Undone) -> None:
    """Note that a file is to go as soon as it can be reached, and is no volume until then."""
    tx.put_record(UNDONE, f"{pool.uid}/{file.key}", _encode(file))


def delete_undone(tx: Transaction, pool: pool_pb2.Pool, key: str) -> None:
    """Note that a file has gone, or is a volume after all."""
    tx.delete_record(UNDONE, f"{pool.uid}/{key}")


# Owners of files.


def get_owner(reader: Reader, uid: str) -> tuple[int, int, int] | None:
    """Return owner, group and mode of a volume's file before guests had access; None: none has."""
    body = reader.get_record(OWNERS, uid)
    if body is None:
        return None
    owner, group, mode = json.loads(body)
    return owner, group, mode


def put_owner(tx: Transaction, uid: str, owner: tuple[int, int, int] | None) -> None:
    """Record or forget the owner to go back to."""
    if owner is None:
        tx.delete_record(OWNERS, uid)
    else:
        tx.put_record(OWNERS, uid, json.dumps(owner).encode())


# Events.


def tell(
    tx: Transaction,
    resource: pool_pb2.Pool | volume_pb2.Volume,
    kind: watch_pb2.EventType.ValueType,
    *,
    reason: str = "",
    message: str = "",
    attachment: volume_pb2.VolumeAttachment | None = None,
) -> None:
    """Tell watchers of something that happened to a resource."""
    event = watch_pb2.Event(resource=resource.name, uid=resource.uid, type=kind, reason=reason, message=message)
    event.time.FromNanoseconds(time.time_ns())
    if attachment is not None:
        event.volume_attachment.CopyFrom(attachment)
    tx.event(event)


def put_pool(tx: Transaction, pool: pool_pb2.Pool, *, cause: str) -> bool:
    """Store a pool; returns whether anything is different from before."""
    return tx.put(POOL, pool, cause=cause)


def pools(rows: Iterable[Row]) -> list[pool_pb2.Pool]:
    """Decode pools."""
    return [pool_pb2.Pool.FromString(row.body) for row in rows]


def touched(resource: pool_pb2.Pool | volume_pb2.Volume) -> None:
    """Count a change of what was asked for, which the status follows at once."""
    resources.touch(resource)
    resource.status.observed_generation = resource.generation
