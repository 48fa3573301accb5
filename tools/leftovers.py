"""What a fleet has left on the machine, read from the kernel and not from the fleet."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from tools import devnet


@dataclass(frozen=True, slots=True)
class Leftovers:
    """Names everything that is still there.

    Attributes:
        processes: Processes that run in one of the fleet's namespaces or name its folder, as `pid command`.
        links: Links in the caller's namespace.
        namespaces: Network namespaces.
        mounts: Mounts on or below the fleet's folder, and of its namespaces.
        cgroups: Control groups.
        files: Files and folders.
    """

    processes: tuple[str, ...]
    links: tuple[str, ...]
    namespaces: tuple[str, ...]
    mounts: tuple[str, ...]
    cgroups: tuple[str, ...]
    files: tuple[str, ...]

    def __bool__(self) -> bool:
        return any((self.processes, self.links, self.namespaces, self.mounts, self.cgroups, self.files))

    def counts(self) -> str:
        """Return the counts as one line for people."""
        return (
            f"{len(self.processes)} processes, {len(self.links)} links, {len(self.namespaces)} namespaces, "
            f"{len(self.mounts)} mounts, {len(self.cgroups)} control groups and {len(self.files)} files are left"
        )


def look(tag: str, folder: Path, namespace_inodes: frozenset[int], cgroup_parent: Path | None) -> Leftovers:
    """Look for what is left of a fleet.

    Args:
        tag: The fleet's tag, which stands in every name that it makes.
        folder: Where it keeps everything.
        namespace_inodes: The inodes that its network namespaces had: processes are recognised by them even when the
            name is gone.
        cgroup_parent: Below which its guests had their control groups.
    """
    prefixes = (f"virtfleet-{tag}-", f"vf{tag}n")
    mounts = []
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        place = line.split()[4]
        if place.startswith(str(folder)) or f"virtfleet-{tag}-" in place:
            mounts.append(place)
    cgroups = []
    if cgroup_parent is not None and cgroup_parent.is_dir():
        cgroups = [str(path) for path in cgroup_parent.rglob("*") if path.is_dir()] + [str(cgroup_parent)]
    return Leftovers(
        processes=tuple(_processes(folder, namespace_inodes)),
        links=tuple(sorted(link for link in devnet.links() if link.startswith(prefixes))),
        namespaces=tuple(sorted(name for name in devnet.namespaces() if name.startswith(prefixes))),
        mounts=tuple(mounts),
        cgroups=tuple(cgroups),
        files=tuple(str(path) for path in sorted(folder.rglob("*"))) + ((str(folder),) if folder.exists() else ()),
    )


def _processes(folder: Path, namespace_inodes: frozenset[int]) -> list[str]:
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
            inode = (entry / "ns/net").stat().st_ino
            # The folder of this very program's children (a shell that redirects into it) counts too: nothing is
            # excused.
            if inode in namespace_inodes or str(folder) in command:
                found.append(f"{entry.name} {command[:200]}")
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue  # it ended while we looked, or is another user's and so not ours
    return sorted(found)
