"""The launcher's settings: a file, flags over it, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from virtfleet_launcher.settings import Settings, SettingsError, read

PACKAGE = Path(__file__).parents[3] / "services" / "launcher" / "virtfleet_launcher"


def test_flags_win_over_the_file(tmp_path: Path) -> None:
    config = tmp_path / "launcher.toml"
    config.write_text(
        """
        run_dir = "/run/a"
        executables = ["/bin/a", "/bin/b"]
        allow_root_helpers = ["/bin/a"]
        uids = "100-200"
        groups = [108]
        ring_bytes = 8192
        clients = ["compute:1001"]
        [ambient_capabilities]
        "/bin/a" = ["net_admin"]
        """
    )
    settings, show = read(
        ["--config", str(config), "--run-dir", "/run/b", "--ambient-capability", "/bin/a=net_raw", "--show-settings"]
    )
    assert json.loads(show)["run_dir"] == "/run/b"
    assert settings == Settings(
        run_dir="/run/b",
        executables=("/bin/a", "/bin/b"),
        allow_root_helpers=("/bin/a",),
        uids=(100, 200),
        groups=(108,),
        ring_bytes=8192,
        clients=("compute:1001",),
        ambient_capabilities={"/bin/a": ("net_admin", "net_raw")},
    )


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--run-dir"], "--run-dir"),
        (["--run-dir", "/run/a", "--what"], "--what"),
        (["--run-dir", "/run/a", "stray"], "stray"),
        (["--run-dir=/run/a", "--ring-bytes=many"], "ring_bytes"),
        (["--run-dir=/run/a", "--single-user=yes"], "--single-user=yes"),
    ],
)
def test_wrong_flags_are_named(arguments: list[str], named: str) -> None:
    with pytest.raises(SettingsError, match=f"^{named}: "):
        read(arguments)


def test_help_names_every_flag() -> None:
    assert "--allow-root-helper" in read(["--help"])[1]


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "run_dir"),
        ("run_dir = 3", "run_dir"),
        ('run_dir = "/run/../x"', "run_dir"),
        ('run_dir = "/run/a"\nsecret = 1', "secret"),
        ('run_dir = "/run/a"\nuids = "0-5"', "uids"),
        ('run_dir = "/run/a"\nuids = "9-5"', "uids"),
        ('run_dir = "/run/a"\nuids = 5', "uids"),
        ('run_dir = "/run/a"\ngroups = [0]', "groups"),
        ('run_dir = "/run/a"\nexecutables = ["sh"]', "executables"),
        ('run_dir = "/run/a"\nexecutables = "/bin/sh"', "executables"),
        ('run_dir = "/run/a"\nallow_root_helpers = ["/bin/sh"]', "allow_root_helpers"),
        ('run_dir = "/run/a"\nexecutables = ["/a"]\nambient_capabilities = {"/a" = ["all"]}', "ambient_capabilities"),
        ('run_dir = "/run/a"\nambient_capabilities = {"/a" = ["net_raw"]}', "ambient_capabilities"),
        ('run_dir = "/run/a"\nring_bytes = 1', "ring_bytes"),
        ('run_dir = "/run/a"\nlog_bytes = true', "log_bytes"),
        ('run_dir = "/run/a"\nclients = ["../x"]', "clients"),
        ('run_dir = "/run/a"\ncgroup_parent = "x"', "cgroup_parent"),
        ("= broken", "config"),
    ],
)
def test_wrong_settings_are_named(tmp_path: Path, text: str, named: str) -> None:
    config = tmp_path / "launcher.toml"
    config.write_text(text)
    with pytest.raises(SettingsError, match=f"^{named}: "):
        read(["--config", str(config)])


def test_it_needs_the_standard_library_alone_and_little_of_it() -> None:
    program = (
        f"import sys; sys.path.insert(0, {str(PACKAGE.parent)!r})\n"
        "import virtfleet_launcher.app\n"
        "print(' '.join(sys.modules))"
    )
    modules = subprocess.run(
        [sys.executable, "-I", "-S", "-c", program], check=True, capture_output=True, text=True
    ).stdout.split()
    assert not {
        "argparse",
        "asyncio",
        "dataclasses",
        "inspect",
        "subprocess",
        "threading",
        "pathlib",
        "logging",
        "multiprocessing",
    } & set(modules)
    foreign = (
        {name.partition(".")[0] for name in modules} - set(sys.stdlib_module_names) - {"virtfleet_launcher", "__main__"}
    )
    assert {name for name in foreign if not name.startswith("_")} == set()
