"""Nodes of the fleet: `virtfleet node …`."""

from __future__ import annotations

from typing import Annotated

import typer

from virtfleet.fleet.v1 import enrollment_pb2, node_pb2
from virtfleet_client import connect

app = typer.Typer(no_args_is_help=True, help="Nodes of the fleet.")


@app.command("list")
def list_nodes() -> None:
    """Print the nodes with their states."""
    with connect() as fleet:
        for node in fleet.pages(fleet.nodes.ListNodes, node_pb2.ListNodesRequest()):
            state = node_pb2.NodeState.Name(node.status.state).removeprefix("NODE_STATE_")
            typer.echo(f"{node.name.removeprefix('nodes/'):24} {state:10} {node.status.reason}")


@app.command()
def token(node: Annotated[str, typer.Argument(help="The id of the node that may join with it.")]) -> None:
    """Make a join token for one node, good once and for an hour, and print it."""
    request = enrollment_pb2.CreateJoinTokenRequest()
    request.join_token.spec.node = f"nodes/{node}"
    with connect() as fleet:
        typer.echo(fleet.enrollment.CreateJoinToken(request, timeout=10).token)
