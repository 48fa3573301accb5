"""`virtfleet join`, as far as it needs no gateway."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from virtfleet_service.commands import app

TOKEN = f"vf1.n1.secret.{'0' * 64}"


@pytest.mark.parametrize(("mode", "told"), [(0o600, False), (0o640, True), (0o644, True)])
def test_a_token_that_others_can_read_is_told(tmp_path: Path, mode: int, *, told: bool) -> None:
    token = tmp_path / "token"
    token.write_text(TOKEN)
    token.chmod(mode)
    # Nobody listens on port 1.
    options = {"gateway": "127.0.0.1:1", "token-file": token, "directory": tmp_path / "identity"}
    arguments = [f"--{name}={value}" for name, value in options.items()]
    result = CliRunner().invoke(app, [*arguments, "--endpoint=compute=127.0.0.1:2"])
    assert result.exit_code == 1
    assert ("can be read by others" in result.output) is told
    assert "secret" not in result.output
