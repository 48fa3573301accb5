"""The console ring against a model: a list of all bytes and of the epochs."""

from __future__ import annotations

import struct
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from virtfleet_launcher.ring import Ring, RingError

SIZE = 64
STEP = st.one_of(st.binary(min_size=1, max_size=150), st.just("reopen"))


def follow(ring: Ring, place: tuple[int, int], limit: int) -> list[tuple[int, int, bytes, int | None]]:
    """Return all that a cursor meets from a place: (epoch, offset, data, bytes skipped before it)."""
    met = []
    while (piece := ring.next(*place, limit)) is not None:
        met.append((piece.epoch, piece.offset, piece.data, piece.skipped))
        assert piece.gap or piece.data
        place = (piece.epoch, piece.offset + len(piece.data))
    return met


@given(st.lists(STEP, max_size=12), st.integers(1, 100), st.data())
def test_cursors_meet_every_byte_or_are_told(steps: list[bytes | str], limit: int, data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as directory:
        path = str(Path(directory) / "ring")
        ring = Ring.create(path, SIZE)
        everything = b""
        places = [ring.newest()]
        for step in steps:
            if isinstance(step, str):
                ring.close()
                ring = Ring(path)
                ring.begin_epoch()
            else:
                ring.write(step)
                everything += step
            places.append(ring.newest())
        assert ring.total == len(everything)
        assert ring.low == max(0, len(everything) - SIZE)
        start = data.draw(st.sampled_from([ring.oldest(), *places]))
        position = start[1]
        for epoch, offset, text, skipped in follow(ring, start, limit):
            assert everything[offset : offset + len(text)] == text
            assert ring.knows(epoch, offset)
            if skipped == 0:
                assert offset == position
            position = offset + len(text)
        assert position == len(everything)
        kept = b"".join(text for _, _, text, _ in follow(ring, ring.oldest(), limit))
        assert kept == everything[-SIZE:]
        ring.close()


def test_places_of_another_run_start_over_with_an_uncounted_gap(tmp_path: Path) -> None:
    first = Ring.create(str(tmp_path / "a"), SIZE)
    first.write(b"abc")
    place = first.newest()
    first.close()
    second = Ring.create(str(tmp_path / "b"), SIZE)
    second.write(b"abcdef")
    piece = second.next(*place, 100)
    assert piece is not None
    assert (piece.gap, piece.skipped, piece.offset) == (True, None, 0)
    second.close()


def test_kill_in_the_middle_of_a_write_shows_no_wrong_byte(tmp_path: Path) -> None:
    path = tmp_path / "ring"
    ring = Ring.create(str(path), SIZE)
    ring.write(bytes(range(SIZE)))
    ring.close()
    # As a writer of 10 more bytes leaves it that was killed after it moved `low` and wrote half of them.
    content = bytearray(path.read_bytes())
    struct.pack_into("<QQ", content, 16, 10, SIZE)
    content[4096 : 4096 + 5] = b"xxxxx"
    path.write_bytes(content)
    ring = Ring(str(path))
    assert b"".join(text for _, _, text, _ in follow(ring, ring.oldest(), 100)) == bytes(range(10, SIZE))
    ring.close()


def test_many_restarts_keep_the_newest_epochs(tmp_path: Path) -> None:
    ring = Ring.create(str(tmp_path / "ring"), 4096)
    for number in range(300):
        ring.write(b"%03d" % number)
        ring.begin_epoch()
    epochs = [epoch for epoch, _ in ring.epochs]
    assert len(epochs) == 128
    assert epochs == sorted(set(epochs))
    texts = [text for _, _, text, _ in follow(ring, ring.oldest(), 100) if text]
    assert texts[-1] == b"299"
    ring.close()


@pytest.mark.parametrize("content", [b"", b"x" * 4096, b"VFRING01" + bytes(8000), b"x" * 9000])
def test_other_files_are_no_rings(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "ring"
    path.write_bytes(content)
    with pytest.raises(RingError):
        Ring(str(path))
