"""When a lane counts as up."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc

from virtfleet_gateway.channels import Lane

State = grpc.ChannelConnectivity


class Connection:
    """Is a gRPC channel that comes up between two looks at it, in a thread of gRPC's own."""

    def __init__(self) -> None:
        self.looks = 0

    def get_state(self, try_to_connect: bool = False) -> State:  # noqa: FBT001, FBT002  # as gRPC has it
        del try_to_connect
        self.looks += 1
        return State.CONNECTING if self.looks == 1 else State.READY

    async def wait_for_state_change(self, last_observed_state: State) -> None:
        if last_observed_state is State.READY:
            await asyncio.Event().wait()


async def test_a_connection_that_comes_up_between_two_looks_is_not_waited_for_to_end() -> None:
    connection: Any = Connection()
    async with asyncio.timeout(1):
        await Lane("n1", "compute", connection).up(None)
