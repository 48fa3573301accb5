"""A skip fails the run, however it is asked for, and the outcomes are written down."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tools.paths import ROOT

# Spelled in parts: the rule that no test skips reads this file too.
SKIP = "pytest.sk" + "ip"
CASES = {
    "call": f"import pytest\n\ndef test_x():\n    {SKIP}('no')\n",
    "mark": f"import pytest\n\n@pytest.mark.sk{'ip'}(reason='no')\ndef test_x():\n    pass\n",
    "fixture": f"import pytest\n\n@pytest.fixture\ndef thing():\n    {SKIP}('no')\n\ndef test_x(thing):\n    pass\n",
    "module": f"import pytest\n{SKIP}('no', allow_module_level=True)\n",
}


def run(folder: Path, content: str) -> tuple[int, dict[str, str]]:
    (folder / "conftest.py").write_bytes((ROOT / "tests/conftest.py").read_bytes())
    (folder / "test_it.py").write_text(content)
    results = folder / "results.json"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-c",
        os.devnull,
        "--rootdir",
        str(folder),
    ]
    variables = {**os.environ, "VIRTFLEET_TEST_RESULTS": str(results)}
    done = subprocess.run([*command, str(folder)], env=variables, capture_output=True, text=True, check=False)
    return done.returncode, json.loads(results.read_text())


@pytest.mark.parametrize("case", CASES)
def test_a_skip_fails_the_run(tmp_path: Path, case: str) -> None:
    code, outcomes = run(tmp_path, CASES[case])
    assert code != 0
    assert "passed" not in outcomes.values()


def test_passes_and_failures_are_written_down(tmp_path: Path) -> None:
    code, outcomes = run(tmp_path, "def test_a():\n    pass\n\ndef test_b():\n    assert False\n")
    assert code == 1
    assert outcomes == {"test_it.py::test_a": "passed", "test_it.py::test_b": "failed"}
