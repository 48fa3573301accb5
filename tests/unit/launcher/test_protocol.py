"""Lines, fields and refusals of the launcher's protocol."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from virtfleet_launcher import protocol
from virtfleet_launcher.protocol import Fields, LineBuffer, Refusal, encode, parse_line
from virtfleet_launcher.requests import parse_spawn
from virtfleet_launcher.settings import Settings

SETTINGS = Settings(run_dir="/run/x", executables=("/bin/true",), openable_files=("/dev/vhost-net",))
JSON: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
GOOD: dict[str, Any] = {
    "guest": "g",
    "token": "t",
    "argv": ["/bin/true", "{fd:qmp}"],
    "uid": 20001,
    "env": {"A": "b"},
    "cwd": "/",
    "sockets": [{"name": "qmp", "mode": 384}],
    "consoles": [{"name": "qmp"}],
    "fds": ["extra"],
    "files": [{"name": "net", "path": "/dev/vhost-net", "flags": "rw"}],
    "limits": {"pids": 10},
    "rlimits": {"NOFILE": [10, 20]},
    "spec": "YWJj",
}


def refused_by(call: Callable[[], object]) -> Refusal | None:
    """Make a call that may be refused; nothing else may go wrong in it."""
    try:
        call()
    except Refusal as refusal:
        return refusal
    return None


@given(
    st.lists(st.binary(max_size=50).filter(lambda line: b"\n" not in line), max_size=8), st.lists(st.integers(0, 400))
)
def test_lines_come_out_however_they_were_cut(lines: list[bytes], cuts: list[int]) -> None:
    stream = b"".join(line + b"\n" for line in lines)
    buffer = LineBuffer()
    edges = [0, *sorted(min(cut, len(stream)) for cut in cuts), len(stream)]
    found: list[bytes | None] = []
    for start, end in itertools.pairwise(edges):
        found += buffer.feed(stream[start:end])
    assert found == lines
    assert buffer.empty


def test_line_that_is_too_long_is_told_once_and_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "MAX_LINE", 100)
    buffer = LineBuffer()
    assert buffer.feed(b"x" * 60) == []
    assert buffer.feed(b"x" * 60) == [None]
    assert buffer.feed(b"x" * 1000) == []
    assert not buffer.empty
    assert buffer.feed(b"end\nnext\n" + b"y" * 101 + b"\n" + b"z" * 100 + b"\n") == [b"next", None, b"z" * 100]
    assert buffer.empty


@given(st.binary(max_size=200))
def test_any_bytes_are_a_request_or_a_refusal(line: bytes) -> None:
    refusal = refused_by(lambda: parse_line(line))
    assert refusal is None or refusal.reason == "INVALID"


def test_good_spawn_is_understood() -> None:
    request = parse_spawn(Fields(GOOD), SETTINGS, ())
    assert (request.uid, request.gid, request.umask, request.no_new_privs) == (20001, 20001, 0o077, True)
    assert request.spec == b"abc"
    assert request.substitute("fd={fd:qmp},x={fd:extra},{json}", {"qmp": 3, "extra": 4}) == "fd=3,x=4,{json}"


@given(st.sampled_from(sorted(GOOD)), JSON)
def test_any_value_in_any_field_is_understood_or_refused(name: str, value: Any) -> None:
    refusal = refused_by(lambda: parse_spawn(Fields(GOOD | {name: value}), SETTINGS, ()))
    if refusal is not None:
        assert refusal.reason.isupper()
        assert json.loads(encode({"error": refusal.payload()}))


@given(JSON)
def test_any_object_is_understood_or_refused(value: Any) -> None:
    with pytest.raises(Refusal):
        parse_spawn(Fields(value), SETTINGS, ())


def test_single_user_takes_no_other_user() -> None:
    import os

    settings = Settings(run_dir="/run/x", executables=("/bin/true",), single_user=True)
    request = parse_spawn(Fields({"guest": "g", "token": "t", "argv": ["/bin/true"]}), settings, ())
    assert (request.uid, request.change_user) == (os.getuid(), False)
    with pytest.raises(Refusal) as refused:
        parse_spawn(Fields({"guest": "g", "token": "t", "argv": ["/bin/true"], "uid": 20001}), settings, ())
    assert refused.value.reason == "UID_REFUSED"


def test_root_is_for_its_helpers_alone() -> None:
    settings = Settings(
        run_dir="/run/x",
        executables=("/bin/true", "/bin/false"),
        allow_root_helpers=("/bin/true",),
        ambient_capabilities={"/bin/true": ("net_admin",)},
    )

    def spawn(executable: str, uid: int, capabilities: list[str]) -> tuple[int, ...]:
        fields = {"guest": "g", "token": "t", "argv": [executable], "uid": uid, "ambient_capabilities": capabilities}
        return parse_spawn(Fields(fields), settings, ()).ambient_capabilities

    assert spawn("/bin/true", 0, []) == ()
    assert spawn("/bin/true", 20001, ["net_admin"]) == (12,)
    for executable, uid, capabilities, reason in (
        ("/bin/false", 0, [], "UID_REFUSED"),
        ("/bin/true", 0, ["net_admin"], "CAPABILITY_REFUSED"),
        ("/bin/true", 20001, ["net_raw"], "CAPABILITY_REFUSED"),
        ("/bin/false", 20001, ["net_admin"], "CAPABILITY_REFUSED"),
    ):
        with pytest.raises(Refusal) as refused:
            spawn(executable, uid, capabilities)
        assert refused.value.reason == reason


def test_frames_and_limits_are_the_same_on_both_sides() -> None:
    from virtfleet_service import launcher

    assert launcher._FRAME.format == protocol.FRAME.format
    assert (launcher._DATA, launcher._GAP, launcher._END) == (protocol.DATA, protocol.GAP, protocol.END)
    assert (launcher._INPUT, launcher._RELEASE) == (protocol.INPUT, protocol.RELEASE)
    assert launcher._UNKNOWN_COUNT == protocol.UNKNOWN_COUNT
    assert launcher._MAX_FDS == protocol.MAX_FDS
