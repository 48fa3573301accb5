"""`virtfleet version`: the releases of the command, the gateway and the nodes."""

from __future__ import annotations

from importlib import metadata

import click

from virtfleet_cli.session import Session, pass_session


@click.command()
@click.option("--client", is_flag=True, help="Only that of this command; asks nobody.")
@pass_session
def version(session: Session, *, client: bool) -> None:
    """Show the releases of this command, the gateway and each node."""
    click.echo(f"virtfleet {metadata.version('virtfleet-cli')}")
    if client:
        return
    from virtfleet.common.v1 import admin_pb2
    from virtfleet.fleet.v1 import node_pb2

    fleet = session.fleet
    server = fleet.servers.GetServer(admin_pb2.GetServerRequest(), timeout=session.timeout_seconds)
    click.echo(f"{server.name} {server.version}")
    for node in fleet.pages(fleet.nodes.ListNodes, node_pb2.ListNodesRequest()):
        for service in node.status.services:
            click.echo(f"{node.name}/services/{service.service} {service.version or 'unknown'}")
