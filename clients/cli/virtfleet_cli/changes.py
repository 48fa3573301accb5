"""What `apply`, `edit` and `plan` do: the difference between a document and the fleet, and the calls for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from virtfleet_cli.documents import Document
from virtfleet_cli.masks import value_at

if TYPE_CHECKING:
    from virtfleet_cli.session import Session


@dataclass(frozen=True, slots=True)
class Step:
    """Is what one document comes to.

    Attributes:
        document: The document.
        verb: `create`, `change` or `keep`.
        differences: For each path that changes: what is there and what shall be.
    """

    document: Document
    verb: str
    differences: tuple[tuple[str, str, str], ...] = ()


def plan(session: Session, document: Document) -> Step:
    """Hold a document against the fleet.

    Raises:
        VirtfleetError: The resource cannot be read.
    """
    from virtfleet_client.errors import ResourceNotFound

    kind = document.kind
    request = kind.request("Get")
    request.name = document.name
    try:
        present = getattr(kind.stub(session.fleet), kind.method_name("Get"))(request, timeout=session.timeout_seconds)
    except ResourceNotFound:
        return Step(document, "create")
    differences = []
    for path in document.paths:
        old, new = value_at(present, path), value_at(document.resource, path)
        if old != new:
            differences.append((path, _text(old), _text(new)))
    return Step(document, "change" if differences else "keep", tuple(differences))


def _text(value: Any) -> str:  # noqa: ANN401 - any value of a field
    if value is None:
        return ""
    text = str(value).strip().replace("\n", " ")
    return text if len(text) <= 60 else text[:57] + "…"


def create(session: Session, document: Document, *, validate_only: bool = False) -> Any:  # noqa: ANN401 - a resource or an operation
    """Create the resource of a document; returns what the server answers.

    Raises:
        VirtfleetError: It refuses.
        ClickException: Resources of the kind are not made this way.
    """
    kind = document.kind
    method = kind.method_name("Create")
    if method not in kind.methods:
        raise click.ClickException(f"{document.where}: a {kind.noun} is not made by a file")
    request = kind.request("Create")
    parts = document.name.split("/")
    request.parent = "/".join(parts[:-2])
    getattr(request, kind.noun).CopyFrom(document.resource)
    getattr(request, kind.noun).name = ""
    setattr(request, f"{kind.noun}_id", parts[-1])
    request.validate_only = validate_only
    return getattr(kind.stub(session.fleet), method)(request, timeout=session.timeout_seconds)


def update(
    session: Session, document: Document, paths: list[str], *, scope: int = 0, validate_only: bool = False
) -> Any:  # noqa: ANN401 - a resource or an operation
    """Change the fields at some paths to what a document has; returns what the server answers.

    Raises:
        VirtfleetError: It refuses.
        ClickException: Resources of the kind are not changed this way.
    """
    kind = document.kind
    method = kind.method_name("Update")
    if method not in kind.methods:
        raise click.ClickException(f"{document.where}: a {kind.noun} cannot be changed: {', '.join(paths)}")
    request = kind.request("Update")
    getattr(request, kind.noun).CopyFrom(document.resource)
    request.update_mask.paths.extend(paths)
    request.validate_only = validate_only
    if scope:
        request.scope = scope
    return getattr(kind.stub(session.fleet), method)(request, timeout=session.timeout_seconds)
