"""Log lines and the audit log."""

from __future__ import annotations

import json
import logging
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.service_server.test_call import Transport, call_of
from virtfleet_service import errors
from virtfleet_service.call import CURRENT, Caller
from virtfleet_service.logs import ANONYMOUS, UNWRITTEN_LIMIT_LINES, AuditLog, JsonFormatter


def entry_of(record: logging.LogRecord) -> dict[str, object]:
    line = JsonFormatter("compute", "n1").format(record)
    assert "\n" not in line
    found: dict[str, object] = json.loads(line)
    return found


def test_an_entry_carries_its_call() -> None:
    call = call_of(Transport(None, traceparent="00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"))
    call.resource = "nodes/n1"
    record = logging.makeLogRecord({"msg": "two\nlines %s", "args": ("x",), "levelname": "INFO", "size": 3})
    token = CURRENT.set(call)
    try:
        entry = entry_of(record)
    finally:
        CURRENT.reset(token)
    assert entry["message"] == "two\nlines x"
    assert entry["trace_id"] == "4bf92f3577b34da6a3ce929d0e0e4736"
    assert (entry["resource"], entry["subject"], entry["service"], entry["node"]) == (
        "nodes/n1",
        "carol",
        "compute",
        "n1",
    )
    assert entry["method"] == "virtfleet.compute.v1.DomainService.ListDomains"
    assert entry["size"] == 3
    assert "trace_id" not in entry_of(record)


def test_an_exception_is_one_field() -> None:
    try:
        raise ValueError("bad")
    except ValueError as error:
        record = logging.makeLogRecord({"msg": "x", "exc_info": (type(error), error, error.__traceback__)})
    assert "ValueError: bad" in str(entry_of(record)["exception"])


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize(
    "text",
    ["ExecuteBatchError raised in core by servicer method [/a.B/C]", "Invalid encoding on b'\\xff'"],
    ids=["gone", "no text"],
)
def test_what_grpc_takes_for_a_fault_and_is_its_clients_doing_is_no_error(text: str) -> None:
    program = f"""
import logging
from virtfleet_service import logs
for level in ("INFO", "WARNING"):
    logs.configure("compute", "n1", level)
    for told in ({text!r}, "Unexpected"):
        try:
            raise RuntimeError("below")
        except RuntimeError:
            logging.getLogger("grpc._cython.cygrpc").exception(told)
"""
    # A process of its own: what is configured here is that of the tests.
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=30)
    told = [json.loads(line) for line in done.stderr.splitlines()]
    assert [(line["level"], line["message"], "exception" in line) for line in told] == [
        ("info", text, False),
        ("error", "Unexpected", True),
        ("error", "Unexpected", True),
    ]


def test_the_audit_log_is_appended_to_and_private(tmp_path: Path) -> None:
    path = tmp_path / "state" / "audit.log"
    for number in range(2):
        log = AuditLog(path)
        log.open()
        call = call_of(None)
        call.resource = f"nodes/n1/domains/d{number}"
        log.record(call, code="OK")
        log.close()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [line["resource"] for line in lines(path)] == ["nodes/n1/domains/d0", "nodes/n1/domains/d1"]


def test_what_a_caller_sends_stays_inside_its_line(tmp_path: Path) -> None:
    log = AuditLog(tmp_path / "audit.log")
    log.open()
    log.refused("m", peer="p", subject='a"}\n{"event":"call', code="X", reason="", message="\ud800")
    log.close()
    assert len(lines(tmp_path / "audit.refused.log")) == 1


def test_a_full_log_makes_room(tmp_path: Path) -> None:
    path = tmp_path / "audit.log"
    log = AuditLog(path, limit_bytes=500)
    log.open()
    for _ in range(10):
        log.record(call_of(None), code="OK")
    log.close()
    assert path.stat().st_size <= 500
    assert (tmp_path / "audit.log.1").stat().st_size <= 500


def test_mutations_wait_until_the_log_can_be_written_again(tmp_path: Path) -> None:
    path = tmp_path / "audit.log"
    log = AuditLog(path)
    log.open()
    log.check()
    full = os.open("/dev/full", os.O_WRONLY)
    good = log._done._descriptor
    log._done._descriptor = full
    log.record(call_of(None), code="OK")
    with pytest.raises(errors.BackendUnreachable):
        log.check()
    log._done._descriptor = good
    os.close(full)
    log.check()
    log.close()
    # What could not be written then is there now.
    assert [line["event"] for line in lines(path)] == ["call", "audit_resumed"]


def test_a_log_that_could_not_make_room_goes_on_when_it_can(tmp_path: Path) -> None:
    path = tmp_path / "audit.log"
    in_the_way = tmp_path / "audit.log.1" / "something"
    in_the_way.mkdir(parents=True)
    measured = AuditLog(tmp_path / "one.log")
    measured.open()
    measured.record(call_of(None), code="OK")
    measured.close()
    log = AuditLog(path, limit_bytes=int((tmp_path / "one.log").stat().st_size * 2.5))
    log.open()
    for _ in range(4):
        log.record(call_of(None), code="OK")
    with pytest.raises(errors.BackendUnreachable):
        log.check()
    in_the_way.rmdir()
    in_the_way.parent.rmdir()
    log.check()
    log.close()
    assert [line["event"] for line in lines(tmp_path / "audit.log.1")] == ["call", "call"]
    assert [line["event"] for line in lines(path)] == ["call", "call", "audit_resumed"]


def test_refusals_without_end_cost_no_memory_while_the_log_cannot_be_written(tmp_path: Path) -> None:
    log = AuditLog(tmp_path / "audit.log")
    log.open()
    good, log._refused._descriptor = log._refused._descriptor, os.open("/dev/full", os.O_WRONLY)
    for _ in range(UNWRITTEN_LIMIT_LINES + 5):
        log.refused("m", peer="p", subject="s", code="X", reason="", message="")
    with pytest.raises(errors.BackendUnreachable):
        log.check()
    os.close(log._refused._descriptor)
    log._refused._descriptor = good
    log.close()
    written = lines(tmp_path / "audit.refused.log")
    assert len(written) == UNWRITTEN_LIMIT_LINES + 1
    assert written[-1]["lost_count"] == 5


@pytest.mark.parametrize("code", ["UNAUTHENTICATED", "PERMISSION_DENIED", "INVALID_ARGUMENT"])
def test_who_is_refused_without_end_drives_out_nothing_that_was_done(tmp_path: Path, code: str) -> None:
    log = AuditLog(tmp_path / "audit.log", limit_bytes=10_000)
    log.open()
    log.record(call_of(None), code="OK")
    log.record(call_of(None), code="NOT_FOUND")
    nobody = call_of(None)
    nobody.caller = Caller(ANONYMOUS, (), "tls")
    for _ in range(200):
        log.record(nobody, code=code)
        log.refused("m", peer="p", subject="s", code="UNAUTHENTICATED", reason="", message="")
    log.close()
    assert [line["code"] for line in lines(tmp_path / "audit.log")] == ["OK", "NOT_FOUND"]
    assert stat.S_IMODE((tmp_path / "audit.refused.log").stat().st_mode) == 0o600
    assert (tmp_path / "audit.refused.log.1").stat().st_size <= 10_000


FULL_IN_THE_MIDDLE = """
import resource, sys
from pathlib import Path
from tests.unit.service_server.test_call import call_of
from virtfleet_service.errors import BackendUnreachable
from virtfleet_service.logs import AuditLog

path = Path(sys.argv[1])
log = AuditLog(path)
log.open()
log.record(call_of(None), code="OK")
size = path.stat().st_size
resource.setrlimit(resource.RLIMIT_FSIZE, (size + 20, resource.RLIM_INFINITY))
log.record(call_of(None), code="OK")
try:
    log.check()
except BackendUnreachable:
    print("refused", path.stat().st_size - size)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
log.check()
log.close()
"""


def test_a_disk_that_is_full_in_the_middle_of_a_line_leaves_no_half_of_it(tmp_path: Path) -> None:
    path = tmp_path / "audit.log"
    ran = subprocess.run(
        [sys.executable, "-c", FULL_IN_THE_MIDDLE, str(path)], capture_output=True, text=True, check=True, timeout=30
    )
    assert ran.stdout.split() == ["refused", "0"]
    assert [line["event"] for line in lines(path)] == ["call", "call", "audit_resumed"]


def test_a_log_that_was_moved_or_deleted_is_begun_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As logrotate does it; what was recorded after a deletion went into a file that nobody could read."""
    path = tmp_path / "audit.log"
    log = AuditLog(path)
    log.open()
    log.record(call_of(None), code="OK", event="first")
    path.rename(tmp_path / "audit.log.old")
    log.record(call_of(None), code="OK", event="second")
    path.unlink()
    log.record(call_of(None), code="OK", event="third")
    log.record(call_of(None), code="OK", event="fourth")
    log.close()
    assert [line["event"] for line in lines(tmp_path / "audit.log.old")] == ["first"]
    assert [line["event"] for line in lines(path)] == ["third", "fourth"]
    assert [one.message for one in caplog.records] == [
        f"the audit log {path} was moved or deleted: another one is begun"
    ] * 2


def test_a_pipe_in_the_place_of_the_log_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "audit.log")
    with pytest.raises(OSError, match=r"audit\.log"):
        AuditLog(tmp_path / "audit.log").open()
