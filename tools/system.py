"""Install the distribution packages that the product uses: `python3 -m tools.system`.

With `--tests` those that only its tests use, too. As root, or where `sudo -n` works, what is missing is installed with
apt; else one message names it. Does nothing, quickly, when all is there. Standard library only.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tools.paths import FETCHED_KERNEL

SEARCH_PATH = os.pathsep.join((os.environ.get("PATH", ""), "/usr/local/sbin", "/usr/sbin", "/sbin", "/usr/bin", "/bin"))


@dataclass(frozen=True)
class Need:
    """One package and how to see, without asking dpkg, that what we use of it is there."""

    package: str
    program: str = ""
    files: str = ""
    java: int = 0
    """The oldest release of Java that will do."""

    def present(self) -> bool:
        """Tell whether it is installed."""
        if self.program and shutil.which(self.program, path=SEARCH_PATH) is None:
            return False
        if self.java and java_release() < self.java:
            return False
        return not self.files or any(Path("/").glob(self.files))


OLDEST_JAVA = 17
_SSH_SERVER = "openssh-server"


def java_release() -> int:
    """Return the release of the compiler that Maven would use: 17; 0 where there is none."""
    home = os.environ.get("JAVA_HOME")
    compiler = shutil.which("javac", path=f"{home}/bin" if home else SEARCH_PATH)
    if compiler is None:
        return 0
    said = subprocess.run([compiler, "-version"], capture_output=True, text=True, check=False)
    # Until release 8 it called itself 1.8, and said so on the other stream.
    found = re.search(r"javac (?:1\.)?(\d+)", said.stdout + said.stderr)
    return int(found[1]) if found else 0


_QEMU = {
    "x86_64": Need("qemu-system-x86", program="qemu-system-x86_64"),
    "aarch64": Need("qemu-system-arm", program="qemu-system-aarch64"),
}


def needs(*, tests: bool = False) -> list[Need]:
    """List what this machine should have: for fleets and demos, and for the tests besides."""
    product = [
        _QEMU.get(platform.machine(), _QEMU["x86_64"]),
        Need("qemu-utils", program="qemu-img"),
        Need("dnsmasq-base", program="dnsmasq"),
        Need("nftables", program="nft"),
        Need("iproute2", program="ip"),
        Need("busybox-static", files="var/lib/dpkg/info/busybox-static.list"),
        Need("lz4", program="lz4"),
        Need("zstd", program="zstd"),
    ]
    return [*product, *_needs_of_tests()] if tests else product


def _needs_of_tests() -> list[Need]:
    return [
        # For the recorder of tests/endurance, which is loaded into a service.
        Need("gcc", program="cc"),
        Need("libc6-dev", files="usr/include/stdio.h"),
        # For the stubs of other languages and the programs that use them: tests/clients/languages.
        Need("protobuf-compiler-grpc", program="grpc_ruby_plugin"),
        Need("protobuf-compiler-grpc-java-plugin", program="grpc_java_plugin"),
        Need("ruby-grpc", files="usr/lib/*/rubygems-integration/*/gems/grpc-*/src/ruby/lib/grpc/grpc_c.so"),
        Need("php-cli", program="php"),
        Need("php-curl", files="usr/lib/php/*/curl.so"),
        Need("php-google-protobuf", files="usr/share/php/Google/Protobuf/Internal/Message.php"),
        Need("nodejs", program="node"),
        Need("npm", program="npm"),
        Need("g++", program="g++"),
        Need("pkg-config", program="pkg-config"),
        Need("libgrpc++-dev", files="usr/include/grpcpp/grpcpp.h"),
        Need("libprotobuf-dev", files="usr/include/google/protobuf/message.h"),
        # For the tests of fleets behind ssh; they start it themselves.
        Need(_SSH_SERVER, program="sshd"),
        Need("openssh-client", program="ssh"),
        # For the environments of docs/operations.md, with the distribution's own Python.
        Need("python3-venv", files="usr/lib/python3*/ensurepip"),
        # For `systemd-analyze verify` of our units, and to boot machines that start them. It does not become the init.
        Need("systemd", program="systemd-analyze"),
        Need("mount", program="mount"),
        # For disks that are full or hang.
        Need("e2fsprogs", program="mkfs.ext4"),
        # For the Java client, which is built and tested from nothing.
        Need("default-jdk-headless", java=OLDEST_JAVA),
        Need("maven", program="mvn"),
    ]


def _as_root(command: list[str]) -> list[str] | None:
    """Return the command in a form that runs as root without a question, or nothing."""
    if os.geteuid() == 0:
        return command
    sudo = shutil.which("sudo")
    if sudo and subprocess.run([sudo, "-n", "true"], capture_output=True, check=False).returncode == 0:
        return [sudo, "-n", *command]
    return None


def _apt(*arguments: str, quiet: bool = False) -> bool:
    command = _as_root(["env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "--quiet=2", *arguments])
    if command is None:
        return False
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode and not quiet:
        sys.stderr.write(done.stdout[-2000:] + done.stderr[-2000:])
    return done.returncode == 0


def install(missing: list[Need]) -> bool:
    """Install packages; True if all of them are usable afterwards."""
    packages = [need.package for need in missing]
    print(f"installing {' '.join(packages)}")
    if _SSH_SERVER in packages and Path("/run/systemd/system").exists():
        # The package would open a server to the world; the tests start one of their own on loopback.
        masking = _as_root(["systemctl", "mask", "--quiet", "ssh.service", "ssh.socket"])
        if masking is None or subprocess.run(masking, check=False).returncode:
            return False
        print(f"the service of {_SSH_SERVER} is masked: `systemctl unmask ssh.service ssh.socket` if you want it")
    options = ["--yes", "--no-install-recommends"]
    options += ["-o", "Dpkg::Options::=--force-confold", "-o", "DPkg::Lock::Timeout=120"]
    # Lists that are fresh enough save the longest part; none, or old ones, are no failure yet.
    fresh = _apt("install", *options, *packages, quiet=True)
    if not fresh and not (_apt("update") and _apt("install", *options, *packages)):
        return False
    absent = [need.package for need in missing if not need.present()]
    if absent:
        print(f"system: installed, but still not usable: {' '.join(absent)}", file=sys.stderr)
    return not absent


def kernel_package() -> str:
    """Return the distribution's package that names its newest kernel for virtual machines."""
    try:
        distribution = platform.freedesktop_os_release().get("ID", "")
    except OSError:
        distribution = ""
    if distribution == "ubuntu":
        return "linux-image-virtual"
    return {"aarch64": "linux-image-cloud-arm64"}.get(platform.machine(), "linux-image-cloud-amd64")


def _kernel_files(package: str) -> list[str]:
    """Resolve the name of the newest kernel to the packages that hold it and its modules."""
    found: list[str] = []
    waiting = [package]
    while waiting:
        listing = ["apt-cache", "depends", "--no-recommends", "--no-suggests", waiting.pop()]
        done = subprocess.run(listing, capture_output=True, text=True, check=False)
        for name in re.findall(r"Depends: (linux-(?:image|modules)-\d\S+)", done.stdout):
            if name not in found:
                found.append(name)
                waiting.append(name)
    return found


def fetch_kernel(target: Path = FETCHED_KERNEL) -> bool:
    """Unpack the distribution's kernel for virtual machines into a folder; needs no privilege.

    Installing it would add it to this machine's boot loader, perhaps as the first choice, and it has no drivers for
    real hardware.
    """
    package = kernel_package()
    names = _kernel_files(package)
    if not names and _apt("update"):
        names = _kernel_files(package)
    print(f"fetching {' '.join(names) or package}")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as work:
        # apt changes to a user of its own, which must be able to write here; else it warns and goes on as root.
        download = ["apt-get", "--quiet=2", "-o", "APT::Sandbox::User=root", "download", *names]
        fetched = bool(names) and subprocess.run(download, cwd=work, check=False).returncode == 0
        tree = Path(work) / "tree"
        for archive in sorted(Path(work).glob("*.deb")):
            subprocess.run(["dpkg-deb", "--extract", archive, tree], check=True)
        if not fetched or not any(tree.glob("boot/vmlinuz-*")):
            print(
                f"system: no kernel for guests: apt-get install {package}, or make its list known to apt",
                file=sys.stderr,
            )
            return False
        shutil.rmtree(target, ignore_errors=True)
        tree.rename(target)
    return True


def main() -> int:
    """Install what is missing; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tools.system")
    parser.add_argument("--tests", action="store_true", help="also what only the tests need")
    missing = [need for need in needs(tests=parser.parse_args().tests) if not need.present()]
    has_kernel = any(Path("/boot").glob("vmlinuz-*cloud*")) or any(FETCHED_KERNEL.glob("boot/vmlinuz-*"))
    able = shutil.which("apt-get", path=SEARCH_PATH) is not None and _as_root([]) is not None
    if missing and not (able and install(missing)):
        names = [need.package for need in missing]
        packages = " ".join(names if has_kernel else [*names, kernel_package()])
        print(f"system: packages are missing: apt-get install --no-install-recommends {packages}", file=sys.stderr)
        return 1
    return 0 if has_kernel or fetch_kernel() else 1


if __name__ == "__main__":
    sys.exit(main())
