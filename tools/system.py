"""Install the distribution packages that the product and its tests use: `python3 -m tools.system`.

As root, or where `sudo -n` works, what is missing is installed with apt; else one message names it. Does nothing,
quickly, when all is there. Standard library only.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

SEARCH_PATH = os.pathsep.join((os.environ.get("PATH", ""), "/usr/local/sbin", "/usr/sbin", "/sbin", "/usr/bin", "/bin"))


@dataclass(frozen=True)
class Need:
    """One package and how to see, without asking dpkg, that what we use of it is there."""

    package: str
    program: str = ""
    files: str = ""

    def present(self) -> bool:
        """Tell whether it is installed."""
        if self.program and shutil.which(self.program, path=SEARCH_PATH) is None:
            return False
        return not self.files or any(Path("/").glob(self.files))


_QEMU = {
    "x86_64": Need("qemu-system-x86", program="qemu-system-x86_64"),
    "aarch64": Need("qemu-system-arm", program="qemu-system-aarch64"),
}


def _cloud_kernel(distribution: str, architecture: str) -> Need:
    if distribution == "ubuntu":
        # Its kernel for virtual machines; there is none with "cloud" in its name.
        return Need("linux-image-virtual", files="lib/modules/*/kernel")
    return Need(f"linux-image-cloud-{architecture}", files="boot/vmlinuz-*cloud*")


def distribution() -> str:
    """Return the distribution's id, in lower case; empty where it does not say."""
    try:
        return platform.freedesktop_os_release().get("ID", "")
    except OSError:
        return ""


def needs() -> list[Need]:
    """List what this machine should have."""
    machine = platform.machine()
    architecture = {"x86_64": "amd64", "aarch64": "arm64"}.get(machine, machine)
    return [
        _QEMU.get(machine, _QEMU["x86_64"]),
        Need("qemu-utils", program="qemu-img"),
        Need("dnsmasq-base", program="dnsmasq"),
        Need("nftables", program="nft"),
        Need("iproute2", program="ip"),
        Need("busybox-static", program="busybox"),
        Need("lz4", program="lz4"),
        Need("zstd", program="zstd"),
        # For `systemd-analyze verify` of our units; installing it does not make it the init.
        Need("systemd", program="systemd-analyze"),
        _cloud_kernel(distribution(), architecture),
    ]


def _as_root(command: list[str]) -> list[str] | None:
    """Return the command in a form that runs as root without a question, or nothing."""
    if os.geteuid() == 0:
        return command
    sudo = shutil.which("sudo")
    if sudo and subprocess.run([sudo, "-n", "true"], capture_output=True, check=False).returncode == 0:
        return [sudo, "-n", *command]
    return None


def _apt(*arguments: str) -> bool:
    command = _as_root(["env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "--quiet=2", *arguments])
    if command is None:
        return False
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.stderr.write(done.stdout[-2000:] + done.stderr[-2000:])
    return done.returncode == 0


def main() -> int:
    """Install what is missing; returns the exit code."""
    missing = [need.package for need in needs() if not need.present()]
    if not missing:
        return 0
    by_hand = f"system: these packages are missing: apt-get install --no-install-recommends {' '.join(missing)}"
    if shutil.which("apt-get", path=SEARCH_PATH) is None or _as_root([]) is None:
        print(by_hand, file=sys.stderr)
        return 1
    print(f"installing {' '.join(missing)}")
    options = (
        "--yes",
        "--no-install-recommends",
        "-o",
        "Dpkg::Options::=--force-confold",
        "-o",
        "DPkg::Lock::Timeout=120",
    )
    # A list that is fresh enough saves the longest part.
    if not _apt("install", *options, *missing) and not (_apt("update") and _apt("install", *options, *missing)):
        print(by_hand, file=sys.stderr)
        return 1
    absent = [need.package for need in needs() if not need.present()]
    if absent:
        print(f"system: installed, but still not usable: {' '.join(absent)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
