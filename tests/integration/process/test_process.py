"""The one place that starts programs: what they are given, and that nothing of them is left."""

from __future__ import annotations

import asyncio
import hashlib
import os
import sys
import time
from pathlib import Path

import pytest

from virtfleet_service import errors
from virtfleet_service.process import run

PYTHON = sys.executable


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


async def test_output_exit_code_and_input() -> None:
    done = await run(
        [PYTHON, "-c", "import sys; sys.stdout.write(sys.stdin.read()[::-1]); sys.stderr.write('e'); sys.exit(3)"],
        timeout_seconds=20,
        input=b"abc",
    )
    assert (done.exit_code, done.stdout, done.stderr, done.truncated) == (3, b"cba", b"e", False)
    with pytest.raises(errors.BackendFailed) as caught:
        done.check()
    assert caught.value.metadata["exit_code"] == "3"
    assert caught.value.metadata["said"] == "e"


async def test_arguments_are_no_text_for_a_shell() -> None:
    done = await run([PYTHON, "-c", "import sys; print(sys.argv[1:])", "$(id); rm -rf *", "a b"], timeout_seconds=20)
    assert done.stdout.decode().strip() == str(["$(id); rm -rf *", "a b"])


async def test_nothing_of_our_environment_or_descriptors_leaks() -> None:
    os.environ["VIRTFLEET_TEST_SECRET"] = "x"
    read, write = os.pipe()
    os.set_inheritable(write, True)
    try:
        script = "import os; print(sorted(os.environ)); print(sorted(map(int, os.listdir('/proc/self/fd')))[:-1])"
        done = await run([PYTHON, "-c", script], timeout_seconds=20, env={"EXTRA": "1"})
    finally:
        del os.environ["VIRTFLEET_TEST_SECRET"]
        os.close(read)
        os.close(write)
    names, descriptors = done.stdout.decode().splitlines()
    assert names == str(["EXTRA", "LC_ALL", "PATH"])
    assert descriptors == str([0, 1, 2])


async def test_more_output_than_the_limit_is_read_and_dropped() -> None:
    done = await run([PYTHON, "-c", "print('x' * 3_000_000)"], timeout_seconds=20, limit_bytes=1000)
    assert (len(done.stdout), done.truncated, done.exit_code) == (1000, True, 0)


async def test_input_is_a_file_and_is_whole() -> None:
    text = bytes(range(256)) * 4096
    program = (
        "import hashlib, os, stat, sys\n"
        "print(stat.S_ISREG(os.fstat(0).st_mode), hashlib.sha256(sys.stdin.buffer.read()).hexdigest())"
    )
    done = (await run([PYTHON, "-c", program], timeout_seconds=20, input=text)).check()
    assert done.stdout.decode().split() == ["True", hashlib.sha256(text).hexdigest()]


async def test_a_program_that_does_not_read_its_input_is_no_error() -> None:
    done = await run([PYTHON, "-c", "pass"], timeout_seconds=20, input=b"x" * 5_000_000)
    assert done.exit_code == 0


async def test_a_missing_program_is_named() -> None:
    with pytest.raises(errors.BackendFailed) as caught:
        await run(["/no/such/tool"], timeout_seconds=5)
    assert caught.value.metadata["tool"] == "/no/such/tool"


CHILDREN = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN) if sys.argv[1] == "stubborn" else None
child = os.fork()
open(sys.argv[2], "a").write(f"{os.getpid()}\\n")
time.sleep(60)
"""


@pytest.mark.parametrize("kind", ["meek", "stubborn"])
async def test_at_the_deadline_the_whole_group_is_gone(tmp_path: Path, kind: str) -> None:
    pids = tmp_path / "pids"
    began = time.monotonic()
    with pytest.raises(errors.OperationTimedOut) as caught:
        await run([PYTHON, "-c", CHILDREN, kind, str(pids)], timeout_seconds=1)
    assert caught.value.metadata["timeout_seconds"] == "1"
    assert time.monotonic() - began < 10
    numbers = [int(pid) for pid in pids.read_text().split()]
    assert len(numbers) == 2
    await _gone(numbers)


async def test_on_cancellation_the_whole_group_is_gone(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    task = asyncio.create_task(run([PYTHON, "-c", CHILDREN, "stubborn", str(pids)], timeout_seconds=50))
    async with asyncio.timeout(20):
        while not pids.exists() or len(pids.read_text().split()) < 2:
            await asyncio.sleep(0.02)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await _gone([int(pid) for pid in pids.read_text().split()])


async def _gone(pids: list[int]) -> None:
    # The kernel has been told; a grandchild is reaped by init, a moment later.
    async with asyncio.timeout(5):
        while any(alive(pid) for pid in pids):
            await asyncio.sleep(0.01)
