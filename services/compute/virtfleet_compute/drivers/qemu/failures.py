"""What the launcher and QEMU say when they fail, as errors of ours."""

from __future__ import annotations

import re

from virtfleet_service.errors import BackendUnreachable, DriverBroken, HypervisorFailed, VirtfleetError
from virtfleet_service.launcher_model import Exit, LauncherError, LauncherUnavailable

TAIL_CHARACTERS = 600

_TERMINAL = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]")
_SECRET = re.compile(r"(?i)\b(pass(?:word|wd|phrase)?|secret|token|key)(\"?\s*[=:]\s*)(\"[^\"]*\"|[^\s,;}]+)")
_REFUSED = frozenset({"EXECUTABLE_REFUSED", "UID_REFUSED", "CAPABILITY_REFUSED", "FILE_REFUSED", "LIMIT_UNSUPPORTED"})


def redacted(said: bytes) -> str:
    """Return the end of what a process wrote, without control characters and without what may be secret."""
    text = _TERMINAL.sub("", said.decode("utf-8", "replace"))
    text = "".join(letter if letter.isprintable() else " " for letter in text)
    text = _SECRET.sub(r"\1\2…", " ".join(text.split()))
    return text if len(text) <= TAIL_CHARACTERS else "…" + text[-TAIL_CHARACTERS:]


def shown(said: object) -> str:
    """Return the beginning of what a QEMU says over its monitor, without control characters: it may say anything."""
    text = str(said)[: TAIL_CHARACTERS + 1]
    text = "".join(letter if letter.isprintable() else " " for letter in text)
    return text if len(text) <= TAIL_CHARACTERS else text[:TAIL_CHARACTERS] + "…"


def how(ending: Exit | None) -> str:
    """Say how a process ended."""
    if ending is None or ending.outcome == "unknown":
        return "QEMU ended, nobody saw how"
    if ending.signal is not None:
        return f"QEMU was ended by signal {ending.signal}"
    return f"QEMU ended with exit code {ending.code}"


def of_launcher(error: LauncherError, what: str) -> VirtfleetError:
    """Return the error of ours for one of the launcher."""
    if isinstance(error, LauncherUnavailable):
        return BackendUnreachable(f"{what}: the launcher does not answer: {error.message}", backend="launcher")
    cause = f"{error.reason}: {error.message}"
    if error.reason in _REFUSED or (error.reason == "EXEC_FAILED" and error.details.get("stage") == "exec"):
        return DriverBroken(f"{what}: the launcher refuses it: {cause}", driver="qemu", cause=cause)
    return HypervisorFailed(f"{what}: {cause}", cause=cause, launcher_reason=error.reason)
