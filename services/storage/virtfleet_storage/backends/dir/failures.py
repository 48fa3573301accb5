"""Turns what the kernel refuses into errors that a caller can act on."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from virtfleet_service.errors import BackendFailed, BackendUnreachable, PoolFull, VirtfleetError, WrongState

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
_AWAY = frozenset({errno.EIO, errno.ESTALE, errno.ENODEV, errno.ENXIO, errno.EHOSTDOWN, errno.ENOTCONN})
_FORBIDDEN = frozenset({errno.EACCES, errno.EPERM})


def translate(error: OSError, doing: str) -> VirtfleetError:
    """Return the error of the API for one of the kernel's."""
    said = error.strerror or str(error)
    if error.errno in _FULL:
        return PoolFull(f"{doing}: {said}", step=doing, cause=said)
    if error.errno == errno.EFBIG:
        return PoolFull(f"{doing}: the file system takes no file of that size", step=doing, cause=said)
    if error.errno in _AWAY:
        return BackendUnreachable(f"{doing}: {said}", step=doing, cause=said)
    if error.errno == errno.EROFS:
        return WrongState(f"{doing}: {said}", state="READ_ONLY", step=doing, cause=said)
    if error.errno in _FORBIDDEN:
        # Not the caller's permission: no role that he could be given would help.
        return BackendFailed(f"{doing}: the service itself may not: {said}", step=doing, cause=said)
    return BackendFailed(f"{doing}: {said}", step=doing, cause=said)


@contextmanager
def translated(doing: str) -> Iterator[None]:
    """Raise errors of the kernel inside as errors of the API; `doing` says what was tried, for people."""
    try:
        yield
    except OSError as error:
        raise translate(error, doing) from error
