"""The machine and the versions that a run was made with, read from the kernel and from the packages."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
from pathlib import Path

from tools.paths import ROOT

PACKAGES = ("grpcio", "protobuf", "protovalidate", "uvloop", "qemu.qmp", "pyroute2")


def facts() -> dict[str, str | int | float]:
    """Return what of the machine bears on the figures."""
    memory = next(
        int(line.split()[1]) for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemTotal")
    )
    models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "cpu_count": len(os.sched_getaffinity(0)),
        "cpu_model": models[0].partition(":")[2].strip() if models else platform.machine(),
        "memory_mib": memory >> 10,
        "kernel": platform.release(),
        "system": _distribution(),
        "load_before": os.getloadavg()[0],
    }


def versions() -> dict[str, str]:
    """Return the versions of what is measured and of what it stands on."""
    found = {"python": platform.python_version()}
    found |= {name: importlib.metadata.version(name) for name in PACKAGES}
    qemu = shutil.which("qemu-system-x86_64") or shutil.which("qemu-system-aarch64")
    if qemu:
        found["qemu"] = _output(qemu, "--version").splitlines()[0].removeprefix("QEMU emulator version ")
    found["virtfleet"] = _revision()
    return found


def _distribution() -> str:
    lines = dict(line.split("=", 1) for line in Path("/etc/os-release").read_text().splitlines() if "=" in line)
    return lines.get("PRETTY_NAME", "unknown").strip('"')


def _revision() -> str:
    """Return the commit, with a mark where other code was measured; the pages that runs write are none."""
    git = ("git", "-C", str(ROOT))
    commit = _output(*git, "describe", "--always").strip()
    changed = _output(*git, "status", "--porcelain", "--untracked-files=no", "--", ".", ":(exclude)docs")
    return f"{commit}-dirty" if commit and changed else commit or "unknown"


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=30).stdout


def cpu_seconds(pid: int) -> float:
    """Return the processor time that a process has used, its threads included."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def private_mib(pid: int) -> float:
    """Return the memory that a process shares with no other."""
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in rollup if line.startswith("Private_")) / 1024
