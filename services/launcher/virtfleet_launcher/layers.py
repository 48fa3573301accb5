"""Which layers of isolation are possible here, found out by trying them once at the start."""

from __future__ import annotations

import contextlib
import os
from typing import NamedTuple

from virtfleet_launcher import birth, kernel
from virtfleet_launcher.cgroups import Cgroups
from virtfleet_launcher.requests import Limits
from virtfleet_launcher.settings import Settings

__all__ = ["Layer", "permitted_groups", "probe"]

_PROBE = "probe-of-launcher"


class Layer(NamedTuple):
    """One layer: possible, or the reason why not."""

    possible: bool
    reason: str = ""


def _layer(reason: str) -> Layer:
    return Layer(possible=not reason, reason=reason)


def permitted_groups(settings: Settings) -> tuple[int, ...]:
    """Return the supplementary groups that processes may have."""
    if settings.single_user:
        return ()
    if settings.groups is not None:
        return settings.groups
    with contextlib.suppress(OSError):
        group = os.stat("/dev/kvm").st_gid
        return (group,) if group else ()
    return ()


def probe(settings: Settings, cgroups: Cgroups) -> dict[str, Layer]:
    """Try each layer in a child and return the report; cgroups that do not work are switched off."""
    uid, gid = settings.uids[0], settings.gids[0]

    def user() -> None:
        birth.change_user(uid, gid, permitted_groups(settings))

    def ambient() -> None:
        kernel.keep_capabilities()
        user()
        kernel.ambient([kernel.CAPABILITIES["net_bind_service"]])

    alone = "single_user is set: everything runs as the launcher's own user" if settings.single_user else ""
    readable = _probe_cgroup(cgroups)
    user_reason = alone or birth.try_in_child(user)[0]
    tap_reason = ""
    try:
        os.close(os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        tap_reason = f"/dev/net/tun: {error.strerror}"
    return {
        "user": _layer(user_reason),
        "session": Layer(possible=True),
        "no_new_privs": _layer(birth.try_in_child(kernel.no_new_privs)[0]),
        "ambient_capabilities": _layer(user_reason or birth.try_in_child(ambient)[0]),
        "cgroup": _layer(cgroups.reason),
        **{f"{name}_limit": _layer(cgroups.missing.get(name, "")) for name in ("memory", "cpu", "pids")},
        "seccomp": _layer("" if kernel.seccomp_available() else "this kernel has no seccomp"),
        "tap": _layer(tap_reason),
        "exit_status_of_adopted": _layer("" if readable else "this kernel has no PIDFD_INFO_EXIT (6.15)"),
    }


def _probe_cgroup(cgroups: Cgroups) -> bool:
    """Fork into a cgroup once; return whether exit statuses are readable by strangers."""
    descriptor = None
    if cgroups.possible:
        try:
            descriptor = cgroups.make(_PROBE, Limits(None, None, None))
        except OSError as error:
            cgroups.disable(f"cannot make a cgroup: {error.strerror}")
    _, inside, readable = birth.try_in_child(lambda: None, descriptor)
    if descriptor is not None:
        os.close(descriptor)
        cgroups.remove(_PROBE)
        if not inside:
            cgroups.disable("this kernel or its seccomp filter has no clone3 into a cgroup")
    return readable
