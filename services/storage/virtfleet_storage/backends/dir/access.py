"""Lets guests, each a numeric user of its own, reach the files of their volumes, and takes it back.

The one writer of a volume becomes the file's owner. Readers, and writers who share, get an entry each in the file's
access control list; no group or "others" is opened, so that a guest never sees another one's disk.
"""

from __future__ import annotations

import errno
import os
import stat
import struct
from collections.abc import Sequence

from virtfleet_service.errors import CapabilityMissing
from virtfleet_storage.backends.api import Grant

_ATTRIBUTE = "system.posix_acl_access"
_VERSION = 2
_USER_OWNER, _USER, _GROUP_OWNER, _MASK, _OTHER = 0x01, 0x02, 0x04, 0x10, 0x20
_NO_ID = 0xFFFFFFFF
_READ, _WRITE = 4, 2
_ABSENT = frozenset({errno.ENODATA, errno.EOPNOTSUPP, errno.ENOTSUP})


def encode(mode: int, grants: Sequence[Grant]) -> bytes:
    """Return an access control list: what the mode says, and an entry per grant."""
    entries = [(_USER_OWNER, mode >> 6 & 7, _NO_ID)]
    rights = {grant.uid: 0 for grant in grants}
    for grant in grants:
        rights[grant.uid] |= _READ | (_WRITE if grant.write else 0)
    entries += [(_USER, rights[uid], uid) for uid in sorted(rights)]
    mask = mode >> 3 & 7
    for right in rights.values():
        mask |= right
    entries += [(_GROUP_OWNER, mode >> 3 & 7, _NO_ID), (_MASK, mask, _NO_ID), (_OTHER, mode & 7, _NO_ID)]
    return struct.pack("<I", _VERSION) + b"".join(struct.pack("<HHI", *entry) for entry in entries)


def present(descriptor: int) -> tuple[int, int, int]:
    """Return owner, group and mode of a file that no guest has access to yet."""
    facts = os.fstat(descriptor)
    return facts.st_uid, facts.st_gid, stat.S_IMODE(facts.st_mode)


def apply(descriptor: int, grants: Sequence[Grant], restore: tuple[int, int, int]) -> None:
    """Give exactly these guests access to a file; without any it is as `restore` says. Repeatable.

    Raises:
        CapabilityMissing: The file system has no access control lists, and one is needed.
    """
    owner, group, mode = restore
    for grant in grants:
        if grant.owner:
            owner, mode = grant.uid, mode | stat.S_IRUSR | stat.S_IWUSR
    listed = [grant for grant in grants if not grant.owner and grant.uid != owner]
    facts = os.fstat(descriptor)
    if (facts.st_uid, facts.st_gid) != (owner, group):
        os.fchown(descriptor, owner, group)
    # A list goes first: its mask would stand where the mode has the group's rights.
    if not listed:
        _clear(descriptor)
        os.fchmod(descriptor, mode)
        return
    try:
        os.setxattr(descriptor, _ATTRIBUTE, encode(mode, listed))
    except OSError as error:
        if error.errno in (errno.EOPNOTSUPP, errno.ENOTSUP):
            raise CapabilityMissing(
                "the file system of the pool has no access control lists, so that a file cannot be shared with guests",
                capability="volume.attach.shared",
            ) from error
        raise


def _clear(descriptor: int) -> None:
    try:
        os.removexattr(descriptor, _ATTRIBUTE)
    except OSError as error:
        if error.errno not in _ABSENT:
            raise
