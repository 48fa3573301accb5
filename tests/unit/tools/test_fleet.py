"""What `make clean` believes of what lies about."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tools import fleet
from tools.paths import ROOT


def orphan(place: Path, name: str, **changes: object) -> Path:
    folder = place / name
    (folder / "run").mkdir(parents=True)
    folder.chmod(0o711)
    record = {
        "folder": str(folder),
        "checkout": str(ROOT),
        "supervisor": 2**22 + 1,
        "supervisor_start_time": 7,
        **changes,
    }
    (folder / "run" / "fleet.json").write_text(json.dumps(record))
    return folder


def test_an_orphan_of_this_checkout_is_found_and_nothing_else(tmp_path: Path) -> None:
    real = orphan(tmp_path, "virtfleet-a")
    orphan(tmp_path, "virtfleet-of-another-checkout", checkout="/elsewhere")
    orphan(tmp_path, "virtfleet-that-names-another-folder", folder="/")
    started = fleet._start_time(os.getpid())
    orphan(tmp_path, "virtfleet-that-lives", supervisor=os.getpid(), supervisor_start_time=started)
    orphan(tmp_path, "virtfleet-that-others-may-write").chmod(0o777)
    (tmp_path / "virtfleet-link").symlink_to(real)
    (tmp_path / "virtfleet-file").write_text("")
    assert list(fleet.orphans(tmp_path)) == [real / "run"]


def test_a_folder_of_somebody_else_is_not_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    orphan(tmp_path, "virtfleet-a")
    monkeypatch.setattr(os, "geteuid", lambda: 54321)
    assert not list(fleet.orphans(tmp_path))
