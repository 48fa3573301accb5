"""The wheel of each distribution, alone in an environment of its own: it brings what it needs, no more, and runs."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tools import bootstrap, wheels
from tools.paths import ROOT

pytestmark = pytest.mark.timeout(240)

NODE = frozenset({"virtfleet-api", "virtfleet-service"})
CLIENT = frozenset({"virtfleet-api", "virtfleet-client"})
COMMAND = CLIENT | {"virtfleet-cli"}


@dataclass(frozen=True)
class Wheel:
    """Is what a distribution must be when it is installed alone.

    Attributes:
        brings: The distributions of ours that are there then.
        runs: Command lines that must work, with the beginning of a line that they print.
        not_alone: Modules that need another distribution, which the page says: parts of the command that this one adds
            to `virtfleet`, and the driver for QEMU (the extra `qemu`).
    """

    brings: frozenset[str]
    runs: tuple[tuple[str, str], ...] = ()
    not_alone: tuple[str, ...] = ()


SERVICE_ONLY = ("virtfleet_service.commands", "virtfleet_service.store_commands")
QEMU = ("virtfleet_compute.drivers.qemu",)
WHEELS = {
    "virtfleet-api": Wheel(frozenset({"virtfleet-api"})),
    "virtfleet-client": Wheel(CLIENT),
    "virtfleet-cli": Wheel(COMMAND, (("virtfleet explain WRONG_STATE", "WRONG_STATE"),)),
    "virtfleet-service": Wheel(NODE, not_alone=SERVICE_ONLY),
    "virtfleet-launcher": Wheel(
        frozenset({"virtfleet-launcher"}), (("virtfleet-launcher --run-dir /run/x --show-settings", "{"),)
    ),
    "virtfleet-compute": Wheel(
        NODE | {"virtfleet-compute"},
        (("virtfleet-compute --node n1 --show-settings", 'node = "n1"'),),
        (*SERVICE_ONLY, *QEMU),
    ),
    "virtfleet-storage": Wheel(
        NODE | {"virtfleet-storage"}, (("virtfleet-storage --node n1 --show-settings", 'node = "n1"'),), SERVICE_ONLY
    ),
    "virtfleet-network": Wheel(
        NODE | {"virtfleet-network"}, (("virtfleet-network --node n1 --show-settings", 'node = "n1"'),), SERVICE_ONLY
    ),
    "virtfleet-node": Wheel(
        NODE | {"virtfleet-node", "virtfleet-compute", "virtfleet-storage", "virtfleet-network"},
        (("virtfleet-node --node n1 --show-settings", "services = "),),
        (*SERVICE_ONLY, *QEMU),
    ),
    "virtfleet-gateway": Wheel(
        NODE | {"virtfleet-gateway"},
        (("virtfleet-gateway --show-settings", "name = "),),
        (*SERVICE_ONLY, "virtfleet_gateway.commands"),
    ),
    "virtfleet-fake": Wheel(
        NODE | COMMAND | {"virtfleet-fake", "virtfleet-compute", "virtfleet-gateway"},
        (
            ("virtfleet fake --nodes 2 --domains 1 --until-eof", '{"address"'),
            ("virtfleet-fake --nodes 1 --until-eof", '{"address"'),
            ("virtfleet authority init --directory authority", "authority of virtfleet.dev"),
        ),
        QEMU,
    ),
}

OF_CLIENTS = {"grpcio", "grpcio-status", "protobuf", "googleapis-common-protos", "protovalidate", "typing-extensions"}
"""What the client may pull in beside our own: gRPC and what the stubs are made of."""

_IMPORT_ALL = """
import importlib, json, pkgutil, sys
wrong = {}
for root in sys.argv[1:]:
    package = importlib.import_module(root)
    for found in pkgutil.walk_packages(package.__path__, root + ".", onerror=lambda name: None):
        if found.name.rpartition(".")[2] == "__main__" or ".testing" in found.name:
            continue
        try:
            importlib.import_module(found.name)
        except ImportError as error:
            wrong[found.name] = str(error)
print(json.dumps(wrong))
"""


@pytest.fixture(scope="module")
def built() -> Path:
    done = subprocess.run([sys.executable, "-m", "tools.wheels"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return wheels.TARGET


def uv(*arguments: str | Path) -> str:
    """Run uv as `make env` does: with what pip is configured to use on this machine."""
    source = bootstrap.package_source(dict(os.environ), Path.home())
    program = bootstrap.installed_uv() or bootstrap.fetch_uv(source)
    done = subprocess.run(
        [str(program), *map(str, arguments)],
        env=source.uv_environment(), cwd="/", capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_each_distribution_is_tried() -> None:
    assert {bootstrap_name(folder) for folder in wheels.distributions()} == set(WHEELS)


def bootstrap_name(folder: Path) -> str:
    found = re.search(r'^name = "([\w-]+)"', (folder / "pyproject.toml").read_text(), flags=re.MULTILINE)
    assert found
    return found[1]


@pytest.mark.parametrize("name", WHEELS)
def test_a_wheel_alone_brings_what_it_needs_and_runs(built: Path, name: str, tmp_path: Path) -> None:
    wanted, environment = WHEELS[name], tmp_path / "venv"
    uv("venv", "--quiet", "--python", sys.executable, environment)
    python = environment / "bin/python"
    uv(
        *("pip", "install", "--quiet", "--python", python, "--find-links", built),
        *("--constraint", ROOT / "requirements/run.txt", name),
        # A wheel of the same version from an earlier build may be in the cache.
        *(option for one in sorted(wanted.brings) for option in ("--refresh-package", one)),
    )
    installed = {one["name"] for one in json.loads(uv("pip", "list", "--python", python, "--format", "json"))}
    assert {one for one in installed if one.startswith("virtfleet")} == wanted.brings
    if name in ("virtfleet-api", "virtfleet-client"):
        assert installed - wanted.brings <= OF_CLIENTS
    if name == "virtfleet-launcher":
        assert installed == wanted.brings, "standard library only"

    packages = [one.replace("-", "_") for one in sorted(wanted.brings) if one != "virtfleet-api"] + (
        ["virtfleet"] if "virtfleet-api" in wanted.brings else []
    )
    found = json.loads(call([str(python), "-c", _IMPORT_ALL, *packages], environment, tmp_path))
    assert not {module: why for module, why in found.items() if not module.startswith(wanted.not_alone or ("-",))}
    for line, says in wanted.runs:
        said = call(line.split(), environment, tmp_path)
        assert any(one.strip().startswith(says) for one in said.splitlines()), said


def call(command: list[str], environment: Path, folder: Path) -> str:
    """Run a program of an environment with nothing of ours around it, to its end."""
    variables = {"PATH": f"{environment / 'bin'}:/usr/bin:/bin", "HOME": str(folder)}
    done = subprocess.run(
        command, cwd=folder, env=variables, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    assert "Traceback" not in done.stderr
    return done.stdout
