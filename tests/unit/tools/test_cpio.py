"""Archives are read back by a reader of another hand: busybox."""

from __future__ import annotations

import subprocess
from pathlib import Path

from tools.cpio import Archive


def test_busybox_unpacks_what_was_packed(tmp_path: Path) -> None:
    archive = Archive()
    archive.directory("a")
    archive.file("a/odd", b"xyz", executable=True)
    archive.file("a/empty", b"")
    archive.link("a/link", "odd")
    command = ["busybox", "cpio", "-i", "-d"]
    subprocess.run(command, cwd=tmp_path, input=archive.content(), check=True, capture_output=True)
    assert (tmp_path / "a/odd").read_bytes() == b"xyz"
    assert (tmp_path / "a/odd").stat().st_mode & 0o777 == 0o755
    assert (tmp_path / "a/empty").read_bytes() == b""
    assert (tmp_path / "a/link").readlink() == Path("odd")
