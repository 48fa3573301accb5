"""`virtfleet explain`: what the reason of an error means, or what a field, message or method is for."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

import click

from virtfleet_cli.completion import complete_from
from virtfleet_cli.kinds import BY_NAME
from virtfleet_cli.session import Session, pass_session


def _reasons() -> Iterable[str]:
    from virtfleet_client.reasons import catalogue

    return catalogue()


@click.command()
@click.argument("what", metavar="REASON|FIELD", shell_complete=complete_from(_reasons))
@pass_session
def explain(session: Session, what: str) -> None:
    """Explain a REASON (`WRONG_STATE`) or a FIELD (`domain.spec.memory`, `StartDomain`) and what to do.

    Fields are looked up in the fleet, by reflection: they are explained as that release has them.
    """
    from virtfleet_client.reasons import catalogue

    reason = catalogue().get(what.upper())
    if reason is not None:
        again = {"no": "no", "same": "yes, with the same request_id", "changed": "after reading again"}[reason.retry]
        click.echo(
            f"{reason.name}\n\n{reason.means}\n\nWhy: {reason.cause}\nWhat to do: {reason.remedy}\nCall again: {again}"
        )
        return
    if what.isupper():
        near = difflib.get_close_matches(what, catalogue(), 1)
        raise click.ClickException(f"there is no reason `{what}`" + (f"; did you mean `{near[0]}`?" if near else ""))
    from virtfleet_cli.reflection import Comments

    click.echo(_describe(Comments(session.fleet), what))


def _describe(comments: Any, what: str) -> str:  # noqa: ANN401 - Comments
    from google.protobuf.descriptor import FieldDescriptor

    first, *rest = what.split(".")
    kind = BY_NAME.get(first.lower())
    if kind is None:
        from virtfleet_cli.api import find

        method = find(what)
        text = comments.of(method.containing_service.file.name, method.full_name)
        return f"{method.full_name}({method.input_type.full_name}) → {method.output_type.full_name}\n\n{text}"
    message, field = kind.message_class.DESCRIPTOR, None
    for name in rest:
        if field is not None:
            message = field.message_type
            if message is not None and message.GetOptions().map_entry:
                # The key of a map; what follows is its value.
                field = message.fields_by_name["value"]
                if name not in (field.message_type.fields_by_name if field.message_type else ()):
                    continue
                message = field.message_type
        found = message.fields_by_name.get(name) if message is not None else None
        if found is None:
            known = list(message.fields_by_name) if message is not None else []
            near = difflib.get_close_matches(name, known, 1)
            hint = f"; did you mean `{near[0]}`?" if near else f"; it has {', '.join(known)}" if known else ""
            raise click.ClickException(f"`{what}` has no field `{name}`{hint}")
        field = found
    shown = field.message_type if field is not None else message
    lines = [f"{what}: {_type(field)}" if field is not None else message.full_name, ""]
    if field is not None:
        lines.append(comments.of(field.containing_type.file.name, field.full_name))
    if shown is not None and not shown.GetOptions().map_entry:
        lines += ["", comments.of(shown.file.name, shown.full_name), ""]
        lines += [f"  {one.name:24} {_type(one)}" for one in shown.fields]
    if field is not None and field.type == FieldDescriptor.TYPE_ENUM:
        lines += [f"  {value.name}" for value in field.enum_type.values]
    return "\n".join(lines)


def _type(field: Any) -> str:  # noqa: ANN401 - a FieldDescriptor
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        return f"map to {_type(field.message_type.fields_by_name['value'])}"
    if field.message_type is not None:
        name = field.message_type.name
    elif field.enum_type is not None:
        name = field.enum_type.name
    else:
        from google.protobuf import descriptor_pb2

        name = descriptor_pb2.FieldDescriptorProto.Type.Name(field.type).removeprefix("TYPE_").lower()
    return f"list of {name}" if field.is_repeated else name
