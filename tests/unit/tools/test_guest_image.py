"""Where the guest's kernel is looked for."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools import guest_image


def kernel(root: Path, version: str, modules: str) -> None:
    """Lay out a kernel as a package unpacks it."""
    (root / "boot").mkdir(parents=True, exist_ok=True)
    (root / "boot" / f"vmlinuz-{version}").touch()
    (root / modules / version / "kernel").mkdir(parents=True)


@pytest.mark.parametrize("modules", ["lib/modules", "usr/lib/modules"])
def test_modules_are_found_on_both_sides_of_usr(tmp_path: Path, modules: str) -> None:
    kernel(tmp_path, "6.12.9+deb13-cloud-amd64", modules)
    found = guest_image.find_kernel((tmp_path,))
    assert found == (
        tmp_path / "boot/vmlinuz-6.12.9+deb13-cloud-amd64",
        tmp_path / modules / "6.12.9+deb13-cloud-amd64",
    )


def test_the_newest_cloud_kernel_wins(tmp_path: Path) -> None:
    for version in ("6.1.9-cloud-amd64", "6.1.10-cloud-amd64", "6.12.1-amd64"):
        kernel(tmp_path, version, "lib/modules")
    assert guest_image.find_kernel((tmp_path,))[0].name == "vmlinuz-6.1.10-cloud-amd64"


def test_a_kernel_without_modules_is_none(tmp_path: Path) -> None:
    (tmp_path / "boot").mkdir()
    (tmp_path / "boot/vmlinuz-6.1.0-cloud-amd64").touch()
    with pytest.raises(guest_image.GuestImageError, match="make system"):
        guest_image.find_kernel((tmp_path,))
