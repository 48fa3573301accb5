"""Files that a process writes for itself and reads after a restart: there whole and on the disk, or as they were.

A certificate and its key are two files, and nothing replaces two at once. So the new key waits in a file of its own,
`KEY.next`, until its certificate is in place; whoever finds a key that does not fit looks there. A process that dies at
any line leaves a pair that serves.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from virtfleet_service import failpoints, files

if TYPE_CHECKING:
    from pathlib import Path


def write(path: Path, content: bytes, *, mode: int) -> None:
    """Write a file in place of the one before; nobody ever sees half of it, and no power cut takes it back.

    Args:
        path: The file.
        content: What it holds then.
        mode: Who may read it, whatever the umask says.

    Raises:
        OSError: It cannot be written; the old one stands.
    """
    staged = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(staged, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            os.fchmod(file.fileno(), mode)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        staged.replace(path)
    except BaseException:
        staged.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_pair(certificate_file: Path, certificate: bytes, key_file: Path, key: bytes) -> None:
    """Write a certificate and its key (PEM) in place of those before.

    Raises:
        OSError: One cannot be written; `fitting_key` and `finish_pair` find what fits.
    """
    write(_waiting(key_file), key, mode=0o600)
    failpoints.reach("pair.key_written")
    write(certificate_file, certificate, mode=0o644)
    failpoints.reach("pair.certificate_written")
    finish_pair(certificate_file, key_file)


def finish_pair(certificate_file: Path, key_file: Path) -> None:
    """Put the key in its place that was left waiting; does nothing if there is none, or if it fits no certificate yet.

    Raises:
        OSError: A file cannot be read or moved.
    """
    waiting = _waiting(key_file)
    try:
        key = files.read_kept(waiting)
        certificate = files.read_kept(certificate_file)
    except FileNotFoundError:
        return
    if fits(certificate, key):
        waiting.replace(key_file)
        sync_folder(key_file.parent)


def fitting_key(certificate: bytes, key_file: Path) -> bytes:
    """Return the key (PEM) of a certificate: of the two that may be there the one that fits, else what the file holds.

    Raises:
        OSError: The file cannot be read.
    """
    try:
        key = files.read_kept(key_file)
    except FileNotFoundError:
        key = b""
    if not fits(certificate, key):
        try:
            waiting = files.read_kept(_waiting(key_file))
        except FileNotFoundError:
            waiting = b""
        if fits(certificate, waiting):
            return waiting
    return key or files.read_kept(key_file)


def fits(certificate: bytes, key: bytes) -> bool:
    """Tell whether a key is that of a certificate (both PEM, the leaf first); False for what does not parse."""
    from cryptography import x509
    from cryptography.hazmat.primitives import serialization

    form = (serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    try:
        leaf = x509.load_pem_x509_certificates(certificate)[0]
        private = serialization.load_pem_private_key(key, None)
    except (ValueError, TypeError, IndexError):
        return False
    return private.public_key().public_bytes(*form) == leaf.public_key().public_bytes(*form)


def _waiting(key_file: Path) -> Path:
    return key_file.with_name(f"{key_file.name}.next")
