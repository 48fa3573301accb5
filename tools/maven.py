"""Maven, which builds and tests the Java client in `clients/java`."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

from tools.paths import BUILD, ROOT

JAVA_CLIENT = ROOT / "clients" / "java"
LIMIT_SECONDS = 1500
"""From nothing, with everything to be fetched, on two crowded cores."""

_QUIET = ("--batch-mode", "--no-transfer-progress", "--quiet", "-Dstyle.color=never")
_AGENT = "dev.virtfleet.conformance.Agent"


_REPOSITORY = BUILD / "java-repository"
_OURS = Path("dev", "virtfleet")


class MavenError(Exception):
    """A build failed; the text is the end of what Maven said."""


def repository() -> Path:
    """Return the local repository of our builds: its downloads are those of the user where there are any, linked.

    So what is built here is never found in the user's own (Maven before 3.9 knows no second one), and what is there
    need not be fetched again.
    """
    downloads = Path.home() / ".m2" / "repository"
    for folder in (Path(), _OURS.parent):
        (_REPOSITORY / folder).mkdir(parents=True, exist_ok=True)
        for entry in (downloads / folder).iterdir() if (downloads / folder).is_dir() else ():
            link = _REPOSITORY / folder / entry.name
            if folder / entry.name not in (_OURS, _OURS.parent) and not os.path.lexists(link):
                link.symlink_to(entry)
    return _REPOSITORY


def forget_installed() -> None:
    """Take what a build has installed out of that repository."""
    shutil.rmtree(_REPOSITORY / _OURS, ignore_errors=True)


def run(
    *arguments: str, environment: Mapping[str, str] | None = None, folder: Path = JAVA_CLIENT
) -> subprocess.CompletedProcess[str]:
    """Run Maven in a folder, whatever comes of it."""
    return subprocess.run(
        ["mvn", *_QUIET, f"-Dmaven.repo.local={repository()}", *arguments],
        cwd=folder,
        env={**os.environ, **(environment or {})},
        capture_output=True,
        text=True,
        timeout=LIMIT_SECONDS,
        check=False,
    )


def build(*arguments: str, folder: Path = JAVA_CLIENT) -> None:
    """Build without tests.

    Raises:
        MavenError: It failed.
    """
    done = run("-DskipTests", *arguments, folder=folder)
    if done.returncode:
        raise MavenError(f"{done.stdout[-6000:]}\n{done.stderr[-2000:]}")


def classpath(module: str, *, group: Path = JAVA_CLIENT) -> str:
    """Return where the classes of a built module and of what it needs lie; its build has written the latter down."""
    target = group / module / "target"
    return f"{target / 'classes'}{os.pathsep}{(target / 'classpath').read_text()}"


def conformance_agent() -> list[str]:
    """Build the agent of the conformance suite and return its command.

    Raises:
        MavenError: The build failed.
    """
    build("package", "--projects", "conformance", "--also-make")
    return ["java", "-cp", classpath("conformance"), _AGENT]
