"""What a fleet has on its machine: read from `/proc`, `ip`, `nft` and the file system, never from the fleet itself."""

from __future__ import annotations

import json
import re
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.stage import pid_of
from tools import fleet as development

MIB = 1 << 20
LOOKS = 3


@dataclass(frozen=True, slots=True)
class Census:
    """Is what a fleet has at one moment.

    Attributes:
        programs: Its own processes, with their ids: one that was started again in the meantime has forgotten nothing.
        processes: Command lines below its folder or in its namespaces, guests and daemons too, and how often.
        links: The links in each node's namespace, with the bridge that they are on.
        rules: The nft rules in each node's namespace, without their counters.
        files: The names of all files and folders below its folder.
        cgroups: The names of its control groups.
        descriptors: How many descriptors each of its own processes has open, by what they are.
        private_bytes: What each of its own processes has for itself, of memory that no file backs.
    """

    programs: frozenset[tuple[str, int]]
    processes: Counter[str]
    links: frozenset[tuple[str, str, str]]
    rules: tuple[str, ...]
    files: frozenset[str]
    cgroups: frozenset[str]
    descriptors: dict[str, Counter[str]]
    private_bytes: dict[str, int]

    def differences(self, later: Census) -> list[str]:
        """Say what a later census has more or less of, memory aside; empty: the same."""
        found = []
        for what in ("programs", "processes", "links", "rules", "files", "cgroups", "descriptors"):
            before, after = getattr(self, what), getattr(later, what)
            if before != after:
                found.append(f"{what}: {_difference(before, after)}")
        return found


def take(fleet: development.Fleet) -> Census:
    """Count what a fleet has now."""
    programs = {name: pid_of(fleet, name) for name in fleet.supervisor.programs}
    return Census(
        programs=frozenset(programs.items()),
        processes=Counter(_processes(fleet)),
        links=frozenset(_links(fleet)),
        rules=tuple(_rules(fleet)),
        # Logs of bounded size are turned over when they are full, not when something is left.
        files=frozenset(
            str(path.relative_to(fleet.folder)) for path in fleet.folder.rglob("*") if path.name != "log.1"
        ),
        cgroups=frozenset(_cgroups(fleet)),
        descriptors={name: Counter(descriptors(pid)) for name, pid in programs.items()},
        private_bytes={name: private_bytes(pid) for name, pid in programs.items()},
    )


def private_bytes(pid: int) -> int:
    """Return the memory that only one process uses: what is freed if it ends.

    Pages of files that nobody else happens to have mapped are left out: the kernel takes those back when it likes.
    """
    # While it forks to run a tool its pages are the child's too: the largest of a few looks is its own.
    return max(_private_bytes(pid) for _ in range(LOOKS))


def _private_bytes(pid: int) -> int:
    time.sleep(0.02)
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    found = {key: int(value) for key, value in re.findall(r"^(\w+):\s+(\d+) kB$", text, re.MULTILINE)}
    return (found["Private_Dirty"] + found.get("Private_Hugetlb", 0)) * 1024


def descriptors(pid: int) -> Iterator[str]:
    """Return what each descriptor of a process is: a path, or the kind of what has none."""
    for path in Path(f"/proc/{pid}/fd").iterdir():
        try:
            target = str(path.readlink())
        except FileNotFoundError:
            continue  # closed since it was listed
        yield re.sub(r":\[\d+\]$|:\d+$", "", target)


def _processes(fleet: development.Fleet) -> Iterator[str]:
    for line in fleet.leftovers().processes:
        yield line.partition(" ")[2]


def _links(fleet: development.Fleet) -> Iterator[tuple[str, str, str]]:
    for node in fleet.nodes:
        for link in json.loads(_output("ip", "-n", fleet.networks[node].namespace, "-j", "link")):
            yield node, link["ifname"], link.get("master", "")


def _rules(fleet: development.Fleet) -> Iterator[str]:
    for node in fleet.nodes:
        listed = _output("ip", "netns", "exec", fleet.networks[node].namespace, "nft", "-j", "list", "ruleset")
        for rule in json.loads(listed)["nftables"]:
            # Handles count up for ever, and counters count packets.
            yield f"{node} " + re.sub(r'"(handle|packets|bytes)": \d+', r'"\1": 0', json.dumps(rule, sort_keys=True))


def _cgroups(fleet: development.Fleet) -> Iterator[str]:
    parent = fleet.cgroup_parent
    if parent is not None and parent.is_dir():
        for path in parent.rglob("*"):
            if path.is_dir():
                yield str(path.relative_to(parent))


def _output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=30).stdout


def _difference(before: Any, after: Any) -> str:
    if isinstance(before, dict) and not isinstance(before, Counter) and isinstance(after, dict):
        changed = {key: (before.get(key), after.get(key)) for key in before | after}
        return "; ".join(f"{key} {_difference(*pair)}" for key, pair in changed.items() if pair[0] != pair[1])
    first, second = Counter(before), Counter(after)
    return f"more {dict(second - first)}, less {dict(first - second)}"
