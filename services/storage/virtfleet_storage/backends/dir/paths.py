"""Opens directories and files so that no link, on the way or put there meanwhile, leads anywhere else.

A directory is opened one component at a time, each relative to the one before and without following links; a file by
its bare name relative to the open directory, first as a mere handle (`O_PATH`: no side effect on a pipe or device),
which is checked and then opened anew through itself. What is checked is what is used, whatever happens to names
meanwhile.
"""

from __future__ import annotations

import errno
import os
import stat

from virtfleet_service.errors import BackingMissing, PathOutsidePool, ResourceNotFound

NAME_LIMIT_BYTES = 255


def check_path(path: str) -> list[str]:
    """Split an absolute path into its components.

    Raises:
        PathOutsidePool: It is not absolute, or has an empty, `.` or `..` component.
    """
    parts = path.split("/")
    if len(parts) < 2 or parts[0] or any(part in ("", ".", "..") for part in parts[1:]) or "\0" in path:
        raise PathOutsidePool(f"path {path!r} is not absolute and plain", path=path)
    return parts[1:]


def acceptable_name(name: str) -> bool:
    """Tell whether a name can be that of a volume's file: bare, visible, printable, one that every client can carry."""
    try:
        encoded = name.encode()
    except UnicodeEncodeError:
        return False
    return 0 < len(encoded) <= NAME_LIMIT_BYTES and "/" not in name and not name.startswith(".") and name.isprintable()


def open_directory(path: str) -> int:
    """Open a directory by its absolute path without following any link; returns its descriptor.

    Raises:
        BackingMissing: A component is missing.
        PathOutsidePool: A component is a link or no directory.
    """
    at = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for part in check_path(path):
            following = _step(at, part, path)
            os.close(at)
            at = following
        return os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=at)
    finally:
        os.close(at)


def _step(at: int, part: str, path: str) -> int:
    try:
        return os.open(part, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=at)
    except FileNotFoundError as error:
        raise BackingMissing(f"directory {path} is missing", path=path) from error
    except OSError as error:
        if error.errno in (errno.ENOTDIR, errno.ELOOP):
            raise PathOutsidePool(f"{part!r} in {path} is a link or no directory", path=path) from error
        raise


def open_parent(path: str) -> tuple[int, str]:
    """Open the directory that holds a path; returns its descriptor and the last component."""
    parts = check_path(path)
    if len(parts) == 1:
        return os.open("/", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC), parts[0]
    return open_directory("/" + "/".join(parts[:-1])), parts[-1]


def open_file(directory: int, name: str, flags: int = os.O_RDONLY) -> int:
    """Open a volume's file by its bare name in an open directory; returns the descriptor.

    Raises:
        ResourceNotFound: There is none.
        PathOutsidePool: It is a link (symbolic, or a further name of a file that may be anywhere) or no regular file.
    """
    if not acceptable_name(name):
        raise PathOutsidePool(f"{name!r} is no name of a volume's file", path=name)
    try:
        handle = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
    except FileNotFoundError as error:
        raise ResourceNotFound(f"file {name!r} is missing", path=name) from error
    try:
        check_kind(os.fstat(handle), name)
        return os.open(f"/proc/self/fd/{handle}", flags | os.O_CLOEXEC | os.O_NOCTTY)
    finally:
        os.close(handle)


def check_kind(facts: os.stat_result, name: str) -> None:
    """Accept a regular file with one name.

    Raises:
        PathOutsidePool: It is anything else.
    """
    if stat.S_ISLNK(facts.st_mode):
        raise PathOutsidePool(f"{name!r} is a symbolic link", path=name)
    if not stat.S_ISREG(facts.st_mode):
        raise PathOutsidePool(f"{name!r} is no regular file", path=name)
    if facts.st_nlink > 1:
        raise PathOutsidePool(
            f"{name!r} is a hard link: the same file has another name, perhaps outside of the pool", path=name
        )


def identity_of(facts: os.stat_result) -> str:
    """Return what tells this file from any other that is there at the same time."""
    return f"{facts.st_dev:x}:{facts.st_ino:x}"
