"""Places in the repository, for the tools; standard library only."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
"""The root of the working tree."""

BUILD = ROOT / "build"
"""Build products; never committed."""

FETCHED_KERNEL = BUILD / "kernel"
"""A cloud kernel of the distribution, unpacked but not installed, where /boot has none."""

PROTOS = ROOT / "protos"
"""The `.proto` files, and what is generated from them under `gen/`."""

IMPORT_ROOTS = (
    "protos/gen/python",
    "services/common",
    "services/launcher",
    "services/compute",
    "services/storage",
    "services/network",
    "services/node",
    "gateway",
    "clients/python",
    "clients/cli",
    "fake",
)
"""Folders of the tree that hold import packages; each is one distribution."""
