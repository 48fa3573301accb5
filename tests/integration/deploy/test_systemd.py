"""The units are what systemd accepts, and the launcher's gives a guest nothing to inherit."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tools.paths import ROOT

UNITS = ROOT / "deploy/systemd"
SERVICES = sorted(UNITS.glob("*.service"))
# Settings that an operator expects in the launcher's unit. All others a guest would inherit, or they are unknown here.
LAUNCHER_SETTINGS = {
    "Type", "ExecStart", "Restart", "RestartSec", "KillMode", "Delegate", "RuntimeDirectory", "RuntimeDirectoryMode",
    "RuntimeDirectoryPreserve", "OOMPolicy", "TasksMax", "LimitNOFILE", "LimitMEMLOCK",
}  # fmt: skip


def settings(path: Path) -> dict[str, str]:
    lines = path.read_text().replace("\\\n", " ").splitlines()
    return dict(line.split("=", 1) for line in lines if re.match(r"\w+=", line))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root file system with our units, the programs that they name, and the system's own units."""
    folder = tmp_path_factory.mktemp("root")
    (folder / "etc/systemd/system").mkdir(parents=True)
    (folder / "usr/bin").mkdir(parents=True)
    shutil.copytree("/usr/lib/systemd/system", folder / "usr/lib/systemd/system", symlinks=True)
    for path in UNITS.iterdir():
        (folder / "etc/systemd/system" / path.name).write_bytes(path.read_bytes())
        program = re.search(r"^ExecStart=(\S+)", path.read_text(), flags=re.MULTILINE)
        if program:
            stub = folder / program[1].lstrip("/")
            stub.write_text("#!/bin/true\n")
            stub.chmod(0o755)
    return folder


@pytest.mark.parametrize("unit", sorted(UNITS.iterdir()), ids=lambda path: path.name)
def test_systemd_accepts_the_unit(root: Path, unit: Path) -> None:
    command = ["systemd-analyze", "verify", "--man=no", "--recursive-errors=no", f"--root={root}", unit.name]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_systemd_refuses_a_planted_mistake(root: Path) -> None:
    wrong = root / "etc/systemd/system/wrong.service"
    wrong.write_text((UNITS / "virtfleet-compute.service").read_text().replace("Restart=always", "Restart=perhaps"))
    command = ["systemd-analyze", "verify", "--man=no", "--recursive-errors=no", f"--root={root}", wrong.name]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wrong.unlink()
    assert "perhaps" in done.stderr


def test_nothing_in_the_launchers_unit_reaches_a_guest() -> None:
    found = settings(UNITS / "virtfleet-launcher.service")
    assert found["KillMode"] == "process"
    assert found["Delegate"] == "yes"
    assert found["RuntimeDirectoryPreserve"] == "yes"
    text = (UNITS / "virtfleet-launcher.service").read_text()
    section = text.partition("[Service]")[2].partition("[Install]")[0]
    assert set(re.findall(r"^(\w+)=", section, flags=re.MULTILINE)) == LAUNCHER_SETTINGS
    assert "PartOf" not in found


@pytest.mark.parametrize("unit", SERVICES, ids=lambda path: path.name)
def test_every_service_comes_back(unit: Path) -> None:
    found = settings(unit)
    assert found["Restart"] == "always"
    # What comes next in a script finds it serving.
    assert found["Type"] == "notify"
    assert found["StartLimitIntervalSec"] == "0"


@pytest.mark.parametrize("unit", [path for path in SERVICES if "launcher" not in path.name], ids=lambda path: path.name)
def test_services_are_sandboxed(unit: Path) -> None:
    command = ["systemd-analyze", "security", "--offline=yes", "--no-pager", str(unit)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    exposure = re.search(r"Overall exposure level for \S+: ([\d.]+)", done.stdout)
    assert exposure, done.stdout
    assert float(exposure[1]) < 4
