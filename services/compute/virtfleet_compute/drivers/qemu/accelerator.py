"""Whether an accelerator runs guest code: it is given some, for a bounded time.

That `/dev/kvm` opens says little: there are hosts where guests start under it and then have every instruction of their
kernels emulated, a thousand times slower than without. So a guest of our own counts in ring 0 and tells when it is
done. The answer is good for one boot of the host.
"""

from __future__ import annotations

import json
import os
import struct
import time
from pathlib import Path

from virtfleet_compute.drivers.api import AcceleratorReport
from virtfleet_compute.drivers.qemu.probe import Emulator, write_record
from virtfleet_service import process
from virtfleet_service.errors import BackendFailed, OperationTimedOut

KVM_DEVICE = Path("/dev/kvm")

TRIAL_SECONDS = 1.0
"""How long QEMU's start and the counting may take. On hardware that serves it is a tenth of that."""

_BOOT = Path("/proc/sys/kernel/random/boot_id")
_TURNS = 20_000_000
_EXIT_PORT = 0xF4
_EXIT_VALUE = 0x2A
_ROM_BYTES = 65536
_ROM_BASE = 0xF0000


def counting_firmware() -> bytes:
    """Return a BIOS of 64 KiB that enters protected mode, counts `_TURNS` down and ends QEMU with code 85."""
    code_at = 0
    protected_at = 0x40
    table_at = 0x80
    # cli; lgdt cs:[pointer]; mov eax, cr0; or al, 1; mov cr0, eax; jmp 8:protected
    real = b"\xfa" + b"\x66\x2e\x0f\x01\x16" + struct.pack("<H", table_at + 24)
    real += b"\x0f\x20\xc0\x0c\x01\x0f\x22\xc0"
    real += b"\x66\xea" + struct.pack("<IH", _ROM_BASE + protected_at, 8)
    # mov ecx, turns; loop: dec ecx; jnz loop; mov al, value; out port, al; hlt
    protected = b"\xb9" + struct.pack("<I", _TURNS) + b"\x49\x75\xfd"
    protected += bytes((0xB0, _EXIT_VALUE, 0xE6, _EXIT_PORT, 0xF4))
    # Nothing, flat code, flat data; then the pointer to them.
    table = struct.pack("<QQQ", 0, 0x00CF9A000000FFFF, 0x00CF92000000FFFF)
    table += struct.pack("<HI", 23, _ROM_BASE + table_at)
    rom = bytearray(b"\xf4" * _ROM_BYTES)
    rom[code_at : code_at + len(real)] = real
    rom[protected_at : protected_at + len(protected)] = protected
    rom[table_at : table_at + len(table)] = table
    # The reset vector: jmp f000:code.
    rom[0xFFF0:0xFFF5] = b"\xea" + struct.pack("<HH", code_at, 0xF000)
    return bytes(rom)


async def accelerators(emulator: Emulator, state_directory: Path, only: str = "") -> tuple[AcceleratorReport, ...]:
    """Return what drives guests here, the best first. What the settings exclude is not tried."""
    if only == "tcg":
        return (AcceleratorReport("kvm", usable=False, reason="not tried: the settings ask for tcg"), _TCG)
    return (await _kvm(emulator, state_directory), _TCG)


_TCG = AcceleratorReport("tcg", usable=True, reason="QEMU translates guest code")


async def _kvm(emulator: Emulator, state_directory: Path) -> AcceleratorReport:
    obstacle = _obstacle()
    if obstacle:
        return AcceleratorReport("kvm", usable=False, reason=obstacle)
    stamp = [_BOOT.read_text().strip(), emulator.binary, emulator.version]  # noqa: ASYNC240  # no disk behind it
    record = state_directory / "kvm.json"
    kept = _read(record, stamp)
    if kept is not None:
        return kept
    report = await try_out(emulator.binary, "kvm")
    write_record(record, {"stamp": stamp, "usable": report.usable, "reason": report.reason})
    return report


def _obstacle() -> str:
    if not KVM_DEVICE.exists():
        return f"{KVM_DEVICE} does not exist"
    if not os.access(KVM_DEVICE, os.R_OK | os.W_OK):
        return f"{KVM_DEVICE} may not be opened"
    return ""


def _read(record: Path, stamp: list[str]) -> AcceleratorReport | None:
    try:
        value = json.loads(record.read_bytes())
        if value["stamp"] == stamp:
            return AcceleratorReport("kvm", usable=bool(value["usable"]), reason=str(value["reason"]))
    except (OSError, ValueError, KeyError, TypeError):
        # Whatever is wrong with the record: it can be tried again.
        return None
    return None


async def try_out(binary: str, accelerator: str, seconds: float = TRIAL_SECONDS) -> AcceleratorReport:
    """Let an accelerator run the counting guest and report what came of it."""
    # In memory: a full disk must not look like an accelerator that does not work.
    rom = os.memfd_create("counting.rom")
    try:
        os.write(rom, counting_firmware())
        begun = time.monotonic()
        done = await process.run(
            [
                *(binary, "-nodefaults", "-no-user-config", "-display", "none", "-machine", "pc", "-m", "4"),
                *("-accel", accelerator, "-bios", f"/proc/self/fd/{rom}"),
                *("-device", f"isa-debug-exit,iobase={_EXIT_PORT},iosize=1"),
            ],
            timeout_seconds=seconds,
            pass_fds=[rom],
        )
    except OperationTimedOut:
        return AcceleratorReport(
            accelerator,
            usable=False,
            reason=f"a guest that counts to {_TURNS:,} had not done so after {seconds:g} s: "
            "its kernel's instructions are emulated",
        )
    except BackendFailed as error:
        return AcceleratorReport(accelerator, usable=False, reason=str(error))
    finally:
        os.close(rom)
    took = time.monotonic() - begun
    if done.exit_code != _EXIT_VALUE * 2 + 1:
        return AcceleratorReport(
            accelerator, usable=False, reason=f"QEMU ended with code {done.exit_code}: {done.said or 'not a word'}"
        )
    return AcceleratorReport(accelerator, usable=True, reason=f"ran guest code in {took * 1000:.0f} ms")
