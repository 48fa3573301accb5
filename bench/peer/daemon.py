"""A libvirtd of its own, in a mount namespace where its fixed paths lead into a folder: `daemon.py FOLDER`.

Started as `unshare --mount --propagation private python3 bench/peer/daemon.py FOLDER` by root, needs nothing but the
standard library, runs until SIGTERM, and leaves nothing: the namespace goes with it.

It is the reaper of what libvirtd starts. A QEMU of libvirt's is an orphan, and libvirt counts one as alive until its
zombie is gone; where process 1 reaps lazily, that delay would look like libvirt's.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

PORT = 16514
_PLACES = {
    "etc": Path("/etc/libvirt"),
    "run": Path("/run/libvirt"),
    "lib": Path("/var/lib/libvirt"),
    "cache": Path("/var/cache/libvirt"),
    "log": Path("/var/log/libvirt"),
}
_SUBREAPER = 36


def main() -> int:
    """Run libvirtd until told to stop."""
    folder = Path(sys.argv[1])
    state = folder / "state"
    shutil.copytree("/etc/libvirt", state / "etc")
    # No network of its own, no guest of the machine's.
    for name in ("networks", "autostart"):
        shutil.rmtree(state / "etc/qemu" / name, ignore_errors=True)
    for name, place in _PLACES.items():
        (state / name).mkdir(parents=True, exist_ok=True)
        (state / name).chmod(0o755)
        place.mkdir(parents=True, exist_ok=True)
        subprocess.run(["mount", "--bind", str(state / name), str(place)], check=True)
    for path in ("qemu", "images"):
        (_PLACES["lib"] / path).mkdir()
    shutil.chown(_PLACES["lib"] / "qemu", "libvirt-qemu", "libvirt-qemu")
    (state / "etc/bench.conf").write_text(_configuration(folder / "pki"))
    ctypes.CDLL(None).prctl(_SUBREAPER, 1)
    log = subprocess.Popen(["/usr/sbin/virtlogd"])
    libvirtd = subprocess.Popen(["/usr/sbin/libvirtd", "--listen", "-f", "/etc/libvirt/bench.conf"])
    (folder / "libvirtd.pid").write_text(str(libvirtd.pid))
    signal.signal(signal.SIGTERM, lambda _number, _frame: libvirtd.terminate())
    while os.wait()[0] != libvirtd.pid:
        continue
    log.terminate()
    _end_children()
    return 0


def _end_children() -> None:
    """End what libvirtd has left, so that the namespace goes."""
    own = os.getpid()
    for path in Path("/proc").glob("[0-9]*/stat"):
        fields = path.read_text().rpartition(")")[2].split() if path.exists() else []
        if fields and int(fields[1]) == own:
            os.kill(int(path.parent.name), signal.SIGTERM)
    while True:
        try:
            os.wait()
        except ChildProcessError:
            return


def _configuration(pki: Path) -> str:
    return "\n".join(
        (
            "listen_tls = 1",
            "listen_tcp = 0",
            'listen_addr = "127.0.0.1"',
            f'tls_port = "{PORT}"',
            'auth_tls = "none"',
            f'ca_file = "{pki}/cacert.pem"',
            f'cert_file = "{pki}/servercert.pem"',
            f'key_file = "{pki}/serverkey.pem"',
            'auth_unix_ro = "none"',
            'auth_unix_rw = "none"',
            "",
        )
    )


if __name__ == "__main__":
    sys.exit(main())
