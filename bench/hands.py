"""What the hands cost: the informer of the Go client over a fleet, cold starts of the command and of a fake fleet.

All of it stands on fake fleets (`virtfleet fake`): the real gateway and the real compute service of each node in one
process. The informer's process is `bench/informer`; its fleet is `bench.churn`, which changes domains in its stores.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import samples
from bench.figures import Figure
from bench.machine import private_mib
from bench.stage import Stage
from tools import go_toolchain
from tools.paths import BUILD, ROOT

KEYS = (
    "fake_start_s",
    "fake_private_mib",
    "command_help_ms",
    "command_get_ms",
    "go_informer_50k_sync_s",
    "go_informer_bytes_per_object",
    "go_informer_message_bytes",
    "go_informer_updates_per_s",
    "go_informer_lag_p99_ms",
)
INFORMER = ROOT / "bench" / "informer"
_COMMAND = Path(sys.executable).with_name("virtfleet")
_LIMIT_SECONDS = 240
_RATE = 1000
_SETTLE_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class Fake:
    """Is a fake fleet that runs.

    Attributes:
        process: Its process.
        start_seconds: From the spawn to the line that says it is ready.
        environment: What leads a client to it.
    """

    process: asyncio.subprocess.Process
    start_seconds: float
    environment: Mapping[str, str]

    async def ask(self, line: str) -> dict[str, Any]:
        """Say a line to it; returns what it answers."""
        if self.process.stdin is not None:
            self.process.stdin.write(f"{line}\n".encode())
        return await _said(self.process)


def _environment() -> dict[str, str]:
    """Return the variables of this process, but let Python keep its compiled modules, as an installation has them."""
    return {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}


@asynccontextmanager
async def fake(module: Sequence[str]) -> AsyncIterator[Fake]:
    """Be a fake fleet while entered: a Python module with its arguments that prints the line of `virtfleet fake`.

    Raises:
        RuntimeError: It does not start.
    """
    began = time.perf_counter()
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", *module),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        env=_environment(),
        cwd=ROOT,
    )
    try:
        async with asyncio.timeout(_LIMIT_SECONDS):
            ready = await _said(process)
        took = time.perf_counter() - began
        leads = {f"VIRTFLEET_{key.upper()}": ready[key] for key in ("address", "ca_file", "cert_file", "key_file")}
        yield Fake(process, took, {**_environment(), **leads})
    finally:
        if process.stdin is not None:
            process.stdin.close()
        await process.wait()


def _plain(nodes: int, domains: int) -> tuple[str, ...]:
    return ("virtfleet_fake", "--until-eof", "--nodes", str(nodes), "--domains", str(domains))


async def leg(on: Stage) -> list[Figure]:
    """Measure all three, one after the other."""
    return [*await _fleets(on), *await _command(on), *await _informer(on)]


async def _fleets(on: Stage) -> list[Figure]:
    nodes, domains = on.times(200, 20), on.times(50, 5)
    starts: list[float] = []
    weights: list[float] = []
    for number in range(on.times(5, 1) + 1):
        async with fake(_plain(nodes, domains)) as fleet:
            if number:
                starts.append(fleet.start_seconds)
                weights.append(private_mib(fleet.process.pid))
    note = f"{nodes} nodes of {domains} domains"
    return [
        Figure("fake_start_s", samples.p50(starts), "s", len(starts), f"{note}: spawn to the line that says ready"),
        Figure("fake_private_mib", samples.p50(weights), "MiB", len(weights), note),
    ]


async def _command(on: Stage) -> list[Figure]:
    async with fake(_plain(1, 1)) as fleet:
        helped: list[float] = []
        got: list[float] = []
        for number in range(on.times(15, 2) + 1):
            for times, words in ((helped, ["--help"]), (got, ["get", "domain", "d-00000"])):
                took = await asyncio.to_thread(_timed, words, fleet.environment)
                if number:
                    times.append(took)
    return [
        Figure("command_help_ms", samples.p50(helped) * 1e3, "ms", len(helped), "virtfleet --help"),
        Figure("command_get_ms", samples.p50(got) * 1e3, "ms", len(got), "virtfleet get domain NAME, mutual TLS"),
    ]


def _timed(words: list[str], environment: Mapping[str, str]) -> float:
    began = time.perf_counter()
    done = subprocess.run([_COMMAND, *words], env=dict(environment), capture_output=True, text=True, check=False)
    took = time.perf_counter() - began
    if done.returncode:
        raise RuntimeError(f"virtfleet {' '.join(words)}: {done.stderr.strip()}")
    return took


async def _informer(on: Stage) -> list[Figure]:
    program = await asyncio.to_thread(_built)
    nodes, domains, seconds = on.times(50, 5), on.times(1000, 20), on.times(10, 2)
    module = ("bench.churn", "--nodes", str(nodes), "--domains", str(domains))
    async with fake(module) as fleet, asyncio.timeout(_LIMIT_SECONDS):
        process = await asyncio.create_subprocess_exec(
            program,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env=dict(fleet.environment),
        )
        try:
            known = await _said(process)
            made = (await fleet.ask(f"{_RATE} {seconds}"))["made"]
            await asyncio.sleep(_SETTLE_SECONDS)
            if process.stdin is not None:
                process.stdin.close()
            changed = await _said(process)
        finally:
            if process.returncode is None:
                process.kill()
            await process.wait()
    if known["objects"] != nodes * domains or changed["seen"] != made:
        raise RuntimeError(f"{known['objects']} objects; {changed['seen']} changes of {made} were seen")
    many, asked = (
        f"{nodes} nodes of {domains} domains",
        f"{_RATE} changes/s for {seconds} s, in the stores of {nodes} nodes",
    )
    count, seen = known["objects"], changed["seen"]
    return [
        Figure("go_informer_50k_sync_s", known["sync_seconds"], "s", 1, f"{many}: first call to WaitSynced"),
        Figure("go_informer_bytes_per_object", known["bytes_per_object"], "B", count, "heap, with all indexes"),
        Figure("go_informer_message_bytes", known["message_bytes"], "B", count, "size of the same messages"),
        Figure("go_informer_updates_per_s", seen / changed["seconds"], "/s", seen, asked),
        Figure("go_informer_lag_p50_ms", changed["lag_p50_ms"], "ms", seen, "change made to handler called"),
        Figure("go_informer_lag_p99_ms", changed["lag_p99_ms"], "ms", seen, "change made to handler called"),
    ]


async def _said(process: asyncio.subprocess.Process) -> dict[str, Any]:
    """Read a line of JSON that a process prints.

    Raises:
        RuntimeError: It has ended.
    """
    line = await process.stdout.readline() if process.stdout is not None else b""
    if not line:
        raise RuntimeError(f"a program of the bench ends with {await process.wait()}")
    found: dict[str, Any] = json.loads(line)
    return found


def _built() -> Path:
    program = BUILD / "bin" / "bench-informer"
    program.parent.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(
        [go_toolchain.program(), "build", "-mod=readonly", "-o", program, "."],
        cwd=INFORMER, env=go_toolchain.environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"bench/informer: {done.stderr.strip()}")
    return program
