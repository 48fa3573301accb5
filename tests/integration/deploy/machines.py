"""Machines of one kernel: each with namespaces of its own for mounts, processes, links and control groups.

A machine sees the whole file system, and writes to a layer of its own that is gone with it. Its first process is systemd,
or a shell where it is only there to be written to; all that runs on it ends with that. Two machines are joined by a veth
pair.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from tools.paths import ROOT

INIT = "/lib/systemd/systemd"
_BOOT_SECONDS = 60.0

# `bind` of the tree: it may lie on another file system, whose content a layer over the root does not show.
# /sys is read-only for systemd: then it leaves devices alone. What this system starts by itself is none of a machine's.
_MACHINE = r"""
set -eu
layer=$1 lower=$2 tree=$3 first=$4
mkdir -p "$layer/upper" "$layer/work" "$layer/root"
mount -t overlay overlay -o "lowerdir=$lower,upperdir=$layer/upper,workdir=$layer/work" "$layer/root"
root=$layer/root
rm -rf "$root"/etc/systemd/system/*.wants
: > "$root/etc/fstab"
mount -t proc proc "$root/proc"
mount -t sysfs -o ro sysfs "$root/sys"
mount -t cgroup2 cgroup2 "$root/sys/fs/cgroup"
mount -t tmpfs tmpfs "$root/run"
mount -t tmpfs tmpfs "$root/tmp"
mkdir -p "$root$tree"
mount --bind "$tree" "$root$tree"
mount -t overlay overlay -o "lowerdir=$tree,upperdir=$layer/tree,workdir=$layer/tree-work" "$root$tree"
mount -t tmpfs -o mode=755 tmpfs "$root/dev"
mkdir "$root/dev/net" "$root/dev/pts" "$root/dev/shm"
for device in null zero full random urandom tty net/tun kvm; do
    [ -e "/dev/$device" ] || continue
    : > "$root/dev/$device"
    mount --bind "/dev/$device" "$root/dev/$device"
done
mount -t devpts -o newinstance,ptmxmode=0666 devpts "$root/dev/pts"
mount -t tmpfs -o mode=1777 tmpfs "$root/dev/shm"
ln -s pts/ptmx "$root/dev/ptmx"
ln -s /proc/self/fd "$root/dev/fd"
ip link set lo up
cd "$root"
pivot_root . mnt
umount --lazy mnt
echo ready
if [ "$first" = shell ]; then
    # The first process of a machine takes in whose parents have ended.
    exec /bin/bash -c 'while :; do sleep 3600 & wait $!; done'
fi
exec env --ignore-environment container=lxc PATH=/usr/sbin:/usr/bin:/sbin:/bin "$first" --unit=basic.target \
    < /dev/null > /dev/null 2>&1
"""


class Machine:
    """Is one machine.

    Args:
        name: For messages.
        process: Holds the namespaces; ends all with its own end.
        pid: The machine's first process, as seen from here.
    """

    def __init__(self, name: str, process: subprocess.Popen[str], pid: int) -> None:
        self.name = name
        self.process = process
        self.pid = pid

    def run(
        self, script: str, folder: str | Path = "/", variables: Mapping[str, str] | None = None, *, online: bool = False
    ) -> str:
        """Run a script in a shell of the machine; returns what it wrote.

        Args:
            script: What to run.
            folder: Where.
            variables: Beside those of this process.
            online: With this process's network instead of the machine's own.

        Raises:
            AssertionError: A line failed.
        """
        enter = ["nsenter", f"--target={self.pid}", "--mount", "--pid", "--cgroup", *([] if online else ["--net"])]
        done = subprocess.run(
            [*enter, "/bin/bash", "-euo", "pipefail", "-c", f"cd {shlex.quote(str(folder))}\n{script}"],
            env={**os.environ, **(variables or {})},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=200,
            check=False,
        )
        if done.returncode:
            journal = subprocess.run(
                [*enter, "journalctl", "--no-pager", "--lines=60", "--unit=virtfleet*"],
                capture_output=True, text=True, check=False,
            )  # fmt: skip
            raise AssertionError(f"{self.name}: {script}\n---\n{done.stdout[-4000:]}\n---\n{journal.stdout}")
        return done.stdout

    def wait_until_booted(self) -> None:
        """Wait until systemd has started what it starts.

        Raises:
            AssertionError: It does not end with that.
        """
        ends_at = time.monotonic() + _BOOT_SECONDS
        while (state := self.run("systemctl is-system-running 2>&1 || true").strip()) not in ("running", "degraded"):
            assert time.monotonic() < ends_at, f"{self.name}: {state}"
            time.sleep(0.1)

    def end(self) -> None:
        """End the machine and all that runs on it."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()


class Site:
    """Makes machines, and a layer of files below them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._tag = f"vfdoc-{os.getpid()}"
        self._groups = next(
            (
                path
                for path in (Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/unified"))
                if (path / "cgroup.procs").exists()
            ),
            None,
        )
        self._holder = subprocess.Popen(["unshare", "--mount", "sleep", "infinity"])
        self._machines: list[Machine] = []

    def _enter(self) -> list[str]:
        return ["nsenter", f"--target={self._holder.pid}", "--mount"]

    def open(self) -> None:
        """Mount the memory that all layers are in."""
        # The name of the namespace is the holder's only once it has its own.
        theirs, ours = Path(f"/proc/{self._holder.pid}/ns/mnt"), Path("/proc/self/ns/mnt")
        while theirs.readlink() == ours.readlink():
            time.sleep(0.01)
        subprocess.run([*self._enter(), "mount", "-t", "tmpfs", "layers", str(self._folder)], check=True)

    def image(self, name: str) -> Machine:
        """Start a machine that only makes the files that others begin with."""
        return self._start(name, "/", "shell")

    def machine(self, name: str, below: str) -> Machine:
        """Boot a machine.

        Args:
            name: Its name.
            below: The machine that has made the files it begins with, and has ended.
        """
        made = self._start(name, f"{self._folder / below / 'upper'}:/", INIT)
        made.wait_until_booted()
        return made

    def _start(self, name: str, lower: str, first: str) -> Machine:
        layer = self._folder / name
        group = self._groups / self._tag / name if self._groups else None
        if group is not None:
            group.mkdir(parents=True)
        subprocess.run([*self._enter(), "mkdir", "-p", str(layer / "tree"), str(layer / "tree-work")], check=True)
        move = f'echo 0 > "{group}/cgroup.procs"' if group is not None else ":"
        unshare = ["unshare", "--mount", "--net", "--uts", "--cgroup", "--pid", "--fork", "--kill-child"]
        process = subprocess.Popen(
            [
                *self._enter(),
                *("bash", "-c", f'{move}; exec "$@"', "bash", *unshare),
                *("bash", "-c", _MACHINE, "bash", str(layer), lower, str(ROOT), first),
            ],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n", name
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        made = Machine(name, process, int(children[0]))
        self._machines.append(made)
        return made

    def join(self, one: Machine, one_address: str, other: Machine, other_address: str) -> None:
        """Join two machines by a link of their own."""
        names = (f"{self._tag}a"[-15:], f"{self._tag}b"[-15:])
        subprocess.run(["ip", "link", "add", names[0], "type", "veth", "peer", "name", names[1]], check=True)
        for link, machine, address in zip(names, (one, other), (one_address, other_address), strict=True):
            subprocess.run(["ip", "link", "set", link, "netns", str(machine.pid)], check=True)
            machine.run(f"ip link set {link} name eth0; ip addr add {address} dev eth0; ip link set eth0 up")

    def close(self) -> None:
        """End all machines and take away what they had."""
        for machine in self._machines:
            machine.end()
        self._holder.kill()
        self._holder.wait()
        if self._groups:
            _remove_groups(self._groups / self._tag)


def _remove_groups(tree: Path) -> None:
    """Remove control groups; one stays busy until the kernel has buried its last process."""
    ends_at = time.monotonic() + 10
    for path in (*sorted((path for path in tree.rglob("*") if path.is_dir()), reverse=True), tree):
        while True:
            try:
                path.rmdir()
            except FileNotFoundError:
                break
            except OSError:
                if time.monotonic() > ends_at:
                    raise
                time.sleep(0.05)
            else:
                break


@contextmanager
def site(folder: Path) -> Iterator[Site]:
    """Yield what makes machines; all of them are gone afterwards."""
    assert shutil.which("nsenter"), "util-linux is missing"
    made = Site(folder)
    try:
        made.open()
        yield made
    finally:
        made.close()
