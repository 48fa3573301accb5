"""Build the wheel of every distribution: `python -m tools.wheels` writes build/wheels."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from tools.paths import BUILD, IMPORT_ROOTS, PROTOS, ROOT

TARGET = BUILD / "wheels"


def distributions() -> list[Path]:
    """List the folders with a distribution."""
    roots = [PROTOS, *(ROOT / root for root in IMPORT_ROOTS if "/gen/" not in root)]
    return [root for root in roots if (root / "pyproject.toml").exists()]


def main() -> int:
    """Build all wheels anew; returns the exit code."""
    shutil.rmtree(TARGET, ignore_errors=True)
    TARGET.mkdir(parents=True)
    for folder in distributions():
        # hatchling is in the lock; building in this environment fetches nothing.
        command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(TARGET)]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        if done.returncode:
            print(f"wheels: {folder.relative_to(ROOT)}: {done.stdout}{done.stderr}", file=sys.stderr)
            return 1
    names = sorted(path.name for path in TARGET.glob("*.whl"))
    print("\n".join(names))
    return 0


if __name__ == "__main__":
    sys.exit(main())
