"""The authority of a fleet, which issues certificates: `virtfleet authority …`, on its folder, without a gateway."""

from __future__ import annotations

import datetime as dt
from pathlib import Path
from typing import Annotated

import typer

from virtfleet_gateway import issued
from virtfleet_gateway.authority import DEFAULT_TRUST_DOMAIN, USER_LIFETIME_LIMIT, Authority, new_request, write_private
from virtfleet_service import failpoints
from virtfleet_service.names import check_id

ROLES = ("viewer", "operator", "admin")

app = typer.Typer(add_completion=False, no_args_is_help=True, help="The authority (CA) of the fleet.")

Directory = Annotated[Path, typer.Option(help="The authority's folder.")]
DEFAULT_DIRECTORY = Path("/var/lib/virtfleet/authority")


@app.command()
def init(
    directory: Directory = DEFAULT_DIRECTORY,
    trust_domain: Annotated[str, typer.Option(help="The host part of every identity.")] = DEFAULT_TRUST_DOMAIN,
) -> None:
    """Make the authority. Refuses where there is one."""
    authority = Authority.create(directory, trust_domain)
    issued.folder_of(directory)
    typer.echo(f"authority of {trust_domain} in {directory}, key {authority.key_hash}")


@app.command()
def issue(
    name: Annotated[str, typer.Argument(help="The person or controller.")],
    role: Annotated[list[str], typer.Option(help=f"One of {', '.join(ROLES)}; may be given again.")],
    directory: Directory = DEFAULT_DIRECTORY,
    output: Annotated[Path, typer.Option(help="Where NAME.crt, NAME.key and ca.crt are written.")] = Path(),
    days: Annotated[int, typer.Option(min=1, max=USER_LIFETIME_LIMIT.days, help="How long it is good.")] = 90,
) -> None:
    """Issue a certificate with roles for a person or a controller, with a new key.

    The gateway lists it within seconds, and it can be revoked there. If this is not the gateway's own folder, copy the
    file that is named into `issued/` of the gateway's.
    """
    check_id(name, "name")
    unknown = sorted(set(role) - set(ROLES))
    if unknown:
        raise typer.BadParameter(f"there is no role {', '.join(unknown)}")
    authority = Authority.load(directory)
    output.mkdir(parents=True, exist_ok=True, mode=0o700)
    key_file, certificate_file = output / f"{name}.key", output / f"{name}.crt"
    if key_file.exists():
        raise typer.BadParameter(f"{key_file} exists; it is left alone")
    key, request = new_request(name)
    certificate = authority.issue_user(request, name, role, dt.timedelta(days=days))
    # First what makes it revocable, then what makes it useful: a cut between leaves a certificate that nobody has.
    record = issued.write(directory, certificate)
    failpoints.reach("authority.issue.recorded")
    write_private(key_file, key)
    certificate_file.write_bytes(certificate.pem)
    (output / "ca.crt").write_bytes(authority.certificate_pem)
    typer.echo(
        f"{certificate_file}: {certificate.subject}, {', '.join(role)}, until {certificate.not_after:%Y-%m-%d}\n"
        f"{record}: certificates/c{certificate.serial}"
    )
