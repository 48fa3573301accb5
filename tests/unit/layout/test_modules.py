"""How modules are named and cut, and what they may reach for."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from tests.unit.layout import tree

EMPTY_NAMES = {"utils", "util", "helpers", "helper", "manager", "base", "misc", "common_stuff", "tools_common", "stuff"}
# The aim is 500; beyond this a module surely is about more than one thing.
LONGEST_MODULE_LINES = 600
# Longer than that, each for its reason.
LONG_MODULES: dict[str, str] = {
    "services/common/virtfleet_service/errors.py": "a catalogue: one class a reason, three lines each",
}
# Where processes come from. The launcher is the parent of guests; of servers all else goes through one module, a
# client starts its one helper process, and that one the program that is the transport.
SPAWNING = {
    "services/common/virtfleet_service/process.py",
    "clients/python/virtfleet_client/transport.py",
    "clients/cli/virtfleet_cli/proxy.py",
}
SPAWNING_FOLDERS = ("services/launcher/virtfleet_launcher/",)
SPAWN_CALLS = re.compile(
    r"^(subprocess\.\w+|os\.(fork|forkpty|posix_spawnp?|spawn\w+|exec\w+|system|popen)|asyncio\.create_subprocess_\w+)$"
)

# The reason stands behind it, or in a comment on the line above.
IGNORED = re.compile(r"#\s*type:\s*ignore\b(\[[\w, -]+\])?\s*[#:-]*\s*(?P<reason>\w.*)?$")


def test_names_say_what_a_module_is_about() -> None:
    assert not [
        str(path)
        for path in tree.modules()
        if EMPTY_NAMES & {path.stem, *(part for part in path.parts[:-1] if part != "tools")}
    ]


def test_modules_are_about_one_thing() -> None:
    lines = {str(path): len(tree.text(path).splitlines()) for path in tree.modules()}
    too_long = {
        path: count for path, count in lines.items() if count > LONGEST_MODULE_LINES and path not in LONG_MODULES
    }
    assert not too_long


def test_exceptions_for_long_modules_are_still_needed() -> None:
    short = {path for path in LONG_MODULES if len(tree.text(Path(path)).splitlines()) <= LONGEST_MODULE_LINES}
    assert not short


def test_only_one_module_spawns_processes() -> None:
    offenders = []
    for path in tree.product_modules():
        if str(path) not in SPAWNING and not str(path).startswith(SPAWNING_FOLDERS):
            offenders += [f"{path}: {name}" for name in sorted(tree.called(path)) if SPAWN_CALLS.match(name)]
            if "subprocess" in tree.imported(path):
                offenders.append(f"{path}: imports subprocess")
    assert not offenders


def test_no_shell_anywhere() -> None:
    shell = re.compile(
        r"shell\s*=\s*True|os\.system\(|create_subprocess_shell|\[\s*[\"'](/bin/)?(ba)?sh[\"'],\s*[\"']-c"
    )
    assert not [str(path) for path in tree.modules() if shell.search(tree.text(path)) and "layout" not in path.parts]


def test_the_launcher_needs_the_standard_library_alone() -> None:
    allowed = sys.stdlib_module_names | {"virtfleet_launcher"}
    offenders = [
        f"{path}: {name}"
        for path in tree.product_modules()
        if path.is_relative_to("services/launcher")
        for name in sorted(tree.imported(path))
        if name.partition(".")[0] not in allowed
    ]
    assert not offenders


def test_the_product_waits_for_events_and_does_not_sleep() -> None:
    # The blocking client has nothing to wait for between two tries of a call.
    sleeps = [path for path in tree.product_modules() if "time.sleep" in tree.called(path)]
    assert not [str(path) for path in sleeps if path != Path("clients/python/virtfleet_client/sync.py")]


def test_the_product_does_not_import_tools_or_tests() -> None:
    offenders = [
        f"{path}: {name}"
        for path in tree.product_modules()
        for name in sorted(tree.imported(path))
        if name.partition(".")[0] in {"tools", "tests", "bench"}
    ]
    assert not offenders


def test_tests_use_the_real_thing_and_skip_nothing() -> None:
    forbidden = re.compile(r"unittest\.mock|MagicMock|pytest\.(skip|importorskip|xfail|mark\.(skip|skipif|xfail))")
    assert not [
        str(path)
        for path in tree.modules()
        if path.parts[0] == "tests" and path.parent.name != "layout" and forbidden.search(tree.text(path))
    ]


def test_every_suppressed_check_has_a_reason() -> None:
    offenders = []
    for path in tree.modules():
        above = ""
        for number, line in enumerate(tree.text(path).splitlines(), 1):
            found = IGNORED.search(line)
            if found and not found["reason"] and not above.lstrip().startswith("#"):
                offenders.append(f"{path}:{number}")
            above = line
    assert not offenders


def test_errors_are_not_swallowed() -> None:
    swallowed = re.compile(r"except(\s+(Base)?Exception)?:\s*\n\s+(pass|continue|\.\.\.)\s*\n")
    assert not [
        str(path) for path in tree.modules() if swallowed.search(tree.text(path)) and "layout" not in path.parts
    ]
