"""Make the small guest that demo, tests and benchmark boot, out of the distribution's cloud kernel and busybox.

    from tools import guest_image
    image = guest_image.make()          # cached below build/guest
    image.kernel, image.initrd          # paths of files
    guest_image.command_line(nonce)     # kernel arguments that boot it in about 2 s without KVM
    guest_image.console_line(nonce, mac, address)   # what the guest must print

`python -m tools.guest_image` prints the two paths. `tools/guest_init.py` says what the guest does.
"""

from __future__ import annotations

import gzip
import hashlib
import lzma
import os
import platform
import shutil
import struct
import subprocess
import sys
import tempfile
import zlib
from dataclasses import dataclass
from pathlib import Path

from tools import guest_init
from tools.cpio import Archive
from tools.paths import BUILD, FETCHED_KERNEL

CACHE = BUILD / "guest"

# Arguments found by measurement: they halve the boot under emulation.
_FAST_BOOT = (
    "console=ttyS0 quiet nokaslr mitigations=off lpj=5000000 tsc=reliable no_timer_check cryptomgr.notests "
    "random.trust_cpu=on pci=lastbus=0 audit=0 selinux=0 apparmor=0"
)
_PREFIX = "VIRTFLEET "
_MODULES = ("lib/modules", "usr/lib/modules")
_DECOMPRESSORS = {
    b"\x02\x21\x4c\x18": ("lz4", "-dc"),
    b"\x28\xb5\x2f\xfd": ("zstd", "-dc"),
}
_FOLDERS = ("bin", "dev", "etc", "etc/acpi", "etc/acpi/PWRF", "lib", "lib/modules", "proc", "run", "sbin", "sys", "tmp")


class GuestImageError(Exception):
    """The image cannot be made; the text says what is missing."""


@dataclass(frozen=True)
class GuestImage:
    """A kernel and the initial file system that goes with it."""

    kernel: Path
    initrd: Path
    kernel_version: str


def command_line(nonce: str, *extra: str) -> str:
    """Return the kernel arguments for a quick boot with the nonce that the guest answers with."""
    return " ".join((_FAST_BOOT, f"virtfleet.nonce={nonce}", *extra))


def console_line(nonce: str, mac: str, address: str) -> str:
    """Return the line that the guest prints once it has this address."""
    return _PREFIX + hashlib.sha256(f"{nonce} {mac.lower()} {address}".encode()).hexdigest()


def _decompress(data: bytes) -> bytes:
    if data.startswith(b"\x1f\x8b"):
        return zlib.decompressobj(wbits=31).decompress(data)
    if data.startswith(b"\xfd7zXZ\0"):
        return lzma.LZMADecompressor().decompress(data)
    for magic, command in _DECOMPRESSORS.items():
        if data.startswith(magic):
            if not shutil.which(command[0]):
                raise GuestImageError(f"the kernel is compressed with {command[0]}, which is not installed")
            done = subprocess.run(command, input=data, capture_output=True, check=False)
            if done.returncode:
                raise GuestImageError(f"{command[0]}: {done.stderr.decode(errors='replace').strip()}")
            return done.stdout
    return data


def uncompressed_kernel(image: bytes) -> bytes:
    """Return the ELF kernel inside a bzImage; another kind of kernel is returned as it is.

    The ELF has a PVH entry: QEMU starts it without the decompressor, which takes most of a boot under emulation.

    Raises:
        GuestImageError: the kernel is compressed with a tool that is not installed.
    """
    if image[0x202:0x206] != b"HdrS":
        return image
    setup_sectors = image[0x1F1] or 4
    offset, length = struct.unpack_from("<II", image, 0x248)
    start = (setup_sectors + 1) * 512 + offset
    # The last four bytes are the size of the content.
    return _decompress(image[start : start + length - 4])


def find_kernel(roots: tuple[Path, ...] = (Path("/"), FETCHED_KERNEL)) -> tuple[Path, Path]:
    """Return the newest cloud kernel and the folder of its modules; another Linux kernel where no cloud one is.

    Raises:
        GuestImageError: no readable kernel with modules.
    """
    found = []
    for root in roots:
        for path in root.glob("boot/vmlinuz-*"):
            version = path.name.removeprefix("vmlinuz-")
            # An unpacked package has them where its distribution keeps them: below /usr since Debian 13.
            modules = next((folder for place in _MODULES if (folder := root / place / version).is_dir()), None)
            if modules and (modules / "kernel").is_dir() and os.access(path, os.R_OK):
                numbers = [int(part) if part.isdigit() else 0 for part in version.replace("-", ".").split(".")]
                found.append(("cloud" in version, numbers, path, modules))
    if not found:
        raise GuestImageError("no readable kernel with modules: `make system` fetches one")
    *_, path, modules = max(found)
    return path, modules


def _module(folder: Path, name: str) -> bytes | None:
    spellings = {name, name.replace("_", "-")}
    for path in (folder / "kernel").rglob("*.ko*"):
        if path.name.partition(".")[0] in spellings:
            return _decompress(path.read_bytes())
    return None


def _missing_modules(folder: Path) -> set[str]:
    built_in = (folder / "modules.builtin").read_text().split()
    names = {Path(line).name.partition(".")[0].replace("-", "_") for line in built_in}
    return set(guest_init.MODULES) - names


def _busybox() -> Path:
    for path in map(Path, ("/bin/busybox", "/usr/bin/busybox")):
        # A dynamic one would need the libraries of this machine.
        if path.is_file() and b"/ld-linux" not in path.read_bytes()[:4096]:
            return path
    raise GuestImageError("no static busybox: `make system` installs busybox-static")


def initial_files(busybox: bytes, applets: list[str], modules: dict[str, bytes]) -> bytes:
    """Return the guest's file system as a cpio archive."""
    archive = Archive()
    for name in (
        "bin",
        "dev",
        "etc",
        "etc/acpi",
        "etc/acpi/PWRF",
        "lib",
        "lib/modules",
        "proc",
        "run",
        "sbin",
        "sys",
        "tmp",
    ):
        archive.directory(name)
    archive.character_device("dev/console", 5, 1)
    archive.character_device("dev/null", 1, 3)
    archive.file("bin/busybox", busybox, executable=True)
    archive.link("init", "bin/busybox")
    for applet in applets:
        archive.link(f"bin/{applet}", "busybox")
    archive.file("etc/inittab", guest_init.INITTAB.encode())
    archive.file("etc/rc", guest_init.START.encode(), executable=True)
    archive.file("etc/lease", guest_init.LEASE.encode(), executable=True)
    archive.file("sbin/console", guest_init.CONSOLE.encode(), executable=True)
    archive.file("etc/acpi/PWRF/00000080", guest_init.POWER_BUTTON.encode(), executable=True)
    for name, content in modules.items():
        archive.file(f"lib/modules/{name}.ko", content)
    archive.file("lib/modules/order", "".join(f"{name}\n" for name in modules).encode())
    return archive.content()


def make(cache: Path = CACHE) -> GuestImage:
    """Return the image, made first if the cache has none for this kernel, busybox and set of files.

    Safe to call from several processes: a half-made image is never seen.

    Raises:
        GuestImageError: kernel, modules, busybox or a decompressor is missing.
    """
    kernel, modules_folder = find_kernel()
    version = modules_folder.name
    busybox = _busybox()
    sources = [Path(__file__), Path(guest_init.__file__), kernel, busybox]
    stamps = [f"{path.stat().st_size}.{path.stat().st_mtime_ns}" for path in sources]
    key = hashlib.sha256("\n".join([version, *stamps]).encode()).hexdigest()[:16]
    folder = cache / f"{version}-{key}"
    image = GuestImage(folder / "vmlinux", folder / "initrd.gz", version)
    if folder.exists():
        return image
    cache.mkdir(parents=True, exist_ok=True)
    modules = {}
    needed = _missing_modules(modules_folder)
    for name in guest_init.MODULES:
        if name in needed:
            content = _module(modules_folder, name)
            if content is None:
                raise GuestImageError(f"kernel {version} has no module {name}")
            modules[name] = content
    with tempfile.TemporaryDirectory(dir=cache) as work:
        fresh = Path(work) / "image"
        fresh.mkdir()
        data = kernel.read_bytes()
        (fresh / "vmlinux").write_bytes(uncompressed_kernel(data) if platform.machine() == "x86_64" else data)
        listed = subprocess.run([busybox, "--list"], capture_output=True, text=True, check=True).stdout.split()
        applets = [applet for applet in listed if applet != "busybox"]
        files = initial_files(busybox.read_bytes(), applets, modules)
        (fresh / "initrd.gz").write_bytes(gzip.compress(files, compresslevel=6, mtime=0))
        try:
            fresh.rename(folder)
        except OSError:
            # Another process was first, with the same content.
            if not folder.exists():
                raise
    return image


def main() -> int:
    """Print where the image is; returns the exit code."""
    try:
        image = make()
    except GuestImageError as error:
        print(f"guest image: {error}", file=sys.stderr)
        return 1
    print(f"{image.kernel}\n{image.initrd}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
