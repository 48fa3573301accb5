"""The machines that the driver knows how to furnish: where their PCI slots are, and which are ours to give."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Family:
    """Is a kind of machine in all its versions."""

    alias: str
    prefix: str
    root_bus: str
    has_ide: bool
    """Whether it has the two IDE channels."""
    own_sata: bool
    """Whether it has a SATA controller of its own."""
    options: str
    """What every guest of it gets: no device that nobody asked for, no back door."""


FAMILIES = (
    Family("pc", "pc-i440fx-", "pci.0", True, False, "usb=off,vmport=off,hpet=off,smm=off,dump-guest-core=off"),
    Family("q35", "pc-q35-", "pcie.0", False, True, "usb=off,vmport=off,hpet=off,smm=off,dump-guest-core=off"),
)
"""The first is the default: its devices can be plugged and unplugged without a bridge that had to be there before."""

FREE_SLOTS = range(2, 0x1B)
"""Slots of the root bus for devices of the spec; 0, 1 and 0x1f are the machine's, the others for controllers."""

SCSI_SLOT = 0x1B
SATA_SLOT = 0x1C
SERIAL_SLOT = 0x1D

SATA_PORTS = 6
IDE_UNITS = 4
SCSI_UNITS = 255


def family_of(machine: str) -> Family | None:
    """Return the family of a versioned machine type; None: it is not one that the driver knows."""
    for family in FAMILIES:
        if machine.startswith(family.prefix):
            return family
    return None
