"""Files of resources: YAML or JSON of the API's own messages, several in one file, with the place of each fault.

    kind: domain
    name: nodes/n1/domains/web        # or `node: n1` and `id: web`
    labels: {app: web}
    spec:
      memory: {maximum_bytes: 1GiB}

A number of bytes may have a unit. Everything else is as the API has it (`virtfleet get … -o yaml` writes such a file).
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from typing import Any, Final

import click
import yaml
from google.protobuf import json_format
from google.protobuf.descriptor import Descriptor, FieldDescriptor

from virtfleet_cli.input import read
from virtfleet_cli.kinds import BY_NAME, Kind
from virtfleet_cli.tree import compose

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(B|KiB|MiB|GiB|TiB|PiB|kB|MB|GB|TB)")
_UNITS: Final = {
    **{unit: 1024**power for power, unit in enumerate(("B", "KiB", "MiB", "GiB", "TiB", "PiB"))},
    **{unit: 1000**power for power, unit in enumerate(("kB", "MB", "GB", "TB"), start=1)},
}
_EXTRA: Final = ("kind", "node", "id")


class DocumentError(ValueError):
    """A file cannot be used; the text has its name, line and column."""


@dataclass(frozen=True, slots=True)
class Document:
    """Is one resource of a file.

    Attributes:
        kind: Its kind.
        name: Its full name.
        resource: The message.
        paths: The fields that the file names, as paths of an update mask.
        where: The file and line, for errors.
    """

    kind: Kind
    name: str
    resource: Any
    paths: tuple[str, ...]
    where: str


class _Reader:
    """Turns nodes of YAML into what protobuf's JSON takes, and knows where each came from."""

    def __init__(self, file: str) -> None:
        self.file = file

    def fail(self, node: yaml.Node, text: str) -> DocumentError:
        mark = node.start_mark
        return DocumentError(f"{self.file}:{mark.line + 1}:{mark.column + 1}: {text}")

    def scalar(self, node: yaml.ScalarNode) -> Any:  # noqa: ANN401 - any scalar
        return yaml.SafeLoader("").construct_object(node) if node.tag != "tag:yaml.org,2002:timestamp" else node.value

    def mapping(self, node: yaml.Node, what: str) -> list[tuple[yaml.ScalarNode, str, yaml.Node]]:
        if not isinstance(node, yaml.MappingNode):
            raise self.fail(node, f"{what} must be a mapping")
        found: list[tuple[yaml.ScalarNode, str, yaml.Node]] = []
        seen: set[str] = set()
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise self.fail(key, "a key must be a word")
            if key.value in seen:
                raise self.fail(key, f"`{key.value}` stands here twice")
            seen.add(key.value)
            found.append((key, key.value, value))
        return found

    def message(self, node: yaml.Node, descriptor: Descriptor, path: str, leaves: list[str]) -> Any:  # noqa: ANN401 - JSON
        if descriptor.full_name.startswith("google.protobuf."):
            leaves.append(path)
            return self.plain(node)
        found: dict[str, Any] = {}
        fields = {name: field for field in descriptor.fields for name in (field.name, field.json_name)}
        for key, name, value in self.mapping(node, f"`{path}`" if path else "a resource"):
            field = fields.get(name)
            if field is None:
                raise self.fail(key, _unknown(name, descriptor, path))
            here = f"{path}.{field.name}" if path else field.name
            found[field.name] = self.value(value, field, here, leaves)
        return found

    def value(self, node: yaml.Node, field: FieldDescriptor, path: str, leaves: list[str]) -> Any:  # noqa: ANN401 - JSON
        inner = field.message_type
        if inner is not None and inner.GetOptions().map_entry:
            values = inner.fields_by_name["value"]
            entries = self.mapping(node, f"`{path}`")
            if not entries:
                leaves.append(path)
            return {name: self.value(value, values, f"{path}.{_key(name)}", leaves) for _, name, value in entries}
        if field.is_repeated:
            leaves.append(path)
            if not isinstance(node, yaml.SequenceNode):
                raise self.fail(node, f"`{path}` must be a list")
            return [self.one(item, field, path, []) for item in node.value]
        return self.one(node, field, path, leaves)

    def one(self, node: yaml.Node, field: FieldDescriptor, path: str, leaves: list[str]) -> Any:  # noqa: ANN401 - JSON
        if field.message_type is not None:
            return self.message(node, field.message_type, path, leaves)
        leaves.append(path)
        if not isinstance(node, yaml.ScalarNode):
            raise self.fail(node, f"`{path}` must be one value")
        value = self.scalar(node)
        if field.enum_type is not None:
            return self.enum(node, field, value)
        if field.cpp_type == FieldDescriptor.CPPTYPE_STRING and field.type == FieldDescriptor.TYPE_STRING:
            return node.value
        if field.cpp_type == FieldDescriptor.CPPTYPE_BOOL:
            if not isinstance(value, bool):
                raise self.fail(node, f"`{path}` must be true or false")
            return value
        return self.number(node, path, value)

    def number(self, node: yaml.ScalarNode, path: str, value: Any) -> Any:  # noqa: ANN401 - JSON
        if isinstance(value, bool) or not isinstance(value, (int, float, str)):
            raise self.fail(node, f"`{path}` must be a number")
        size = _SIZE.fullmatch(value) if isinstance(value, str) and path.endswith("_bytes") else None
        if size:
            return int(float(size[1]) * _UNITS[size[2]])
        if isinstance(value, str):
            try:
                return int(value)
            except ValueError:
                raise self.fail(node, f"`{path}` must be a number, not `{value}`") from None
        return value

    def enum(self, node: yaml.ScalarNode, field: FieldDescriptor, value: Any) -> Any:  # noqa: ANN401 - JSON
        kinds: Any = field.enum_type
        names = [one.name for one in kinds.values]
        if isinstance(value, int) and not isinstance(value, bool):
            return value
        prefix = names[0].removesuffix("UNSPECIFIED")
        text = str(node.value).upper().replace("-", "_")
        for candidate in (text, prefix + text):
            if candidate in names:
                return candidate
        short = [name.removeprefix(prefix).lower() for name in names[1:]]
        raise self.fail(node, f"`{node.value}` is none of {', '.join(short)}")

    def plain(self, node: yaml.Node) -> Any:  # noqa: ANN401 - JSON
        if isinstance(node, yaml.ScalarNode):
            return self.scalar(node)
        if isinstance(node, yaml.SequenceNode):
            return [self.plain(item) for item in node.value]
        return {name: self.plain(value) for _, name, value in self.mapping(node, "it")}


def _key(name: str) -> str:
    """Return the key of a map as it stands in an update mask."""
    return name if re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name) else f"`{name}`"


def _unknown(name: str, descriptor: Descriptor, path: str) -> str:
    known = [field.name for field in descriptor.fields]
    near = difflib.get_close_matches(name, known, 1)
    where = f"`{path}`" if path else f"a {descriptor.name.lower()}"
    hint = f"; did you mean `{near[0]}`?" if near else f"; it has {', '.join(known)}"
    return f"{where} has no field `{name}`{hint}"


def load(file: str, node: str = "") -> list[Document]:
    """Read the resources of a file; `-` is standard input.

    Args:
        file: Its path.
        node: The node of those that name none.

    Raises:
        DocumentError: One is wrong; nothing is returned then.
        InputError: The file is too long, or no text.
        OSError: The file cannot be read.
    """
    text = read(file)
    reader = _Reader(file)
    try:
        nodes: list[Any] = [one for one in compose(text) if _holds(one)]
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f":{mark.line + 1}:{mark.column + 1}" if mark is not None else ""
        message = f"{file}{place}: {error.problem}"
        raise DocumentError(message) from error
    except yaml.YAMLError as error:
        message = f"{file}: {str(error).splitlines()[0]}"
        raise DocumentError(message) from error
    items = [item for one in nodes for item in (one.value if isinstance(one, yaml.SequenceNode) else [one])]
    if not items:
        message = f"{file}: there is no resource in it"
        raise DocumentError(message)
    return [_document(reader, item, node) for item in items]


def _holds(node: Any) -> bool:  # noqa: ANN401 - a node, or nothing
    """Tell whether a document of a file is more than its separator."""
    return node is not None and not (isinstance(node, yaml.ScalarNode) and node.tag == "tag:yaml.org,2002:null")


def _document(reader: _Reader, node: yaml.Node, default_node: str) -> Document:
    entries = reader.mapping(node, "a resource")
    extra = {name: value for _, name, value in entries if name in _EXTRA}
    words: dict[str, str] = {}
    for name, value in extra.items():
        if not isinstance(value, yaml.ScalarNode):
            raise reader.fail(value, f"`{name}` must be a word")
        words[name] = value.value
    if "kind" not in words:
        raise reader.fail(
            node, f"`kind` is missing: one of {', '.join(sorted({one.noun for one in BY_NAME.values()}))}"
        )
    kind = BY_NAME.get(words["kind"].lower())
    if kind is None:
        near = difflib.get_close_matches(words["kind"].lower(), BY_NAME, 1)
        hint = f"; did you mean `{near[0]}`?" if near else ""
        raise reader.fail(extra["kind"], f"there is no kind `{words['kind']}`{hint}")
    rest = yaml.MappingNode(node.tag, [pair for pair in node.value if pair[0].value not in _EXTRA], node.start_mark)
    leaves: list[str] = []
    content = reader.message(rest, kind.message_class.DESCRIPTOR, "", leaves)
    resource = kind.message_class()
    try:
        json_format.ParseDict(content, resource)
    except json_format.ParseError as error:
        raise reader.fail(node, str(error)) from error
    name = resource.name or words.get("id", "")
    if not name:
        raise reader.fail(node, "`name` is missing (or `node` and `id`)")
    try:
        full = kind.name(name, words.get("node", "") or default_node)
    except click.ClickException as error:
        raise reader.fail(node, error.message) from None
    if full.startswith("nodes/-/"):
        raise reader.fail(node, f"the node of `{name}` is missing: say `node: …` or the whole name")
    resource.name = full
    own = tuple(path for path in leaves if path.partition(".")[0] in ("display_name", "labels", "annotations", "spec"))
    return Document(kind, full, resource, own, f"{reader.file}:{node.start_mark.line + 1}")


def field_value(field: FieldDescriptor, path: str, text: str) -> Any:  # noqa: ANN401 - any value of a field
    """Return a text as the value of a field.

    Raises:
        DocumentError: It does not fit.
    """
    reader = _Reader("value")
    node = yaml.compose(text, yaml.SafeLoader) or yaml.ScalarNode("tag:yaml.org,2002:str", "")
    if not isinstance(node, yaml.ScalarNode):
        message = f"`{text}` is no single value"
        raise DocumentError(message)
    value = reader.one(node, field, path, [])
    if field.enum_type is not None and isinstance(value, str):
        return field.enum_type.values_by_name[value].number
    return value
