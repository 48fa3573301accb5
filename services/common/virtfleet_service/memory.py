"""Bounds on the memory that streams of volume data leave behind in a process.

A server must not hold more than it works on, whoever sends fast while a disk is slow, or asks and reads slowly.
"""

from __future__ import annotations

import ctypes
from typing import Final

WINDOW_BYTES: Final = 1 << 20
"""How much of a stream the other side may send ahead of whoever reads it: one chunk of volume data."""

FLOW_OPTIONS: Final = (
    # gRPC's own estimate takes a queue for a long line: a slow disk made it let in hundreds of MiB.
    ("grpc.http2.bdp_probe", 0),
    ("grpc.http2.lookahead_bytes", WINDOW_BYTES),
    # What the estimate would have found: whole chunks in one frame, and reads larger than a record of TLS.
    ("grpc.http2.max_frame_size", WINDOW_BYTES),
    ("grpc.experimental.tcp_read_chunk_size", 64 << 10),
    ("grpc.experimental.tcp_min_read_chunk_size", 16 << 10),
)
"""The options of a server or channel that hold a sender back, and let it through without needless work."""

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -2, -3, -8
"""The numbers that mallopt(3) has for what is set below."""

_TUNING: Final = (
    # Each thread of gRPC's would get an arena of its own and keep what passed through it.
    (_ARENA_MAX, 2),
    # Chunks of 1 MiB come from the heap and go back to it, instead of 256 page faults each …
    (_MMAP_THRESHOLD, 8 << 20),
    # … and so much of the heap stays when they are gone.
    (_TRIM_THRESHOLD, 16 << 20),
    (_TOP_PAD, 1 << 20),
)


def tune_allocator() -> None:
    """Make the C library's allocator fit for chunks of volume data; before threads are started.

    Does nothing where the C library has no mallopt (musl): memory is not bounded less there, only its reuse is slower.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for parameter, value in _TUNING:
            mallopt(parameter, value)
