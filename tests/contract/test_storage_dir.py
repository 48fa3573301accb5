from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from virtfleet_storage.backends.api import PoolBackend
from virtfleet_storage.backends.dir.backend import DirBackend
from virtfleet_storage.testing.backend_contract import BackendContract


class TestDir(BackendContract):
    """The kind `dir`."""

    @pytest.fixture
    def backend(self) -> Iterator[PoolBackend]:
        made = DirBackend()
        yield made
        made.close()

    @pytest.fixture
    def path(self, tmp_path: Path) -> str:
        return str(tmp_path / "pool")
