"""Boot sectors for guests that do one thing as soon as the BIOS lets them: it takes a tenth of a Linux boot."""

from __future__ import annotations

import struct
from pathlib import Path

from virtfleet.compute.v1 import domain_spec_pb2

PM1_CONTROL = 0x604
SLEEP_ENABLE = 0x2000
RESET_CONTROL = 0xCF9
PANIC_PORT = 0x505
SERIAL_PORT = 0x3F8

HALT = b"\xfa\xf4\xeb\xfd"


def out_byte(port: int, value: int) -> bytes:
    """mov dx, port; mov al, value; out dx, al."""
    return b"\xba" + struct.pack("<H", port) + b"\xb0" + bytes((value,)) + b"\xee"


def out_word(port: int, value: int) -> bytes:
    """mov dx, port; mov ax, value; out dx, ax."""
    return b"\xba" + struct.pack("<H", port) + b"\xb8" + struct.pack("<H", value) + b"\xef"


def say(text: str) -> bytes:
    return b"".join(out_byte(SERIAL_PORT, byte) for byte in text.encode())


POWER_OFF = out_word(PM1_CONTROL, SLEEP_ENABLE) + HALT
RESET = out_byte(RESET_CONTROL, 2) + out_byte(RESET_CONTROL, 6) + HALT
PANIC = out_byte(PANIC_PORT, 1) + HALT
# mov ah, 3; int 0x13 with one sector at CHS 0/0/2 from this one, again and again.
WRITE = b"\xb8\x01\x03\xb9\x02\x00\xba\x80\x00\xbb\x00\x7c\x31\xdb\xbb\x00\x7c\xcd\x13\xeb\xed"


def write_disk(path: Path, code: bytes, *, once: bytes = b"") -> None:
    """Write a raw disk that boots code; `once` runs only before the first reset (a byte of the CMOS remembers)."""
    if once:
        # mov al, 0x3f; out 0x70, al; in al, 0x71; cmp al, 0xa5; je over; mov ...; out; once; over:
        mark = b"\xb0\x3f\xe6\x70\xb0\xa5\xe6\x71" + once
        code = b"\xb0\x3f\xe6\x70\xe4\x71\x3c\xa5\x0f\x84" + struct.pack("<H", len(mark)) + mark + code
    assert len(code) <= 510
    path.write_bytes(code.ljust(510, b"\0") + b"\x55\xaa" + bytes(2048 * 512 - 512))
    path.chmod(0o666)


def spec() -> domain_spec_pb2.DomainSpec:
    made = domain_spec_pb2.DomainSpec()
    made.memory.maximum_bytes = 16 * 1024 * 1024
    made.disks["root"].volume = "pools/p/volumes/root"
    made.serials["tty"].SetInParent()
    return made
