"""How the service ends when it cannot start: a line that says why and an exit code of its kind, no trace."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.integration.network.rig import Node


def start(node: Node, *flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "virtfleet_network", "--node", "n1", "--state-dir", str(node.folder / "state")]
    command += ["--run-dir", str(node.folder / "run"), *flags]
    return subprocess.run([*node.prefix, *command], capture_output=True, text=True, check=False, timeout=30)


def test_what_is_wrong_at_the_start_is_told_in_a_line(bare_node: Node, tmp_path: Path) -> None:
    policy = tmp_path / "policy.toml"
    policy.write_text("no policy")
    done = start(bare_node, "--policy-file", str(policy))
    assert done.returncode == 2
    assert str(policy) in done.stderr
    assert "Traceback" not in done.stderr

    done = start(bare_node, "--listen", "127.0.0.1:0", "--identity-dir", str(tmp_path))
    assert done.returncode == 1
    assert f"{tmp_path}/network.crt" in done.stderr
    assert "Traceback" not in done.stderr

    (bare_node.folder / "state" / "network.audit.log").unlink()
    (bare_node.folder / "state" / "network.audit.log").mkdir()
    done = start(bare_node)
    assert done.returncode == 1
    assert "network.audit.log" in done.stderr
    assert "Traceback" not in done.stderr
