"""Build the grpcurl that the tests run: the release that tests/clients/grpcurl pins, by the Go module proxy."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tools import go_toolchain
from tools.paths import BUILD, ROOT

MODULE = ROOT / "tests" / "clients" / "grpcurl"
PROGRAM = BUILD / "bin" / "grpcurl"
_PACKAGE = "github.com/fullstorydev/grpcurl/cmd/grpcurl"


def build() -> Path:
    """Return the program, built first where it is missing or older than its pins.

    Raises:
        RuntimeError: There is no Go, or it does not build.
    """
    pins = [MODULE / "go.mod", MODULE / "go.sum"]
    if PROGRAM.exists() and all(PROGRAM.stat().st_mtime >= pin.stat().st_mtime for pin in pins):
        return PROGRAM
    try:
        go, variables = go_toolchain.program(), go_toolchain.environment()
    except go_toolchain.GoError as error:
        raise RuntimeError(f"grpcurl: {error}") from error
    PROGRAM.parent.mkdir(parents=True, exist_ok=True)
    fresh = PROGRAM.with_suffix(f".{os.getpid()}")
    # What go.sum does not know is refused.
    command = [str(go), "build", "-mod=readonly", "-o", str(fresh), _PACKAGE]
    done = subprocess.run(command, cwd=MODULE, env=variables, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"grpcurl: {done.stderr.strip()}")
    fresh.replace(PROGRAM)
    return PROGRAM


if __name__ == "__main__":
    try:
        print(build())
    except RuntimeError as error:
        sys.exit(str(error))
