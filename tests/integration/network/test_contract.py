"""The contract of network back ends, held by the bridge in a namespace that this process enters."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
from collections.abc import AsyncIterator, Iterator

import pytest

from tests.integration.network.rig import DNSMASQ, Node
from virtfleet_network.backends.api import Prior
from virtfleet_network.backends.registry import BackendContext, create
from virtfleet_network.settings import NetworkSettings
from virtfleet_network.testing.contract import NetworkBackendContract, RecordingListener, Subject
from virtfleet_service.launcher import LauncherClient

CLONE_NEWNET = 0x40000000


@pytest.fixture
def inside(bare_node: Node) -> Iterator[Node]:
    """A node with a launcher; this thread, and those that it starts, are in its namespace."""
    libc = ctypes.CDLL(None, use_errno=True)
    home = os.open("/proc/self/ns/net", os.O_RDONLY)
    there = os.open(f"/run/netns/{bare_node.namespace.name}", os.O_RDONLY)
    bare_node.start_launcher()
    try:
        assert libc.setns(there, CLONE_NEWNET) == 0
        yield bare_node
    finally:
        assert libc.setns(home, CLONE_NEWNET) == 0
        os.close(home)
        os.close(there)


class TestBridge(NetworkBackendContract):
    """Binds the bridge."""

    @pytest.fixture
    async def subject(self, inside: Node) -> AsyncIterator[Subject]:
        """An open back end."""
        async with LauncherClient.connect(f"{inside.folder}/run/launcher/network.sock") as launcher:
            nft = NetworkSettings().nft
            state = inside.folder / "state"
            state.mkdir()
            context = BackendContext("n1", state, launcher, NetworkSettings().dnsmasq, nft)
            backend = create("bridge", context)
            listener = RecordingListener()

            async def save() -> None:
                """Keep nothing: the node ends with the test."""

            await backend.open(listener, Prior(save))
            try:
                yield Subject(backend, listener, links, take_name, take_address)
            finally:
                await backend.close()
        assert DNSMASQ


def ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout


def links() -> set[str]:
    return {link["ifname"] for link in json.loads(ip("-j", "link", "show"))} - {"lo"}


def take_name(name: str) -> None:
    ip("link", "add", name, "type", "bridge")


def take_address(address: str) -> None:
    ip("address", "add", address, "dev", "lo")
