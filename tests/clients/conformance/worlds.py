"""The fleets that cases run on, and what goes wrong in them: a fake one by its control, a real one by signals."""

from __future__ import annotations

import os
import re
import signal
import threading
import urllib.request
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from google.protobuf import duration_pb2

from tests.clients.conformance.truth import Truth, until
from tests.fleet.rig import SERVICES, pid_of
from virtfleet.fake.v1 import fake_pb2, fake_pb2_grpc

_MEETING_SECONDS = 90.0
_RETURN = duration_pb2.Duration(nanos=100_000_000)


class World(Protocol):
    """Is a fleet.

    Attributes:
        name: `fake` or `real`.
        sharers: How many runs of the same case share it, step by step.
        address: Its gateway, `host:port`.
        files: The certificate files of an administrator: `ca_file`, `cert_file`, `key_file`.
        truth: The harness's own connection.
    """

    name: str
    address: str
    files: Mapping[str, str]
    truth: Truth

    @property
    def sharers(self) -> int:
        """See above."""

    def meet(self) -> None:
        """Wait for the runs that share it."""

    def replace_gateway(self, *, drain: bool, thaw: str) -> None:
        """End the gateway and wait for another; thaw a node once the old one has been told."""

    def freeze(self, node: str) -> None:
        """Stop a node without closing anything."""

    def thaw(self, node: str) -> None:
        """Let it go on."""

    def away(self, node: str) -> None:
        """Have a node be out of reach, and the gateway know."""

    def counts(self) -> Counter[str]:
        """Return how many calls of each method have ended: `DomainService/GetDomain`."""

    def watches(self) -> tuple[int, int]:
        """Return how many watches of the fleet have begun afresh, and how many from a token."""

    def heal(self) -> None:
        """End all that is wrong."""


class FakeWorld:
    """Is a fake fleet."""

    name = "fake"
    sharers = 1

    def __init__(self, ready: Mapping[str, str], control: fake_pb2_grpc.FakeServiceStub, truth: Truth) -> None:
        self.address = ready["address"]
        self.files = ready
        self.truth = truth
        self._control = control

    def meet(self) -> None:
        """Do nothing: nobody shares it."""

    def replace_gateway(self, *, drain: bool, thaw: str) -> None:
        request = fake_pb2.RestartGatewayRequest(pause=_RETURN, drain=drain)
        if not thaw:
            self._control.RestartGateway(request, timeout=30)
            return
        replaced = self._control.RestartGateway.future(request, timeout=30)
        # The drain takes its time for calls that hang; afterwards the node answers the next gateway.
        until(lambda: self._control.GetFake(fake_pb2.GetFakeRequest()).connection_count == 0, "the clients are gone")
        self.thaw(thaw)
        replaced.result(30)

    def _inject(self, node: str, **kind: Any) -> None:
        fault = fake_pb2.Fault(node=node, **kind)
        self._control.InjectFault(fake_pb2.InjectFaultRequest(fault=fault), timeout=10)

    def freeze(self, node: str) -> None:
        self._inject(node, freeze=fake_pb2.Freeze())

    def thaw(self, node: str) -> None:
        self._control.ClearFaults(fake_pb2.ClearFaultsRequest(name=f"nodes/{node}"), timeout=10)

    def away(self, node: str) -> None:
        self._inject(node, away=fake_pb2.Away())

    def fail_calls(self, node: str, *, method: str, reason: str, count: int, after_effect: bool) -> None:
        """Have calls of a method fail at a node."""
        error = fake_pb2.CallError(method_pattern=method, reason=reason, count=count, after_effect=after_effect)
        self._inject(node, error=error)

    def compact(self, node: str) -> None:
        """Drop what the log of a node holds."""
        self._control.CompactLogs(fake_pb2.CompactLogsRequest(name=f"nodes/{node}"), timeout=10)

    def move(self, name: str, node: str) -> str:
        """Move a domain; returns its new name."""
        request = fake_pb2.MoveDomainRequest(name=name, target_node=node)
        return self._control.MoveDomain(request, timeout=10).new_name

    def counts(self) -> Counter[str]:
        found = self._control.GetFake(fake_pb2.GetFakeRequest(), timeout=10).call_counts
        counts: Counter[str] = Counter()
        for one in found:
            counts["/".join(one.method.split(".")[-2:])] += one.call_count
        return counts

    def watches(self) -> tuple[int, int]:
        fake = self._control.GetFake(fake_pb2.GetFakeRequest(), timeout=10)
        return fake.fresh_watch_count, fake.resumed_watch_count

    def heal(self) -> None:
        self._control.ClearFaults(fake_pb2.ClearFaultsRequest(), timeout=10)


class RealWorld:
    """Is the fleet of `make up`, all processes real.

    Args:
        environment: The variables of `fleet.env`, with VIRTFLEET_RUN.
        truth: The harness's own connection.
    """

    name = "real"
    sharers = 1

    def __init__(self, environment: Mapping[str, str], truth: Truth) -> None:
        self.address = environment["VIRTFLEET_ADDRESS"]
        self.files = files_of(environment)
        self.truth = truth
        self._run = Path(environment["VIRTFLEET_RUN"])
        self._metrics = environment["VIRTFLEET_METRICS_ADDRESS"]
        self._stopped: dict[str, list[int]] = {}
        self._earlier: Counter[str] = Counter()
        """What the gateways before this one had counted."""

    def meet(self) -> None:
        """Do nothing: it is shared through `SharedWorld`."""

    def replace_gateway(self, *, drain: bool, thaw: str) -> None:
        # A killed gateway takes what it counts with it.
        self._earlier = self._measured()
        before = pid_of(self._run, "gateway")
        os.kill(before, signal.SIGTERM if drain else signal.SIGKILL)
        if thaw:
            until(lambda: not Path(f"/proc/{before}").exists(), "the old gateway is gone")
            self.thaw(thaw)

        def replaced() -> bool:
            path = self._run / "gateway.pid"
            text = path.read_text().strip() if path.exists() else ""
            return bool(text) and int(text) != before

        until(replaced, "another gateway runs")

    def freeze(self, node: str) -> None:
        stopped = self._stopped.setdefault(node, [])
        for service in SERVICES:
            process = pid_of(self._run, f"{node}/{service}")
            os.kill(process, signal.SIGSTOP)
            stopped.append(process)

    def thaw(self, node: str) -> None:
        for process in self._stopped.pop(node, []):
            os.kill(process, signal.SIGCONT)

    def away(self, node: str) -> None:
        self.freeze(node)
        until(lambda: node in self.truth.unreachable(), f"the gateway knows that {node} is away")

    def _measured(self) -> Counter[str]:
        """Return all that has been counted, by the names of Prometheus."""

        def read() -> str:
            try:
                with urllib.request.urlopen(f"http://{self._metrics}/metrics", timeout=5) as answer:
                    text: str = answer.read().decode()
            except OSError:
                return ""
            return text

        found = Counter(self._earlier)
        for line in until(read, "the gateway tells what it has counted").splitlines():
            name, _, value = line.rpartition(" ")
            if name.startswith(("virtfleet_calls_total", "virtfleet_fresh", "virtfleet_resumed")):
                found[name] += int(float(value))
        return found

    def counts(self) -> Counter[str]:
        counts: Counter[str] = Counter()
        for name, count in self._measured().items():
            labels = re.fullmatch(r'virtfleet_calls_total\{.*method="([^"]+)".*\}', name)
            if labels is not None:
                counts["/".join(labels[1].split(".")[-2:])] += count
        return counts

    def watches(self) -> tuple[int, int]:
        found = self._measured()
        return found["virtfleet_fresh_watches"], found["virtfleet_resumed_watches"]

    def heal(self) -> None:
        for node in list(self._stopped):
            self.thaw(node)


class Together:
    """Lets threads do something once: all arrive, the last one does it, all go on with what came of it.

    Args:
        count: How many threads there are.
    """

    def __init__(self, count: int) -> None:
        self.started = count
        self._left = count
        self._condition = threading.Condition()
        self._arrived = 0
        self._turn = 0
        self._work: Callable[[], Any] = lambda: None
        self._outcome: tuple[Any, BaseException | None] = (None, None)

    def __call__(self, work: Callable[[], Any]) -> Any:
        """Do something once.

        Raises:
            AssertionError: The others have not arrived in time.
        """
        with self._condition:
            turn = self._turn
            self._arrived += 1
            self._work = work
            self._do_if_all()
            assert self._condition.wait_for(lambda: self._turn != turn, _MEETING_SECONDS), "the others do not arrive"
            answer, error = self._outcome
        if error is not None:
            raise error
        return answer

    def leave(self) -> None:
        """Be one fewer: a thread that has failed, or is done."""
        with self._condition:
            self._left -= 1
            self._do_if_all()

    def _do_if_all(self) -> None:
        if not self._left or self._arrived < self._left:
            return
        try:
            self._outcome = (self._work(), None)
        except Exception as error:  # noqa: BLE001 - all of them get it
            self._outcome = (None, error)
        self._arrived = 0
        self._turn += 1
        self._condition.notify_all()


class SharedWorld:
    """Is a fleet that several runs of the same case share: what goes wrong in it goes wrong once for all of them."""

    def __init__(self, world: RealWorld, together: Together) -> None:
        self._world = world
        self._together = together
        self.name = world.name
        self.address = world.address
        self.files: Mapping[str, str] = world.files
        self.truth = world.truth
        self.sharers = together.started

    def meet(self) -> None:
        self._together(lambda: None)

    def replace_gateway(self, *, drain: bool, thaw: str) -> None:
        self._together(lambda: self._world.replace_gateway(drain=drain, thaw=thaw))

    def freeze(self, node: str) -> None:
        self._together(lambda: self._world.freeze(node))

    def thaw(self, node: str) -> None:
        self._together(lambda: self._world.thaw(node))

    def away(self, node: str) -> None:
        self._together(lambda: self._world.away(node))

    def counts(self) -> Counter[str]:
        return self._world.counts()

    def watches(self) -> tuple[int, int]:
        return self._world.watches()

    def heal(self) -> None:
        """Do nothing: whoever shares the fleet out heals it."""


def files_of(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the certificate files of the variables of `fleet.env`."""
    return {name: environment[f"VIRTFLEET_{name.upper()}"] for name in ("ca_file", "cert_file", "key_file")}
