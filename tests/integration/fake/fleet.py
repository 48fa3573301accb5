"""A fake fleet as a process, with an administrator's connection and its control."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from virtfleet.compute.v1 import domain_pb2
from virtfleet.fake.v1 import fake_pb2, fake_pb2_grpc
from virtfleet_client import Credentials, Fleet, connect, errors

Outcome = tuple[int, str, str]
"""What a run of the command comes to: its exit code and what it wrote."""
Virtfleet = Callable[..., Outcome]
"""Runs the command with arguments."""


@dataclass
class Fake:
    """Is a fake fleet with an administrator's connection and its control."""

    process: subprocess.Popen[str]
    ready: dict[str, str]
    fleet: Fleet
    control: fake_pb2_grpc.FakeServiceStub

    @property
    def variables(self) -> dict[str, str]:
        """The environment that points clients to it."""
        ready = self.ready
        return {
            "VIRTFLEET_ADDRESS": ready["address"],
            "VIRTFLEET_CA_FILE": ready["ca_file"],
            "VIRTFLEET_CERT_FILE": ready["cert_file"],
            "VIRTFLEET_KEY_FILE": ready["key_file"],
        }

    def names(self) -> list[str]:
        answer = self.fleet.domains.ListDomains(domain_pb2.ListDomainsRequest(parent="nodes/-", page_size=1000))
        return [domain.name for domain in answer.domains]

    def inject(self, node: str = "", **kind: Any) -> fake_pb2.Fault:
        fault = fake_pb2.Fault(node=node, **kind)
        answer: fake_pb2.Fault = self.control.InjectFault(fake_pb2.InjectFaultRequest(fault=fault))
        return answer

    def clear(self) -> None:
        self.control.ClearFaults(fake_pb2.ClearFaultsRequest())


def typed(error: Any) -> errors.VirtfleetError:
    return errors.from_call(error.code(), error.details(), error.trailing_metadata())


@contextmanager
def running(*arguments: str) -> Iterator[Fake]:
    process = subprocess.Popen(
        [sys.executable, "-m", "virtfleet_fake", "--until-eof", *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        ready = json.loads(process.stdout.readline())
        files = [Path(ready[key]) for key in ("ca_file", "cert_file", "key_file")]
        with (
            connect(f"tls://{ready['address']}", Credentials(*files)) as fleet,
            grpc.insecure_channel(ready["control_address"]) as channel,
        ):
            yield Fake(process, ready, fleet, fake_pb2_grpc.FakeServiceStub(channel))
        process.stdin.close()
        assert process.wait(10) == 0
        assert not Path(ready["ca_file"]).exists(), "the folder of the fleet is left"
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        process.stdin.close()
        process.stdout.close()
