"""Runs one case: each step of `words` is a method here, or an error."""

from __future__ import annotations

import time
import uuid
from collections import Counter
from typing import Any, cast

from tests.clients.conformance.agent_speech import content
from tests.clients.conformance.agents import Agent, Json, Pending, file_of
from tests.clients.conformance.door import Door
from tests.clients.conformance.truth import until
from tests.clients.conformance.words import CLIENT, WORDS, Case, CasesError, Step, word_of
from tests.clients.conformance.worlds import FakeWorld, World
from virtfleet.compute.v1 import domain_pb2

_CLIENT_SECONDS = 45.0
_GRACE_SECONDS = 5.0
_ASKED_BYTES = 64
"""More than a ping and its envelope, less than any request."""
_SETTLE_SECONDS = 0.15


class CaseFailed(AssertionError):
    """A step did not go as it should; the text says which and how."""


class Run:
    """Is one run of one case by one agent in one world. Cleans up after itself.

    Attributes:
        patience_seconds: How long is waited for what a client must come to.
    """

    def __init__(self, case: Case, world: World, door: Door, agent: Agent) -> None:
        self.patience_seconds = _CLIENT_SECONDS
        self._case = case
        self._world = world
        self._truth = world.truth
        self._door = door
        self._agent = agent
        self._mark = uuid.uuid4().hex[:8]
        self._names: dict[str, str] = {}
        self._old_names: dict[str, str] = {}
        self._uids: dict[str, str] = {}
        self._volumes: dict[str, str] = {}
        self._saved: dict[str, Json] = {}
        self._pending: dict[str, tuple[Pending, float]] = {}
        self._heard: dict[str, str] = {}
        self._consoles: dict[str, str] = {}

    def __call__(self) -> None:
        """Run all steps.

        Raises:
            CaseFailed: One did not go as it should.
        """
        self._door.let_pass()
        self._counts = self._world.counts()
        self._watches = self._world.watches()
        self._own = Counter(self._truth.calls)
        # Nobody begins before all have looked.
        self._world.meet()
        files = {key: file_of(self._world.files, key) for key in ("ca_file", "cert_file", "key_file")}
        failed = True
        try:
            self._agent.call("connect", address=f"tls://{self._door.address}", **files)
            for number, step in enumerate(self._case.steps, 1):
                self._step(number, step)
            assert not self._pending, f"nobody has waited for {', '.join(self._pending)}"
            failed = False
        finally:
            self._clean(quietly=failed)

    def _clean(self, *, quietly: bool) -> None:
        self._world.heal()
        self._door.let_pass()
        try:
            self._agent.call("close")
        except AssertionError:
            # The first failure is the one to tell.
            if not quietly:
                raise
        for name in self._names.values():
            self._truth.delete(name)
        for name in self._volumes.values():
            self._truth.delete_volume(name)

    def _step(self, number: int, step: Step) -> None:
        name = word_of(step)
        method = getattr(self, f"_{name}", None)
        if method is None or name not in WORDS:
            raise CasesError(f"{self._case.name}: step {number}: unknown word `{name}`")
        try:
            method(step[name], {key: value for key, value in step.items() if key != name})
        except AssertionError as error:
            raise CaseFailed(
                f"{self._agent.name} on the {self._world.name} fleet, case {self._case.name}, step {number} "
                f"{step}:\n{error}\nThe case proves: {self._case.proves}\n{self._agent.said()}"
            ) from error

    # What the client does.

    def _client(self, do: str, step: Json, **fields: Any) -> None:
        pending = self._agent.begin(do, **fields)
        if "background" in step:
            self._pending[step["background"]] = (pending, time.monotonic())
        else:
            self._judge(pending, time.monotonic(), step)

    def _judge(self, pending: Pending, since: float, step: Json) -> None:
        answer = pending.answer(self.patience_seconds + _GRACE_SECONDS)
        took = time.monotonic() - since
        if "error" in step:
            assert "error" in answer, f"it should fail with {step['error']}, and answers {answer['result']}"
            self._like_error(answer["error"], step["error"])
        else:
            assert "result" in answer, f"it fails with {answer['error']}"
            self._like(answer["result"], step.get("result", {}))
            if "save" in step:
                self._saved[step["save"]] = answer["result"]
        assert took <= step.get("takes_at_most_s", took), f"it takes {took:.1f} s"

    def _like_error(self, error: Json, wanted: Json) -> None:
        wanted = dict(wanted)
        if "new_name" in wanted:
            wanted["new_name"] = self._names[wanted["new_name"]]
        self._like(error, wanted)

    def _like(self, found: Any, wanted: Any) -> None:
        for key, value in wanted.items():
            assert isinstance(found, dict), f"{found} has no {key}"
            assert key in found, f"{found} has no {key}"
            if isinstance(value, dict):
                self._like(found[key], value)
            elif isinstance(value, list) and not isinstance(found[key], list):
                assert found[key] in value, f"{key} is {found[key]!r}, none of {value}: {found}"
            else:
                assert found[key] == value, f"{key} is {found[key]!r}, not {value!r}: {found}"

    def _create(self, domain: str, step: Json) -> None:
        self._name(domain, step["node"])
        fields = {key: step[key] for key in step.keys() - CLIENT - {"node"}}
        self._client("create", step, parent=f"nodes/{step['node']}", domain_id=self._id(domain), **fields)

    def _get(self, domain: str, step: Json) -> None:
        name = self._old_names[domain] if step.get("at_old_name") else self._names[domain]
        fields = {key: step[key] for key in ("deadline_s",) if key in step}
        self._client("get", step, name=name, **fields)

    def _list(self, parent: str, step: Json) -> None:
        self._client("list", step, parent=parent, page_size=step.get("page_size", 0))

    def _update(self, domain: str, step: Json) -> None:
        etag = self._saved[step["etag"]]["etag"] if "etag" in step else ""
        self._client("update", step, name=self._names[domain], display_name=step["display_name"], etag=etag)

    def _stop(self, domain: str, step: Json) -> None:
        self._client("stop", step, name=self._names[domain])

    def _wait(self, label: str, step: Json) -> None:
        fields = {key: step[key] for key in ("deadline_s",) if key in step}
        self._client("wait", step, operation=self._saved[label]["operation"], **fields)

    def _cancel(self, label: str, step: Json) -> None:
        self._client("cancel", step, operation=self._saved[label]["operation"])

    def _watch(self, label: str, step: Json) -> None:
        fields = {key: step[key] for key in ("resnapshot",) if key in step}
        self._client("watch", step, **{"as": label}, parent=step["parent"], **fields)

    def _informer(self, label: str, step: Json) -> None:
        self._client("informer", step, **{"as": label}, parent=step["parent"])

    def _hold(self, label: str, step: Json) -> None:
        self._client("hold", step, **{"as": label})

    def _release(self, label: str, step: Json) -> None:
        self._client("release", step, **{"as": label})

    def _console(self, label: str, step: Json) -> None:
        fields: Json = {}
        if step.get("goes_on"):
            before = self._agent.call("console_read", **{"as": label})
            self._heard[label] = self._heard.get(label, "") + before["text"]
            assert not before["gap"], before
            fields = {"epoch": before["epoch"], "offset": before["next_offset"]}
        self._client("console", step, **{"as": label}, name=self._names[step["domain"]], **fields)

    def _console_write(self, label: str, step: Json) -> None:
        self._client("console_write", step, **{"as": label}, text=step["text"])

    def _upload(self, volume: str, step: Json) -> None:
        name = self._volumes[volume]
        fields = {key: step[key] for key in ("size_bytes", "seed", "upload_id")}
        if step.get("goes_on"):
            fields["offset_bytes"] = self._truth.received_bytes(name, step["upload_id"])
            assert fields["offset_bytes"] > 0, "the server has kept nothing of the upload that broke"
        self._client("upload", step, name=name, **fields)

    def _finish(self, label: str, step: Json) -> None:
        pending, since = self._pending.pop(label)
        self._judge(pending, since, step)

    def _until_like(self, look: Any, step: Json) -> None:
        ends_at = time.monotonic() + self.patience_seconds
        while True:
            found = look()
            try:
                self._like(found, step.get("is", {}))
                if "error" in step:
                    assert found["error"], f"there is no error: {found}"
                    self._like_error(found["error"], step["error"])
                return
            except AssertionError:
                if time.monotonic() > ends_at:
                    raise
            time.sleep(0.03)

    def _until_watched(self, label: str, step: Json) -> None:
        name = self._names[step["domain"]]
        self._until_like(lambda: self._agent.call("watched", **{"as": label}, name=name), step)

    def _until_informed(self, label: str, step: Json) -> None:
        node = f"nodes/{step['node']}" if "node" in step else ""
        uid = self._uids[step["domain"]]
        self._until_like(lambda: self._agent.call("informed", **{"as": label}, uid=uid, node=node), step)

    def _until_console(self, label: str, step: Json) -> None:
        if "contains" in step:

            def heard() -> Json:
                found = self._agent.call("console_read", **{"as": label})
                return {**found, "contains": step["contains"] in found["text"]}

            self._until_like(heard, {"is": {"contains": True}})
        else:
            wanted = {"is": {"ended": True}, **{key: step[key] for key in ("error",) if key in step}}
            self._until_like(lambda: self._agent.call("console_read", **{"as": label}), wanted)

    def _expect_console(self, label: str, step: Json) -> None:
        kept = self._truth.console_log(self._names[step["domain"]]).decode(errors="replace")
        found = self._agent.call("console_read", **{"as": label})
        heard = self._heard.get(label, "") + found["text"]
        assert not found["gap"], found
        assert heard == kept, f"it heard {heard!r}, the server keeps {kept!r}"

    # What goes wrong.

    def _hold_answers(self, _: object, _step: Json) -> None:
        self._door.hold_answers()

    def _freeze(self, how: Json | None, _step: Json) -> None:
        self._door.freeze(**(how or {}))

    def _stall(self, _: object, _step: Json) -> None:
        self._door.stall()

    def _cut(self, _: object, _step: Json) -> None:
        self._door.cut()

    def _refuse(self, _: object, _step: Json) -> None:
        self._door.refuse()

    def _pass(self, _: object, _step: Json) -> None:
        self._door.let_pass()

    def _kill_gateway(self, _: object, _step: Json) -> None:
        self._world.replace_gateway(drain=False, thaw="")

    def _drain_gateway(self, _: object, step: Json) -> None:
        self._world.replace_gateway(drain=True, thaw=step.get("thaw", ""))

    def _freeze_node(self, node: str, _step: Json) -> None:
        self._world.freeze(node)

    def _thaw_node(self, node: str, _step: Json) -> None:
        self._world.thaw(node)

    def _node_away(self, node: str, _step: Json) -> None:
        self._world.away(node)

    def _node_back(self, node: str, _step: Json) -> None:
        self._world.thaw(node)
        until(lambda: node not in self._truth.unreachable(), f"{node} is back")

    def _fail_calls(self, node: str, step: Json) -> None:
        cast("FakeWorld", self._world).fail_calls(
            node,
            method=step["method"],
            reason=step["reason"],
            count=step.get("count", 0),
            after_effect=step.get("after_effect", False),
        )

    def _compact_logs(self, node: str, _step: Json) -> None:
        cast("FakeWorld", self._world).compact(node)

    def _move(self, domain: str, step: Json) -> None:
        old = self._old_names[domain] = self._names[domain]
        self._names[domain] = cast("FakeWorld", self._world).move(old, step["to"])

    # The harness and the truth.

    def _pause(self, seconds: float, _step: Json) -> None:
        time.sleep(seconds)

    def _given(self, domain: str, step: Json) -> None:
        name = self._name(domain, step["node"])
        made = self._truth.create(
            name, running=step.get("running", False), power_button_delay_s=step.get("power_button_delay_s", 0)
        )
        self._uids[domain] = made.uid

    def _given_volume(self, volume: str, step: Json) -> None:
        pool = f"c-{self._mark}"
        self._volumes[volume] = self._truth.create_volume(step["node"], pool, step["size_bytes"], step["seed"])

    def _others_update(self, domain: str, step: Json) -> None:
        self._truth.update(self._names[domain], "display_name", display_name=step["display_name"])

    def _others_delete(self, domain: str, _step: Json) -> None:
        self._truth.delete(self._names[domain])

    def _others_flood(self, domain: str, step: Json) -> None:
        for number in range(step["times"]):
            payload = f"{number:08d}".ljust(step["bytes"], "x")
            self._truth.update(self._names[domain], "annotations", annotations={"payload": payload})

    def _until_asked(self, _: object, _step: Json) -> None:
        least = _ASKED_BYTES
        until(lambda: self._door.sent_bytes >= least and self._door.stands, "the client has sent its request")

    def _until_exists(self, domain: str, step: Json) -> None:
        name = self._name(domain, step["node"])
        until(lambda: self._truth.get(name), f"{name} exists")

    def _expect_domain(self, domain: str, step: Json) -> None:
        found = self._truth.get(self._names[domain])
        assert found is not None, f"there is no {self._names[domain]}"
        self._like(
            {
                "generation": found.generation,
                "display_name": found.display_name,
                "state": domain_pb2.DomainState.Name(found.status.state).removeprefix("DOMAIN_STATE_"),
            },
            step,
        )

    def _expect_absent(self, domain: str, step: Json) -> None:
        found = self._truth.get(self._name(domain, step["node"]))
        assert found is None, f"it exists: {found}"

    def _expect_operations(self, domain: str, step: Json) -> None:
        methods = Counter(self._truth.operations(self._names[domain]))
        assert methods[step["method"]] == step["count"], f"the server has had {dict(methods)}"

    def _expect_volume(self, volume: str, step: Json) -> None:
        found = self._truth.volume_content(self._volumes[volume])
        assert len(found) == step["size_bytes"], f"it has {len(found)} bytes"
        assert found == content(step["seed"], step["size_bytes"]), "it holds something else"

    def _expect_calls(self, wanted: dict[str, int], _step: Json) -> None:
        def found() -> dict[str, int]:
            counts = self._world.counts() - self._counts
            own = self._truth.calls - self._own
            return {method: counts[method] - own[method] for method in wanted}

        sharers = self._world.sharers
        expected = {method: count * sharers for method, count in wanted.items()}
        self._world.meet()
        ends_at = time.monotonic() + 5
        while found() != expected and time.monotonic() < ends_at:
            time.sleep(0.05)
        time.sleep(_SETTLE_SECONDS)
        last = found()
        self._world.meet()
        assert last == expected, f"the gateway has had {last} from {sharers} clients"

    def _expect_watches(self, wanted: dict[str, int], _step: Json) -> None:
        sharers = self._world.sharers
        self._world.meet()
        fresh, resumed = (now - before for now, before in zip(self._world.watches(), self._watches, strict=True))
        self._world.meet()
        said = f"{fresh} watches began afresh, {resumed} from a token, of {sharers} clients"
        assert fresh == wanted["fresh"] * sharers, said
        assert resumed >= wanted["resumed_at_least"] * sharers, said

    # Names.

    def _id(self, domain: str) -> str:
        return f"{domain}-{self._mark}"

    def _name(self, domain: str, node: str) -> str:
        return self._names.setdefault(domain, f"nodes/{node}/domains/{self._id(domain)}")
