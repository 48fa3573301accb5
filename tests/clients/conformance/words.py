"""The words of `cases.yaml`: what each step does and which fields it has. A file with any other word is refused.

Three kinds: what the client under test does (through its agent), what goes wrong, and what the harness itself does and
looks at, by stubs of its own and past the door.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

Step = dict[str, Any]
WORLDS = ("fake", "real")
CLIENT = frozenset({"background", "error", "result", "save", "takes_at_most_s"})


@dataclass(frozen=True, slots=True)
class Word:
    """Is a word.

    Attributes:
        meaning: What it does; the main value stands for `it`.
        fields: Its further fields.
        by_client: Whether the client under test does it, so that it may fail, run in the background and have results.
        fake_only: Whether only a fake fleet can do it.
    """

    meaning: str
    fields: frozenset[str] = frozenset()
    by_client: bool = False
    fake_only: bool = False


def _client(meaning: str, fields: str = "") -> Word:
    return Word(meaning, frozenset(fields.split()) | CLIENT, by_client=True)


def _word(meaning: str, fields: str = "", *, fake_only: bool = False) -> Word:
    return Word(meaning, frozenset(fields.split()), fake_only=fake_only)


WORDS: dict[str, Word] = {
    # The client under test.
    "create": _client("creates the domain and waits", "node start power_button_delay_s deadline_s"),
    "get": _client("reads the domain", "deadline_s at_old_name"),
    "list": _client("lists all domains below the parent", "page_size"),
    "update": _client("sets the display name; `etag` names a saved reading", "display_name etag"),
    "stop": _client("asks for a graceful stop and does not wait; `save` names the operation"),
    "wait": _client("waits for the saved operation", "deadline_s"),
    "cancel": _client("cancels the saved operation"),
    "watch": _client("follows a watch of domains under that label", "parent resnapshot"),
    "informer": _client("runs an informer of domains under that label, and waits until it is synced", "parent"),
    "hold": _client("stops the reader of the watch or informer"),
    "release": _client("lets it go on"),
    "console": _client("opens the console of `domain`; `goes_on`: where it broke", "domain goes_on"),
    "console_write": _client("types", "text"),
    "upload": _client(
        "uploads to the volume in one call; `goes_on`: from where the server got to",
        "size_bytes seed upload_id goes_on",
    ),
    "finish": _client("waits for what runs in the background under that label"),
    "until_watched": _client("waits until the watch stands like `is` (and its error like `error`)", "domain is"),
    "until_informed": _client("waits until the informer stands like `is`", "domain node is"),
    "until_console": _client("waits until the console says it, or has ended (with `error`)", "contains ended"),
    "expect_console": _client(
        "all that it said in all its openings is what the server keeps, byte by byte", "domain whole"
    ),
    # What goes wrong.
    "hold_answers": _word("the door passes on what the client sends, and keeps the answers back"),
    "freeze": _word("the door passes nothing on any more, in either direction; at once, or `after_sent_bytes`"),
    "stall": _word("the connections that stand carry nothing more without being closed; new ones do"),
    "cut": _word("the door aborts all connections of the client"),
    "refuse": _word("the door aborts all connections and refuses new ones"),
    "pass": _word("the door lets everything flow again"),
    "kill_gateway": _word("the gateway dies, as by SIGKILL, and another takes its place"),
    "drain_gateway": _word(
        "the gateway drains, as by SIGTERM, and another takes its place; the node `thaw` is thawed in between", "thaw"
    ),
    "freeze_node": _word("the node stops without closing anything"),
    "thaw_node": _word("it goes on"),
    "node_away": _word("the node cannot be reached, and the gateway knows"),
    "node_back": _word("it can, and the gateway knows"),
    "fail_calls": _word("calls of the method at the node fail", "method reason count after_effect", fake_only=True),
    "compact_logs": _word("the log of the node no longer reaches back", fake_only=True),
    "move": _word("the domain moves to another node", "to", fake_only=True),
    # The harness and the truth.
    "pause": _word("waits so many seconds: nothing can be looked at that tells the moment"),
    "given": _word("makes the domain", "node running power_button_delay_s"),
    "given_volume": _word("makes the volume and its content", "node size_bytes seed"),
    "others_update": _word("somebody else sets the display name", "display_name"),
    "others_delete": _word("somebody else deletes the domain"),
    "others_flood": _word("somebody else changes the domain so often, by so much", "times bytes"),
    "until_asked": _word("waits until the client has sent its request to the door"),
    "until_exists": _word("waits until the domain exists", "node"),
    "expect_domain": _word("the domain is like that", "generation state display_name"),
    "expect_absent": _word("there is no such domain", "node"),
    "expect_operations": _word("the domain had so many operations of the method", "method count"),
    "expect_volume": _word("the volume has that content", "size_bytes seed"),
    "expect_calls": _word(
        "the client has made so many calls of each method since the case began (those that have ended)"
    ),
    "expect_watches": _word(
        "the client has begun so many watches of the fleet afresh, and at least so many from a token"
    ),
}


class CasesError(ValueError):
    """The file of cases is wrong; the text says where."""


@dataclass(frozen=True, slots=True)
class Case:
    """Is one case.

    Attributes:
        name: Its name.
        proves: The promise that it holds.
        worlds: Where it runs.
        nodes: How many nodes the fleet has.
        domains: How many domains each has from the start.
        slow: Whether it takes so long that it runs by night only.
        steps: What is done.
    """

    name: str
    proves: str
    worlds: tuple[str, ...]
    steps: tuple[Step, ...]
    nodes: int = 2
    domains: int = 0
    slow: bool = False


def word_of(step: Step) -> str:
    """Return the word of a step."""
    return next(iter(step))


def read(path: Path) -> list[Case]:
    """Read cases.

    Raises:
        CasesError: A case has no name, an unknown field, an unknown word, or a word that its world has not.
    """
    document = yaml.safe_load(path.read_text())
    if not isinstance(document, dict) or set(document) != {"cases"}:
        raise CasesError(f"{path.name}: one key `cases` with a list is expected")
    cases = [_case(path.name, raw) for raw in document["cases"]]
    names = [case.name for case in cases]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise CasesError(f"{path.name}: {', '.join(twice)}: the name is there twice")
    return cases


def _case(file: str, given: Any) -> Case:
    if not isinstance(given, dict):
        raise CasesError(f"{file}: {given!r} is no case")
    name = given.get("name")
    where = f"{file}: {name}"
    missing = {"name", "proves", "worlds", "steps"} - given.keys()
    unknown = given.keys() - {"name", "proves", "worlds", "steps", "nodes", "domains", "slow"}
    if missing or unknown:
        raise CasesError(f"{where}: without {sorted(missing)}, unknown {sorted(map(str, unknown))}")
    if not given["worlds"] or set(given["worlds"]) - set(WORLDS):
        raise CasesError(f"{where}: `worlds` is a list of {', '.join(WORLDS)}")
    if not given["steps"]:
        raise CasesError(f"{where}: it has no steps")
    if "real" in given["worlds"] and ("nodes" in given or "domains" in given):
        raise CasesError(f"{where}: the real fleet has two nodes and no domains from the start")
    for number, step in enumerate(given["steps"], 1):
        _check(f"{where}: step {number}", step, given["worlds"])
    return Case(
        name=given["name"],
        proves=given["proves"],
        worlds=tuple(given["worlds"]),
        steps=tuple(given["steps"]),
        nodes=given.get("nodes", 2),
        domains=given.get("domains", 0),
        slow=given.get("slow", False),
    )


def _check(where: str, step: Any, worlds: list[str]) -> None:
    if not isinstance(step, dict) or not step:
        raise CasesError(f"{where}: {step!r} is no step: the first key is the word")
    name = word_of(step)
    word = WORDS.get(name)
    if word is None:
        raise CasesError(f"{where}: unknown word `{name}`; the words: {', '.join(sorted(WORDS))}")
    unknown = step.keys() - word.fields - {name}
    if unknown:
        raise CasesError(
            f"{where}: `{name}` has no field {', '.join(sorted(map(str, unknown)))}; it has {', '.join(sorted(word.fields)) or 'none'}"
        )
    if word.fake_only and "real" in worlds:
        raise CasesError(f"{where}: `{name}` can only be done on a fake fleet")
