"""Files of resources: what they may say, and where each fault is told to be."""

from __future__ import annotations

import os
import threading
from contextlib import suppress
from pathlib import Path

import pytest

from virtfleet.compute.v1 import domain_spec_pb2
from virtfleet_cli import tree
from virtfleet_cli.documents import DocumentError, load
from virtfleet_cli.input import LIMIT_BYTES, InputError

WEB = """\
# A comment
kind: domain
node: n1
id: web
labels:
  app: web
  "example.com/team": a
spec:
  memory: {maximum_bytes: 1.5GiB}
  cpu: {vcpuCount: 2}
  on_exit: {reboot: restart}
  disks:
    root: {volume: pools/p/volumes/v}
---
kind: Volume
name: n1/p/data
spec:
  capacity_bytes: '1073741824'
"""


def write(tmp_path: Path, text: str | bytes) -> str:
    path = tmp_path / "file.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return str(path)


def test_what_a_file_says(tmp_path: Path) -> None:
    web, data = load(write(tmp_path, WEB))
    assert web.name == "nodes/n1/domains/web"
    assert web.resource.spec.memory.maximum_bytes == 3 << 29
    assert web.resource.spec.cpu.vcpu_count == 2
    assert web.resource.spec.on_exit.reboot == domain_spec_pb2.EXIT_ACTION_RESTART
    assert web.resource.spec.disks["root"].volume == "pools/p/volumes/v"
    assert set(web.paths) == {
        "labels.app",
        "labels.`example.com/team`",
        "spec.memory.maximum_bytes",
        "spec.cpu.vcpu_count",
        "spec.on_exit.reboot",
        "spec.disks.root.volume",
    }
    assert data.name == "nodes/n1/pools/p/volumes/data"
    assert data.resource.spec.capacity_bytes == 1 << 30
    assert (web.where, data.where) == (f"{tmp_path}/file.yaml:2", f"{tmp_path}/file.yaml:15")


def test_json_and_lists_are_files_too(tmp_path: Path) -> None:
    text = '[{"kind": "domain", "name": "n1/a", "spec": {}}, {"kind": "domain", "name": "n1/b"}]'
    assert [one.name for one in load(write(tmp_path, text))] == ["nodes/n1/domains/a", "nodes/n1/domains/b"]


def test_the_node_may_come_from_the_command(tmp_path: Path) -> None:
    assert load(write(tmp_path, "kind: domain\nname: a\n"), "n7")[0].name == "nodes/n7/domains/a"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (
            "kind: domain\nname: n1/a\nspec:\n  memroy: {}\n",
            ":4:3: `spec` has no field `memroy`; did you mean `memory`?",
        ),
        (
            "kind: domain\nname: n1/a\nspec: {memory: {maximum_bytes: much}}\n",
            ":3:32: `spec.memory.maximum_bytes` must",
        ),
        ("kind: domain\nname: n1/a\nspec: {memory: 5}\n", ":3:16: `spec.memory` must be a mapping"),
        ("kind: domain\nname: n1/a\nspec: {on_exit: {reboot: explode}}\n", "`explode` is none of"),
        ("kind: domain\nname: n1/a\nspec: {deletion_protection: perhaps}\n", "must be true or false"),
        ("kind: domian\nname: n1/a\n", ":1:7: there is no kind `domian`; did you mean `domain`?"),
        ("name: n1/a\n", ":1:1: `kind` is missing"),
        ("kind: domain\nspec: {}\n", "`name` is missing"),
        ("kind: domain\nname: a\n", "the node of `a` is missing"),
        ("kind: domain\nname: a/b/c/d\n", "is no name of a domain"),
        ("kind: domain\nname: n1/a\nname: n1/b\n", ":3:1: `name` stands here twice"),
        ("kind: domain\n  name: [\n", ":2:7: "),
        ("{{{", ":1:"),
        ("5\n", "a resource must be a mapping"),
        ("# nothing\n", "there is no resource in it"),
        (b"\xff\xfe\x00", "is no UTF-8"),
        ("kind: domain\nname: n1/a\nlabels: {a: [1]}\n", "must be one value"),
    ],
)
def test_faults_are_told_with_their_place(tmp_path: Path, text: str | bytes, says: str) -> None:
    with pytest.raises(ValueError, match="file") as told:
        load(write(tmp_path, text))
    assert says in str(told.value)


def test_a_huge_file_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "huge.yaml"
    with path.open("wb") as file:
        file.truncate(1 << 30)
    with pytest.raises(InputError, match=f"more than {LIMIT_BYTES >> 20} MiB"):
        load(str(path))


def chain(names: int, each: str) -> str:
    return "a0: &a0 [x]\n" + "".join(f"a{n + 1}: &a{n + 1} [{each.format(n=n)}]\n" for n in range(names))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (chain(9, ",".join(["*a{n}"] * 10)), ":7:5: with its aliases it has more than 250,000 values"),
        (chain(5000, "*a{n}"), ":64:6: with its aliases it is nested more than 64 deep"),
        ("kind: domain\nlabels: &a {b: *a}\n", ":2:16: `*a` stands inside of what it stands for"),
        ("[" * 100_000, ":1:65: it is nested more than 64 deep"),
        ("? " * 1000, "it is nested more than 64 deep"),
        ("kind: \0", "unacceptable character #x0000"),
    ],
    ids=["bomb", "chain", "itself", "brackets", "keys", "control character"],
)
def test_a_tree_that_no_memory_holds_is_refused(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(DocumentError) as told:
        load(write(tmp_path, text))
    assert says in str(told.value)
    assert len(str(told.value).splitlines()) == 1


def test_a_file_with_too_many_values_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tree, "NODE_LIMIT", 100)
    with pytest.raises(DocumentError, match=":101:5: there are more than 100 values in it"):
        load(write(tmp_path, "--- x\n" * 101))


def test_an_alias_stands_for_what_it_names(tmp_path: Path) -> None:
    text = "- {kind: domain, name: n1/a, labels: &l {app: web}}\n- {kind: domain, name: n1/b, labels: *l}\n"
    assert [dict(one.resource.labels) for one in load(write(tmp_path, text))] == [{"app": "web"}] * 2


@pytest.mark.parametrize("text", ["kind: domain\nname: n1/a\n", "x" * (LIMIT_BYTES + 1)], ids=["small", "endless"])
def test_a_pipe_is_a_file(tmp_path: Path, text: str) -> None:
    os.mkfifo(tmp_path / "pipe")

    def give() -> None:
        # Whoever refuses it does not read it to its end.
        with suppress(BrokenPipeError), (tmp_path / "pipe").open("w") as pipe:
            pipe.write(text)

    giver = threading.Thread(target=give)
    giver.start()
    if len(text) < LIMIT_BYTES:
        assert load(str(tmp_path / "pipe"))[0].name == "nodes/n1/domains/a"
    else:
        with pytest.raises(InputError, match="more than 16 MiB"):
            load(str(tmp_path / "pipe"))
    giver.join(10)
    assert not giver.is_alive()
