"""What things of a guest are called at QEMU and at the launcher: functions of the device id, so they are found again.

QEMU's node names have at most 31 characters, the launcher's names 32; device ids may be longer than what is left beside
a prefix. Such a one is cut and completed by a digest. No device id has an underscore, so the two kinds never meet.
"""

from __future__ import annotations

import hashlib

GUEST_PREFIX = "qemu-"
"""Tells this driver's processes at the launcher from those of other drivers."""

MONITOR_SOCKET = "qmp"

_SHORT_LENGTH = 22


def guest(uid: str) -> str:
    """Return the launcher's name of a domain's process."""
    return GUEST_PREFIX + uid


def uid_of(guest_name: str) -> str | None:
    """Return the uid of the domain of a process; None: it is none of ours."""
    return guest_name.removeprefix(GUEST_PREFIX) if guest_name.startswith(GUEST_PREFIX) else None


def short(device_id: str) -> str:
    """Return a device id, or what stands for it where there is little room."""
    if len(device_id) <= _SHORT_LENGTH:
        return device_id
    return f"{device_id[:13]}_{hashlib.sha256(device_id.encode()).hexdigest()[:8]}"


def console(device_id: str) -> str:
    """Return the name of a serial or console port's socket."""
    return f"c.{short(device_id)}"


def tap(device_id: str) -> str:
    """Return the name of a network card's descriptor."""
    return f"t.{short(device_id)}"


def format_node(device_id: str, depth: int = 0) -> str:
    """Return the block node that reads the format of the image at that depth of the backing chain."""
    return f"f.{short(device_id)}" + (f".{depth}" if depth else "")


def file_node(device_id: str, depth: int = 0) -> str:
    """Return the block node that reads the file of the image at that depth of the backing chain."""
    return f"p.{short(device_id)}" + (f".{depth}" if depth else "")


def disk(device_id: str) -> str:
    """Return QEMU's id of a disk's device."""
    return f"disk.{device_id}"


def backend(device_id: str, *, virtio: bool) -> str:
    """Return the QOM path of what holds a disk's image: the disk itself, on virtio its inner half."""
    return f"/machine/peripheral/{disk(device_id)}" + ("/virtio-backend" if virtio else "")


def interface(device_id: str) -> str:
    """Return QEMU's id of a card's device."""
    return f"net.{device_id}"


def balloon(device_id: str) -> str:
    """Return QEMU's id of a balloon."""
    return f"balloon.{device_id}"


def disk_id(qdev: str) -> str:
    """Return the device id of what QEMU calls `disk.…`, or `/machine/peripheral/disk.…/virtio-backend`; empty: none."""
    for part in qdev.split("/"):
        if part.startswith("disk."):
            return part.removeprefix("disk.")
    return ""
