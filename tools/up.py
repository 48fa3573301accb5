"""Keep a development fleet in the foreground until Ctrl-C or SIGTERM: `make up`."""

from __future__ import annotations

import asyncio
import os
import signal
import sys

from tools import fleet as development
from tools import unprivileged
from tools.demo import Steps


async def up(plan: development.Plan) -> int:
    """Run a fleet until asked to end; returns the exit code."""
    say = Steps()
    asked = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, asked.set)
    record = development.RUN / "fleet.json"
    if record.exists():
        print(f"up: a fleet runs or was killed ({record}); end it, or `make clean`", file=sys.stderr)
        return 1
    async with development.Fleet.running(plan, run_folder=development.RUN, say=say) as fleet:
        environment = development.RUN / "fleet.env"
        say("the fleet is up; Ctrl-C ends it. In another terminal:")
        print(f"""
    . {environment}
    grpcurl -cacert $VIRTFLEET_CA_FILE -cert $VIRTFLEET_CERT_FILE -key $VIRTFLEET_KEY_FILE $VIRTFLEET_ADDRESS list
    grpcurl -cacert $VIRTFLEET_CA_FILE -cert $VIRTFLEET_CERT_FILE -key $VIRTFLEET_KEY_FILE \\
        -d '{{"parent": "nodes/-"}}' $VIRTFLEET_ADDRESS virtfleet.compute.v1.DomainService/ListDomains
    .venv/bin/python -c 'from virtfleet_client import connect; from virtfleet.fleet.v1 import node_pb2 as n
    with connect() as fleet: print(fleet.nodes.ListNodes(n.ListNodesRequest()))'
""", flush=True)  # fmt: skip
        if unprivileged.inside():
            say(f"enter its network: nsenter --target {os.getpid()} --user --net --preserve-credentials $SHELL")
        await asked.wait()
        say("ending")
    left = fleet.leftovers()
    say(left.counts())
    return 1 if left else 0


def main() -> int:
    """Read `NODES`, `DRIVER`, `METRICS` and others from the environment; returns the exit code."""
    driver = os.environ.get("DRIVER") or "qemu"
    unprivileged.enter(needs_tap="qemu" in driver.split(","))
    plan = development.Plan(
        nodes=int(os.environ.get("NODES") or 1),
        driver=driver,
        port=int(os.environ.get("PORT") or 0),
        address_range=os.environ.get("RANGE") or "",
        metrics=bool(os.environ.get("METRICS")),
    )
    try:
        return asyncio.run(up(plan))
    except RuntimeError as error:
        print(f"up: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
