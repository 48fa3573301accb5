"""What `virtfleet authority issue` has issued, in the authority's folder: written by the command, taken in by gateways.

    issued/{serial number}.pem      one certificate each, nothing secret

The command writes a certificate there before it hands out the key, so there is none that the fleet could not revoke.
A gateway looks into the folder at its start and every second. Certificates from an authority that is kept on another
machine are entered by copying their files into this folder.
"""

from __future__ import annotations

import asyncio
import logging
import os
from typing import TYPE_CHECKING, Final

from virtfleet_service import durable
from virtfleet_service.errors import DocumentInvalid, VirtfleetError

if TYPE_CHECKING:
    from pathlib import Path

    from virtfleet_gateway.authority import Certificate
    from virtfleet_gateway.certificates import Certificates

_log = logging.getLogger(__name__)

LOOK_SECONDS: Final = 1.0
PRINCIPAL: Final = "virtfleet authority issue"
"""Stands as principal in what was issued by the command: it knows no caller."""

_SUFFIX: Final = ".pem"
_LIMIT_BYTES: Final = 64 << 10


def folder_of(authority_dir: Path) -> Path:
    """Return the folder of what the authority has issued, made at the first call.

    Raises:
        OSError: It cannot be made.
    """
    folder = authority_dir / "issued"
    if not folder.is_dir():
        folder.mkdir(exist_ok=True)
        # Whoever issues need not be the user that the gateway runs as; the authority's folder around it is private.
        folder.chmod(0o755)
    return folder


def write(authority_dir: Path, certificate: Certificate) -> Path:
    """Write a certificate durably; nobody ever sees half of it.

    Raises:
        OSError: It cannot be written; then it must not be handed out.
    """
    folder = folder_of(authority_dir)
    path = folder / f"{certificate.serial}{_SUFFIX}"
    durable.write(path, certificate.pem, mode=0o644)
    return path


class IssuedFolder:
    """Takes certificates from the folder into the gateway's store.

    Args:
        authority_dir: The authority's folder.
        certificates: Take them.
    """

    def __init__(self, authority_dir: Path, certificates: Certificates) -> None:
        self._folder = authority_dir / "issued"
        self._certificates = certificates
        self._seen: dict[str, tuple[int, int]] = {}
        self._said: dict[str, str] = {}

    async def run(self) -> None:
        """Look every second, until cancelled."""
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            await self.look()

    async def look(self) -> int:
        """Take what is new; what cannot be used is logged once and never keeps the rest out.

        Returns:
            How many certificates are new to the store.
        """
        count = 0
        for path, version in await asyncio.to_thread(self._unseen):
            try:
                pem = await asyncio.to_thread(_read, path)
                count += await self._certificates.adopt(pem, PRINCIPAL)
            except DocumentInvalid as error:
                # Until the file changes there is nothing to be had from it.
                self._say(path.name, error.message)
            except (OSError, VirtfleetError) as error:
                # It may work next time: the disk is full, the file not ours yet.
                self._say(path.name, str(error))
                continue
            self._seen[path.name] = version
        return count

    def _unseen(self) -> list[tuple[Path, tuple[int, int]]]:
        found: list[tuple[Path, tuple[int, int]]] = []
        try:
            with os.scandir(self._folder) as entries:
                for entry in entries:
                    if entry.name.startswith(".") or not entry.name.endswith(_SUFFIX):
                        continue
                    try:
                        status = entry.stat()
                    except OSError as error:
                        # A link to nothing, or a file that went away under the look.
                        self._say(entry.name, str(error))
                        continue
                    version = status.st_mtime_ns, status.st_size
                    if self._seen.get(entry.name) != version:
                        found.append((self._folder / entry.name, version))
        except FileNotFoundError:
            # Nothing has been issued by the command, or a file went away under the look: the next one is a second off.
            return found
        except OSError as error:
            self._say("", str(error))
        return found

    def _say(self, name: str, text: str) -> None:
        if self._said.get(name) != text:
            self._said[name] = text
            _log.error("a certificate that was issued by command cannot be entered", extra={"file": name, "why": text})


def _read(path: Path) -> bytes:
    with path.open("rb") as file:
        pem = file.read(_LIMIT_BYTES + 1)
    if len(pem) > _LIMIT_BYTES:
        raise DocumentInvalid(f"{path.name} is too large for a certificate", limit_bytes=_LIMIT_BYTES)
    return pem
