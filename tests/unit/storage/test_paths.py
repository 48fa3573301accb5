from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from virtfleet_service.errors import BackingMissing, PathOutsidePool, ResourceNotFound
from virtfleet_storage.backends.dir import paths


@pytest.mark.parametrize("path", ["", "a", "a/b", "/", "//", "/a//b", "/a/", "/a/.", "/a/../b", "/a\0b", "/./a"])
def test_paths_that_are_not_plain(path: str) -> None:
    with pytest.raises(PathOutsidePool):
        paths.check_path(path)


@given(st.text(max_size=300))
def test_an_acceptable_name_is_bare_and_can_be_sent(name: str) -> None:
    if paths.acceptable_name(name):
        assert "/" not in name
        assert name not in ("", ".", "..")
        assert not name.startswith(".")
        assert len(name.encode()) <= 255
        assert name.isprintable()


@pytest.mark.parametrize("name", ["", ".", "..", ".hidden", "a/b", "a\nb", "a\0b", "\udc80", "x" * 256])
def test_names_that_are_none(name: str) -> None:
    assert not paths.acceptable_name(name)


def test_a_directory_is_opened_without_following(tmp_path: Path) -> None:
    (tmp_path / "real" / "pool").mkdir(parents=True)
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "real" / "inner").symlink_to("pool")
    (tmp_path / "file").write_bytes(b"")
    os.close(paths.open_directory(str(tmp_path / "real" / "pool")))
    for name in ("link/pool", "real/inner", "file", "file/pool"):
        with pytest.raises(PathOutsidePool):
            paths.open_directory(str(tmp_path / name))
    with pytest.raises(BackingMissing):
        paths.open_directory(str(tmp_path / "none"))


def test_a_file_is_opened_only_if_it_is_one(tmp_path: Path) -> None:
    (tmp_path / "good").write_bytes(b"good")
    (tmp_path / "link").symlink_to("good")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "one").write_bytes(b"")
    os.link(tmp_path / "one", tmp_path / "two")
    directory = os.open(tmp_path, os.O_RDONLY)
    before = len(list(Path("/proc/self/fd").iterdir()))
    try:
        file = paths.open_file(directory, "good")
        assert os.read(file, 10) == b"good"
        os.close(file)
        for name in ("link", "folder", "pipe", "one", "two", "../x", ".."):
            with pytest.raises(PathOutsidePool):
                paths.open_file(directory, name)
        with pytest.raises(ResourceNotFound):
            paths.open_file(directory, "none")
        assert len(list(Path("/proc/self/fd").iterdir())) == before
    finally:
        os.close(directory)
