"""The agent of the Python clients: `python -m tests.clients.conformance.python_agent [--asyncio]`."""

from __future__ import annotations

import asyncio
import json
import queue
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

from google.longrunning import operations_pb2
from google.protobuf import empty_pb2

from tests.clients.conformance import agent_speech as speech
from virtfleet.compute.v1 import console_pb2, domain_pb2
from virtfleet_client import Fleet, Informer, PartialList, connect
from virtfleet_client.informer import Change

Json = dict[str, Any]


class _Watch:
    def __init__(self, fleet: Fleet, request: Json) -> None:
        self.watched = speech.Watched()
        self.held = speech.Held(threading.Event())
        self._follow = fleet.watch(speech.watching(request), resnapshot=request.get("resnapshot", False))
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        try:
            for answer in self._follow:
                if answer.changes:
                    with self.held.passing() as gate:
                        gate.wait()
                self.watched.take(answer)
        except Exception as error:  # noqa: BLE001 - the harness judges it
            self.watched.error = speech.error_of(error)
        self.watched.ended = True

    def json(self, name: str) -> Json:
        self.watched.held = self.held.stands
        return self.watched.json(name)

    def close(self) -> None:
        self.held.release()
        self._follow.close()
        self._thread.join(10)


class _Informed:
    def __init__(self, fleet: Fleet, request: Json) -> None:
        self.told = speech.Told()
        self.held = speech.Held(threading.Event())
        self.domains = Informer(fleet, domain_pb2.Domain, parent=request["parent"])
        self.domains.handle(self._take)
        self.domains.__enter__()
        self.domains.wait_synced(request.get("deadline_s", 30))

    def _take(self, change: Change[domain_pb2.Domain]) -> None:
        if change.resource is not None:
            with self.held.passing() as gate:
                gate.wait()
        self.told.take(change)

    def json(self, request: Json) -> Json:
        return speech.informed_json(self.domains, self.told, request, held=self.held.stands)

    def close(self) -> None:
        self.held.release()
        self.domains.__exit__(None, None, None)


class _Console:
    def __init__(self, fleet: Fleet, request: Json) -> None:
        self.terminal = speech.Terminal()
        self._input: queue.SimpleQueue[console_pb2.OpenConsoleRequest | None] = queue.SimpleQueue()
        self._input.put(speech.opening(request))
        self._stream = fleet.consoles.OpenConsole(self._messages())
        self.terminal.take(next(self._stream))
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _messages(self) -> Iterator[console_pb2.OpenConsoleRequest]:
        while (message := self._input.get()) is not None:
            yield message

    def write(self, text: str) -> None:
        self._input.put(console_pb2.OpenConsoleRequest(data=text.encode()))

    def _read(self) -> None:
        try:
            for answer in self._stream:
                self.terminal.take(answer)
        except Exception as error:  # noqa: BLE001 - the harness judges it
            self.terminal.error = speech.error_of(error)
        self.terminal.ended = True
        self._input.put(None)

    def close(self) -> None:
        self._input.put(None)
        self._stream.cancel()
        self._thread.join(10)


class Agent:
    """Does what it is told with the blocking client; each method is a request of the protocol."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._parts: dict[str, Any] = {}
        self._fleet: Fleet | None = None

    @property
    def fleet(self) -> Fleet:
        """The client."""
        assert self._fleet is not None, "connect comes first"
        return self._fleet

    def connect(self, request: Json) -> Json:
        self._fleet = self._stack.enter_context(connect(request["address"], speech.credentials(request)))
        return {}

    def close(self, _request: Json) -> Json:
        for part in self._parts.values():
            part.close()
        self._parts.clear()
        self._stack.close()
        return {}

    def create(self, request: Json) -> Json:
        limit = request.get("deadline_s")
        operation = self.fleet.domains.CreateDomain(speech.creation(request), timeout=limit)
        domain = self.fleet.wait(operation, domain_pb2.Domain, timeout_seconds=limit)
        return {"name": domain.name, "uid": domain.uid}

    def get(self, request: Json) -> Json:
        asked = domain_pb2.GetDomainRequest(name=request["name"])
        return speech.domain_json(self.fleet.domains.GetDomain(asked, timeout=request.get("deadline_s")))

    def list(self, request: Json) -> Json:
        names, missing = [], []
        try:
            for domain in self.fleet.pages(self.fleet.domains.ListDomains, speech.listing(request)):
                names.append(domain.name)  # noqa: PERF401 - what came before the end is kept
        except PartialList as partial:
            missing = [failure.node for failure in partial.failures]
        return {"count": len(names), "distinct_count": len(set(names)), "missing": missing}

    def update(self, request: Json) -> Json:
        operation = self.fleet.domains.UpdateDomain(speech.update(request))
        return {"etag": self.fleet.wait(operation, domain_pb2.Domain).etag}

    def delete(self, request: Json) -> Json:
        asked = domain_pb2.DeleteDomainRequest(name=request["name"], stop=True)
        self.fleet.wait(self.fleet.domains.DeleteDomain(asked), empty_pb2.Empty)
        return {}

    def stop(self, request: Json) -> Json:
        return {"operation": self.fleet.domains.StopDomain(speech.stopping(request)).name}

    def wait(self, request: Json) -> Json:
        domain = self.fleet.wait(
            speech.operation(request), domain_pb2.Domain, timeout_seconds=request.get("deadline_s")
        )
        return {"state": speech.state_of(domain)}

    def cancel(self, request: Json) -> Json:
        self.fleet.operations.CancelOperation(operations_pb2.CancelOperationRequest(name=request["operation"]))
        return {}

    def watch(self, request: Json) -> Json:
        self._parts[request["as"]] = _Watch(self.fleet, request)
        return {}

    def watched(self, request: Json) -> Json:
        found: Json = self._parts[request["as"]].json(request.get("name", ""))
        return found

    def informer(self, request: Json) -> Json:
        informed = self._parts[request["as"]] = _Informed(self.fleet, request)
        return {"count": len(informed.domains)}

    def informed(self, request: Json) -> Json:
        found: Json = self._parts[request["as"]].json(request)
        return found

    def hold(self, request: Json) -> Json:
        self._parts[request["as"]].held.hold()
        return {}

    def release(self, request: Json) -> Json:
        self._parts[request["as"]].held.release()
        return {}

    def console(self, request: Json) -> Json:
        console = self._parts[request["as"]] = _Console(self.fleet, request)
        return console.terminal.opened_json()

    def console_write(self, request: Json) -> Json:
        self._parts[request["as"]].write(request["text"])
        return {}

    def console_read(self, request: Json) -> Json:
        found: Json = self._parts[request["as"]].terminal.json()
        return found

    def upload(self, request: Json) -> Json:
        answer = self.fleet.volumes.UploadVolume(speech.upload_messages(request))
        return {"content_length": answer.volume.spec.capacity_bytes}


def run(agent: Agent) -> None:
    """Answer standard input until it ends."""
    lock = threading.Lock()

    def answer(request: Json) -> None:
        try:
            speech.check(request)
            method: Callable[[Json], Json] = getattr(agent, request["do"])
            said = {"result": method(request)}
        except Exception as error:  # noqa: BLE001 - the harness judges it
            said = {"error": speech.error_of(error)}
        with lock:
            sys.stdout.write(json.dumps({"id": request["id"], **said}) + "\n")
            sys.stdout.flush()

    for line in sys.stdin:
        threading.Thread(target=answer, args=(json.loads(line),), daemon=True).start()
    agent.close({})


if __name__ == "__main__":
    if "--asyncio" in sys.argv[1:]:
        from tests.clients.conformance import asyncio_agent

        asyncio.run(asyncio_agent.run())
    else:
        run(Agent())
