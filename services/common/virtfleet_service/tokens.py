"""Opaque tokens: where a list goes on, and where a watch goes on.

A page token is encrypted and authenticated with a key of the store and bound to the list that made it: the name at
which a list goes on may be one that its caller must not see. A resume token names the store and the place in its log by
number and time, so that a store put back from a copy, which counts the same numbers again, is seen.
"""

from __future__ import annotations

import base64
import binascii
import functools
import hashlib
import hmac
import struct
from dataclasses import dataclass
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESSIV

from virtfleet_service import errors

_SUM_BYTES: Final = 8
_RESUME = struct.Struct(">B16sQQ8s")
_RESUME_VERSION: Final = 1

TOKEN_LIMIT_CHARACTERS: Final = 4096
ANY_WATCH: Final = bytes(8)
"""The binding of a token that any watch of the store takes: those that lists hand out."""


def binding_of(*parts: object) -> bytes:
    """Return eight bytes that stand for the parameters of a list or watch."""
    return hashlib.sha256(repr(parts).encode()).digest()[:8]


def seal(key: bytes, binding: bytes, payload: bytes) -> str:
    """Make a page token that only the holder of the key can make, or read."""
    return _encode(_cipher(key).encrypt(payload, [binding]))


def unseal(
    key: bytes,
    binding: bytes,
    token: str,
    *,
    field: str = "page_token",
    limit_characters: int = TOKEN_LIMIT_CHARACTERS,
) -> bytes:
    """Return the payload of a page token.

    Raises:
        PageTokenInvalid: It was made for another list or by another store, or not by a server at all.
    """
    try:
        return _cipher(key).decrypt(_decode(token, field, limit_characters), [binding])
    except InvalidTag as error:
        raise _invalid(field) from error


@functools.lru_cache(maxsize=4)
def _cipher(key: bytes) -> AESSIV:
    """Return AES-SIV (RFC 5297), which needs no nonce: the same place in a list has the same token."""
    return AESSIV(hmac.digest(key, b"page token", "sha512"))


@dataclass(frozen=True, slots=True)
class ResumeToken:
    """Is a place in the log of a store.

    Attributes:
        store_id: The store, in hex.
        seq: The number of the last entry that was told.
        time_ns: The time of that entry.
        binding: Stands for the parameters of the watch; ANY_WATCH fits all.
        kind: In a snapshot: the kind that is being sent; empty: no snapshot.
        name: In a snapshot: the last name of that kind that was sent.
    """

    store_id: str
    seq: int
    time_ns: int
    binding: bytes = ANY_WATCH
    kind: str = ""
    name: str = ""

    def encode(self) -> str:
        """Return the token as text."""
        raw = _RESUME.pack(_RESUME_VERSION, bytes.fromhex(self.store_id), self.seq, self.time_ns, self.binding)
        if self.kind:
            raw += f"{self.kind}\0{self.name}".encode()
        return _encode(_checksum(raw) + raw)

    @classmethod
    def decode(cls, token: str) -> ResumeToken:
        """Read a token.

        Raises:
            PageTokenInvalid: It is none.
        """
        raw = _decode(token, "resume_token")
        body = raw[_SUM_BYTES:]
        if len(body) < _RESUME.size or raw[:_SUM_BYTES] != _checksum(body):
            raise _invalid("resume_token")
        version, store_id, seq, time_ns, binding = _RESUME.unpack_from(body)
        kind, separator, name = body[_RESUME.size :].decode(errors="replace").partition("\0")
        if version != _RESUME_VERSION or bool(kind) != bool(separator):
            raise _invalid("resume_token")
        return cls(store_id.hex(), seq, time_ns, binding, kind, name)


def _checksum(raw: bytes) -> bytes:
    # Against damage and guesses, not against the caller: a place in the log gives him nothing that he may not read.
    return hashlib.blake2s(raw, digest_size=_SUM_BYTES).digest()


def _encode(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def _decode(token: str, field: str, limit_characters: int = TOKEN_LIMIT_CHARACTERS) -> bytes:
    if len(token) > limit_characters:
        raise _invalid(field)
    try:
        raw = base64.b64decode(token.encode("ascii") + b"=" * (-len(token) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError) as error:
        raise _invalid(field) from error
    # Of the several texts that stand for the same bytes only the one that we write is taken.
    if _encode(raw) != token:
        raise _invalid(field)
    return raw


def _invalid(field: str) -> errors.PageTokenInvalid:
    return errors.PageTokenInvalid(f"{field} is not one of this list or watch: begin without it", field=field)
