"""Make the pictures of the command in the documentation: `python -m tools.screenshots [FOLDER]`.

Each shows real commands on a fake fleet: they run in a terminal of their own, and what they write there, colours
included, becomes an SVG. Without a folder `docs/images` is written. The pictures ask for no font of anybody's.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import pty
import re
import shlex
import struct
import subprocess
import sys
import tempfile
import termios
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from rich import _export_format
from rich.console import Console
from rich.text import Text

from tools.paths import ROOT

FOLDER = ROOT / "docs" / "images"
COLUMNS, LINES = 110, 40

SEED = """
[[domains]]
id = "web-{number}"
count = 3
running = true
labels = { app = "web" }
[domains.spec]
cpu = { vcpuCount = 2 }
memory = { maximumBytes = "2147483648" }
[[domains]]
id = "db"
running = true
labels = { app = "db" }
[domains.spec]
cpu = { vcpuCount = 4 }
memory = { maximumBytes = "8589934592" }
[[domains]]
id = "spare"
[domains.spec]
memory = { maximumBytes = "1073741824" }
"""

SCENES: Mapping[str, tuple[str, ...]] = {
    "lists": ("virtfleet get nodes", "virtfleet get domains -l app=web", "virtfleet get domains -n n1 -o wide"),
    "changes": (
        "virtfleet plan n1/db --set spec.cpu.vcpu_count=8 --set spec.memory.current_bytes=4GiB",
        "virtfleet stop --force -l app=web",
        "virtfleet start -n n2 --all",
    ),
    "top": ("virtfleet top --count 1",),
    "errors": (
        "virtfleet get domians",
        "virtfleet start n1/nobody",
        "virtfleet suspend n1/spare",
        "virtfleet explain WRONG_STATE",
    ),
}
"""The pictures by their names: the commands in each."""

_WRITTEN = re.compile(r"(?P<text>[^\x1b\r\n]+)|[\r\n]|\x1b\[\??(?P<number>[\d;]*)(?P<control>[A-Za-z])")
"""What commands write to a terminal: text, ends of lines, and sequences: colours (m), up (A), clear (K)."""

_SVG = re.sub(r"@font-face \{\{.*?\}\}|<!--.*?-->", "", _export_format.CONSOLE_SVG_FORMAT, flags=re.DOTALL)


@contextmanager
def fleet() -> Iterator[dict[str, str]]:
    """Run a fake fleet of three nodes; yields the variables that lead to it."""
    with tempfile.TemporaryDirectory(prefix="virtfleet-screenshots-") as folder:
        seed = Path(folder, "seed.toml")
        seed.write_text(SEED)
        command = [sys.executable, "-m", "virtfleet_fake", "--until-eof", "--nodes", "3", "--seed-file", str(seed)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            if process.stdin is None or process.stdout is None:
                raise RuntimeError("the pipes are asked for")
            ready = json.loads(process.stdout.readline())
            yield {
                "VIRTFLEET_ADDRESS": ready["address"],
                **{f"VIRTFLEET_{name.upper()}_FILE": ready[f"{name}_file"] for name in ("ca", "cert", "key")},
                "VIRTFLEET_CONTEXTS_FILE": str(Path(folder, "contexts.json")),
            }
            process.stdin.close()
            process.wait(30)


def typed(command: str, variables: Mapping[str, str]) -> str:
    """Run a command line in a terminal; returns what stood on it."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", LINES, COLUMNS, 0, 0))
    environment = {
        **{name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "COLUMNS", "LINES")},
        **variables,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "TERM": "xterm-256color",
    }
    with subprocess.Popen(shlex.split(command), env=environment, stdin=theirs, stdout=theirs, stderr=theirs) as process:
        os.close(theirs)
        seen = b""
        # The end of the other side is an error of input on this one.
        with contextlib.suppress(OSError):
            while data := os.read(ours, 65536):
                seen += data
        process.wait(60)
    os.close(ours)
    return seen.decode(errors="replace")


def screen(written: str) -> str:
    """Return what stands on a terminal at the end, as lines with their colours: what was drawn over is gone."""
    lines, row, fresh = [""], 0, False
    for found in _WRITTEN.finditer(written):
        control = found["control"]
        if found["text"] or control == "m":
            lines[row] = found[0] if fresh else lines[row] + found[0]
            fresh = False
        elif found[0] == "\n":
            row, fresh = row + 1, False
            lines += [""] * (row + 1 - len(lines))
        elif found[0] == "\r":
            fresh = True
        elif control == "A":
            row = max(0, row - int(found["number"] or 1))
        elif control in ("K", "J"):
            lines[row] = ""
    return "\n".join(lines).rstrip("\n")


def picture(name: str, variables: Mapping[str, str]) -> str:
    """Return the SVG of a scene."""
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    for command in SCENES[name]:
        console.print(Text.assemble(("$ ", "bold green"), (command, "bold")))
        console.print(Text.from_ansi(screen(typed(command, variables))))
        console.print()
    return console.export_svg(title="virtfleet", code_format=_SVG, unique_id=f"virtfleet-{name}")


def main() -> int:
    """Write all pictures; returns the exit code."""
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER
    target.mkdir(parents=True, exist_ok=True)
    with fleet() as variables:
        for name in SCENES:
            (target / f"{name}.svg").write_text(picture(name, variables))
    print("\n".join(str(target / f"{name}.svg") for name in SCENES))
    return 0


if __name__ == "__main__":
    sys.exit(main())
