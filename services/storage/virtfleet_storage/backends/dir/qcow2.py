"""Reads the header of a qcow2 image: size, name of the image below, and whether a guest may have it at all.

Own code of a page, because the question comes before any tool may touch the file: an image is a stranger's input, and
opening it with QEMU follows the names written in it.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass

MAGIC = b"QFI\xfb"
VIRTUAL_SIZE_LIMIT_BYTES = 1 << 46
BACKING_NAME_LIMIT_BYTES = 1023
HEADER_LIMIT_BYTES = 2 << 20
_BACKING_FORMAT_LIMIT_BYTES = 16

_FIXED = struct.Struct(">4sIQIIQIIQQIIQ")
_VERSION_3 = struct.Struct(">QQQII")
_FEATURES = struct.Struct(">Q")
_EXTENSION = struct.Struct(">II")
_EXTENSION_END = 0
_EXTENSION_BACKING_FORMAT = 0xE2792ACA
_EXTENSION_DATA_FILE = 0x44415441

_DIRTY, _CORRUPT, _DATA_FILE, _COMPRESSION, _EXTENDED_L2 = 1, 2, 4, 8, 16
_KNOWN_FEATURES = _DIRTY | _CORRUPT | _DATA_FILE | _COMPRESSION | _EXTENDED_L2


@dataclass(frozen=True, slots=True)
class Qcow2Header:
    """Is a header that parses.

    Attributes:
        refusal: A reason of ErrorInfo for which a guest must not have the image; empty: none.
    """

    version: int
    virtual_size_bytes: int
    cluster_size_bytes: int
    backing: str
    backing_format: str
    refusal: str = ""
    refusal_message: str = ""


class HeaderError(Exception):
    """The bytes are no header of a qcow2 image; the text says why."""


def read_header(descriptor: int, physical_bytes: int) -> Qcow2Header:
    """Read the header of an open file.

    Raises:
        HeaderError: It is none, or one that contradicts itself or the file.
    """
    return parse_header(os.pread(descriptor, min(HEADER_LIMIT_BYTES, 65536), 0), physical_bytes)


def mark_corrupt(descriptor: int) -> int:
    """Mark an open image as corrupt, safe from a power cut, where its version knows such a mark (3, not 2).

    Returns:
        How many bytes at its beginning are its header: nothing of a guest is in them.

    Raises:
        HeaderError: It is no image.
    """
    data = os.pread(descriptor, HEADER_LIMIT_BYTES, 0)
    header = parse_header(data, os.fstat(descriptor).st_size)
    if header.version >= 3:
        (features,) = _FEATURES.unpack_from(data, _FIXED.size)
        os.pwrite(descriptor, _FEATURES.pack(features | _CORRUPT), _FIXED.size)
        os.fsync(descriptor)
    return header.cluster_size_bytes


def parse_header(data: bytes, physical_bytes: int) -> Qcow2Header:
    """Read a header out of the first bytes (64 KiB are enough for every cluster size that matters) of an image.

    Raises:
        HeaderError: It is none, or one that contradicts itself or the file.
    """
    if len(data) < _FIXED.size or data[:4] != MAGIC:
        raise HeaderError("no qcow2 magic")
    (
        _,
        version,
        backing_offset,
        backing_size,
        cluster_bits,
        size,
        crypt,
        l1_size,
        l1_offset,
        table,
        table_clusters,
        _,
        _,
    ) = _FIXED.unpack_from(data)
    if version not in (2, 3):
        raise HeaderError(f"version {version}")
    if not 9 <= cluster_bits <= 21:
        raise HeaderError(f"cluster bits {cluster_bits}")
    if size > VIRTUAL_SIZE_LIMIT_BYTES:
        raise HeaderError(f"virtual size {size} is more than {VIRTUAL_SIZE_LIMIT_BYTES}")
    cluster = 1 << cluster_bits
    if l1_offset % cluster or l1_offset + l1_size * 8 > physical_bytes + cluster or l1_size * 8 > (32 << 20):
        raise HeaderError("the first table lies outside of the file")
    if table % cluster or table > physical_bytes or table_clusters * cluster > (8 << 20):
        raise HeaderError("the table of counts lies outside of the file")
    features, header_length = _features(data, version)
    extensions = _extensions(data, header_length, backing_offset or cluster, cluster)
    backing = _backing(data, backing_offset, backing_size, cluster)
    backing_format = _backing_format(extensions.get(_EXTENSION_BACKING_FORMAT, b""))
    reason, message = _refusal(crypt, features, has_data_file=_EXTENSION_DATA_FILE in extensions)
    return Qcow2Header(version, size, cluster, backing, backing_format, reason, message)


def _features(data: bytes, version: int) -> tuple[int, int]:
    if version == 2:
        return 0, _FIXED.size
    if len(data) < _FIXED.size + _VERSION_3.size:
        raise HeaderError("the header is cut")
    incompatible, _, _, _, header_length = _VERSION_3.unpack_from(data, _FIXED.size)
    if not _FIXED.size + _VERSION_3.size <= header_length <= 4096:
        raise HeaderError(f"header length {header_length}")
    return incompatible, header_length


def _extensions(data: bytes, start: int, end: int, cluster: int) -> dict[int, bytes]:
    found: dict[int, bytes] = {}
    at = start
    end = min(end, cluster, len(data))
    while at + _EXTENSION.size <= end:
        kind, length = _EXTENSION.unpack_from(data, at)
        at += _EXTENSION.size
        if kind == _EXTENSION_END:
            break
        if at + length > end:
            raise HeaderError("an extension of the header is cut")
        found[kind] = data[at : at + length]
        at += (length + 7) & ~7
    return found


def _backing(data: bytes, offset: int, size: int, cluster: int) -> str:
    if not offset:
        return ""
    if not 0 < size <= BACKING_NAME_LIMIT_BYTES or offset + size > min(cluster, len(data)):
        raise HeaderError("the name of the image below lies outside of the header")
    try:
        return data[offset : offset + size].decode()
    except UnicodeDecodeError as error:
        raise HeaderError("the name of the image below is no text") from error


def _backing_format(word: bytes) -> str:
    # QEMU's own limit. Without one, an image brings its volume more text than an answer can hold.
    if len(word) >= _BACKING_FORMAT_LIMIT_BYTES:
        raise HeaderError("the format of the image below has no end")
    return word.decode("utf-8", "replace")


def _refusal(crypt: int, features: int, *, has_data_file: bool) -> tuple[str, str]:
    if has_data_file or features & _DATA_FILE:
        return "PATH_OUTSIDE_POOL", "the image keeps its data in another file"
    if features & ~_KNOWN_FEATURES:
        return "CAPABILITY_MISSING", f"the image needs features that are not known: {features & ~_KNOWN_FEATURES:#x}"
    if crypt:
        return "CAPABILITY_MISSING", "the image is encrypted"
    if features & _CORRUPT:
        return "IMAGE_CORRUPT", "the image is marked corrupt"
    return "", ""
