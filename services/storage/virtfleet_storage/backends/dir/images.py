"""Drives `qemu-img`, on files that are open here and under limits, since an image may be hostile.

The tool gets descriptors, not names: nothing that happens to a name in between leads it elsewhere. Every format is
given; a chain is spelled out down to its last file, so that no name inside of an image is ever followed.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from virtfleet.storage.v1 import volume_pb2
from virtfleet_service import process
from virtfleet_service.errors import BackendFailed, DriverBroken, PoolFull
from virtfleet_storage.backends.api import Format, Plan, format_word

VERSION_SECONDS = 5.0
"""How long the tool may take to say what it is."""

SHORT_SECONDS = 120.0
"""How long the tool may take for what does not depend on the size of a volume."""

SLOWEST_BYTES_PER_SECOND = 4 << 20
"""A copy may take the time that it has at this rate, and `SHORT_SECONDS` on top."""

_ADDRESS_SPACE_LIMIT_BYTES = 2 << 30
_ENVIRONMENT = {"MALLOC_ARENA_MAX": "1"}

_PREALLOCATION: Mapping[int, str] = MappingProxyType(
    {
        volume_pb2.PREALLOCATION_UNSPECIFIED: "off",
        volume_pb2.PREALLOCATION_OFF: "off",
        volume_pb2.PREALLOCATION_METADATA: "metadata",
        volume_pb2.PREALLOCATION_FALLOC: "falloc",
        volume_pb2.PREALLOCATION_FULL: "full",
    }
)
_COMPAT: Mapping[int, str] = MappingProxyType(
    {
        volume_pb2.QCOW2_COMPAT_UNSPECIFIED: "1.1",
        volume_pb2.QCOW2_COMPAT_0_10: "0.10",
        volume_pb2.QCOW2_COMPAT_1_1: "1.1",
    }
)


@dataclass(frozen=True, slots=True)
class OpenImage:
    """Is one file of a chain, open here, with the format that the service knows it to have."""

    descriptor: int
    format: Format


def tool() -> str:
    """Return the path of `qemu-img`; empty: it is not installed. Looked for each time: it may be installed any day."""
    return shutil.which("qemu-img", path="/usr/local/bin:/usr/bin:/bin:/usr/libexec") or ""


async def version() -> str:
    """Return what the tool says of its version.

    Raises:
        DriverBroken: It is missing.
        BackendFailed: It does not run.
        OperationTimedOut: It does not end.
    """
    done = (await process.run([_tool(), "--version"], timeout_seconds=VERSION_SECONDS)).check()
    return done.stdout.decode("utf-8", "replace").partition("\n")[0].removeprefix("qemu-img version ").strip()


async def create(descriptor: int, plan: Plan) -> None:
    """Write an empty qcow2 image into an open, empty file.

    Raises:
        PoolFull: There is no room.
        DriverBroken: The tool is missing.
        BackendFailed: The tool refused.
    """
    options = [
        f"preallocation={_PREALLOCATION[plan.preallocation]}",
        f"cluster_size={plan.cluster_size_bytes}",
        f"compat={_COMPAT[plan.compat]}",
    ]
    arguments = ["create", "-q", "-f", "qcow2", "-o", ",".join(options)]
    if plan.backing_name:
        # -u: what is below is not opened; its size is in the plan.
        arguments += ["-u", "-b", plan.backing_name, "-F", format_word(plan.backing_format)]
    size_paid = plan.capacity_bytes if plan.preallocation == volume_pb2.PREALLOCATION_FULL else 0
    await _run([*arguments, _path(descriptor), str(plan.capacity_bytes)], [descriptor], size_paid)


async def convert(chain: Sequence[OpenImage], target: int, plan: Plan, expected_bytes: int) -> None:
    """Write what a guest sees in a chain (top first) into an open, empty file.

    Raises:
        PoolFull: There is no room.
        DriverBroken: The tool is missing.
        BackendFailed: The tool refused.
    """
    arguments = ["convert", "-q", "-O", format_word(plan.format)]
    if plan.format == volume_pb2.VOLUME_FORMAT_QCOW2:
        options = [
            f"preallocation={_PREALLOCATION[plan.preallocation]}",
            f"cluster_size={plan.cluster_size_bytes}",
            f"compat={_COMPAT[plan.compat]}",
        ]
        arguments += ["-o", ",".join(options)]
    await _run(
        [*arguments, chain_argument(chain), _path(target)],
        [target, *(image.descriptor for image in chain)],
        expected_bytes,
    )


async def resize(chain: Sequence[OpenImage], capacity_bytes: int, *, shrink: bool, allocate: bool) -> None:
    """Change the size that a guest sees in the first image of a chain.

    Raises:
        PoolFull: There is no room.
        DriverBroken: The tool is missing.
        BackendFailed: The tool refused.
    """
    arguments = ["resize", "-q"]
    if allocate:
        arguments.append("--preallocation=falloc")
    if shrink:
        arguments.append("--shrink")
    await _run(
        [*arguments, chain_argument(chain), str(capacity_bytes)], [image.descriptor for image in chain], capacity_bytes
    )


def chain_argument(chain: Sequence[OpenImage]) -> str:
    """Return a chain (top first) as the file name that QEMU takes for a whole tree of block nodes."""
    node: dict[str, object] | None = None
    for image in reversed(chain):
        below = node
        node = {
            "driver": format_word(image.format),
            "file": {"driver": "file", "filename": _path(image.descriptor), "locking": "off"},
        }
        if image.format == volume_pb2.VOLUME_FORMAT_QCOW2:
            # Null, where there is none: what the image itself names must not be opened.
            node["backing"] = below
    return "json:" + json.dumps(node)


def _path(descriptor: int) -> str:
    return f"/proc/self/fd/{descriptor}"


def _tool() -> str:
    path = tool()
    if not path:
        raise DriverBroken(
            "qemu-img is not installed (Debian: qemu-utils): it is needed for qcow2 volumes",
            tool="qemu-img",
            cause="QEMU_IMG_MISSING",
        )
    return path


async def _run(arguments: Sequence[str], descriptors: Sequence[int], size_bytes: int) -> None:
    limits = ["prlimit", f"--as={_ADDRESS_SPACE_LIMIT_BYTES}", "--core=0", "--"]
    done = await process.run(
        [*limits, _tool(), *arguments],
        timeout_seconds=SHORT_SECONDS + size_bytes / SLOWEST_BYTES_PER_SECOND,
        env=_ENVIRONMENT,
        pass_fds=descriptors,
        limit_bytes=65536,
    )
    if done.exit_code == 0:
        return
    if os.strerror(28) in done.said or os.strerror(122) in done.said:
        # The tool tells it in no other way.
        raise PoolFull(f"qemu-img {arguments[0]}: {done.said}", step=arguments[0], cause=done.said)
    raise BackendFailed(
        f"qemu-img {arguments[0]} failed with exit code {done.exit_code}: {done.said}",
        tool="qemu-img",
        step=arguments[0],
        exit_code=done.exit_code,
        said=done.said,
    )
