"""A development fleet for an ordinary user: inside a user namespace, where the system allows one.

Root goes straight on. For anybody else the program begins again as root of a user, mount, network and pid-sharing
namespace of its own (`unshare`): namespaces, bridges, taps and nftables then work, but guests cannot get users or
control groups of their own.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

_INSIDE = "VIRTFLEET_INSIDE_USER_NAMESPACE"
TUN = Path("/dev/net/tun")


def enter(*, needs_tap: bool) -> None:
    """Return if this process may make namespaces; begin again inside a user namespace if not.

    Args:
        needs_tap: Whether guests with interfaces will be started.

    Raises:
        SystemExit: The system does not allow it; the message names what is missing.
    """
    if inside():
        _prepare()
        return
    if os.geteuid() == 0:
        return
    missing = [] if shutil.which("unshare") else ["the command unshare (util-linux)"]
    if needs_tap and not os.access(TUN, os.R_OK | os.W_OK):
        missing.append(f"access to {TUN} (udev gives it to everybody: mode 0666)")
    if not missing:
        tried = subprocess.run(
            ["unshare", "--user", "--map-root-user", "--net", "--mount", "true"],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if tried.returncode:
            missing.append(f"user namespaces ({tried.stderr.strip()}; sysctl kernel.unprivileged_userns_clone)")
    if missing:
        raise SystemExit(f"without root this needs {' and '.join(missing)}")
    os.execvpe(
        "unshare",
        ["unshare", "--user", "--map-root-user", "--net", "--mount", sys.executable, "-m", _module(), *sys.argv[1:]],
        {**os.environ, _INSIDE: "1"},
    )


def inside() -> bool:
    """Tell whether this process runs in a user namespace that `enter` has made."""
    return bool(os.environ.get(_INSIDE))


def _module() -> str:
    main = sys.modules["__main__"].__spec__
    if main is None:
        raise SystemExit("run it as a module: python -m tools.…")
    return main.name


def _prepare() -> None:
    """Give the new namespaces what the system gives the first ones: a writable /run and a loopback that is up."""
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", "/run"], check=True)
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
