"""Filters of lists and watches: a subset of AIP-160, typed by the message that is filtered.

    state = RUNNING AND labels.env = "prod" AND NOT spec.autostart = true
    (name = "nodes/n1/domains/web-*" OR uid = "…") create_time >= "2026-01-01T00:00:00Z"

Terms are `field operator value` with `= != < <= > >= :`. They are joined by AND, OR, NOT (or `-`) and parentheses;
as in the AIP, OR binds closer than AND. A field is a path; below a map comes a key, in quotes or backquotes if it
is no plain word. On a list a term holds if it holds for any element. Enums are compared by name, with or without
their prefix. Strings compare whole; a `*` at an end of the value stands for any text. `:` asks a map for a key, a
string for a part, a list for an element, and `field:*` asks whether a field is set. A field that is not set is
unequal to every value and neither less nor greater.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from virtfleet_service import descriptors, errors
from virtfleet_service.descriptors import DURATION, TIMESTAMP, is_map

if TYPE_CHECKING:
    from virtfleet_service.descriptors import Enum, Field, Message_

LENGTH_LIMIT_CHARACTERS: Final = 4096
DEPTH_LIMIT: Final = 20
TERMS_LIMIT: Final = 100

Predicate = Callable[[Message], bool]
_Roots = Sequence[Message]
_Test = Callable[[_Roots], bool]

_TOKEN = re.compile(
    r"""\s*(?:
    (?P<open>\()|(?P<close>\))|
    (?P<operator><=|>=|!=|=|<|>|:)|
    (?P<minus>-(?=[A-Za-z_(]))|
    (?P<path>[A-Za-z_](?:[\w/-]|\.(?=[\w"`-]))*(?:(?:"(?:[^"\\]|\\.)*"|`[^`]*`)(?:\.[\w/-]+)*)*)
    )""",
    re.VERBOSE | re.ASCII,
)
_VALUE = re.compile(r"""\s*(?:"(?P<double>(?:[^"\\]|\\.)*)"|'(?P<single>(?:[^'\\]|\\.)*)'|(?P<bare>[^\s()"'<>=!]+))""")
_SEGMENT = re.compile(r"""\.?(?:"((?:[^"\\]|\\.)*)"|`([^`]*)`|([\w/-]+))""", re.ASCII)
_DURATION = re.compile(r"(-?)(\d+)(?:\.(\d{1,9}))?s")
_INTEGER = re.compile(r"-?\d{1,20}")
_FRACTION = re.compile(r"(?<=\d\d:\d\d:\d\d)[.,](\d+)")

_ORDER: Final[dict[str, Callable[[Any, Any], bool]]] = {
    "=": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
_INTEGERS: Final = frozenset(
    {
        FieldDescriptor.CPPTYPE_INT32,
        FieldDescriptor.CPPTYPE_INT64,
        FieldDescriptor.CPPTYPE_UINT32,
        FieldDescriptor.CPPTYPE_UINT64,
    }
)
_FLOATS: Final = frozenset({FieldDescriptor.CPPTYPE_DOUBLE, FieldDescriptor.CPPTYPE_FLOAT})


def compile_filter(text: str, message_class: type[Message]) -> Predicate:
    """Make a function that tells whether a message matches; an empty filter matches everything.

    Raises:
        FilterSyntax: It does not parse, names a field that the message does not have, or compares what cannot be
            compared; metadata `position` is the character, counted from 0.
    """
    test = _compiled(text, message_class.DESCRIPTOR)
    return lambda message: test((message,))


@lru_cache(maxsize=256)
def _compiled(text: str, descriptor: Message_) -> _Test:
    return compile_roots(text, (descriptor,))


def compile_roots(text: str, roots: Sequence[Message_]) -> _Test:
    """Make a filter over several messages at once: a path begins in the first one that has its first field.

    Raises:
        FilterSyntax: As `compile_filter`.
    """
    if len(text) > LENGTH_LIMIT_CHARACTERS:
        raise _syntax(f"it has more than {LENGTH_LIMIT_CHARACTERS} characters", LENGTH_LIMIT_CHARACTERS)
    if not text.strip():
        return lambda _: True
    return _Parser(text, roots).parse()


@dataclass(frozen=True, slots=True)
class _Token:
    kind: str
    text: str
    position: int


class _Parser:
    def __init__(self, text: str, roots: Sequence[Message_]) -> None:
        self._text = text
        self._roots = roots
        self._at = 0
        self._depth = 0
        self._terms = 0

    def parse(self) -> _Test:
        test = self._all()
        token = self._next()
        if token is not None:
            raise _syntax(f"`{token.text}` is one too many", token.position)
        return test

    def _peek(self) -> _Token | None:
        found = _TOKEN.match(self._text, self._at)
        if found is None:
            rest = self._text[self._at :].lstrip()
            if rest:
                raise _syntax(f"`{rest[:20]}` is not understood", len(self._text) - len(rest))
            return None
        kind = found.lastgroup or ""
        return _Token(kind, found.group(kind), found.start(kind))

    def _next(self) -> _Token | None:
        token = self._peek()
        if token is not None:
            self._at = token.position + len(token.text)
        return token

    def _is_word(self, word: str) -> bool:
        token = self._peek()
        return token is not None and token.kind == "path" and token.text == word

    def _all(self) -> _Test:
        """`a AND b c`: terms side by side are joined as by AND."""
        tests = [self._any()]
        while (token := self._peek()) is not None and token.kind != "close":
            if self._is_word("AND"):
                self._next()
            tests.append(self._any())
        if len(tests) == 1:
            return tests[0]
        return lambda roots: all(test(roots) for test in tests)

    def _any(self) -> _Test:
        tests = [self._not()]
        while self._is_word("OR"):
            self._next()
            tests.append(self._not())
        if len(tests) == 1:
            return tests[0]
        return lambda roots: any(test(roots) for test in tests)

    def _not(self) -> _Test:
        token = self._peek()
        if token is not None and (token.kind == "minus" or self._is_word("NOT")):
            self._next()
            test = self._term()
            return lambda roots: not test(roots)
        return self._term()

    def _term(self) -> _Test:
        token = self._next()
        if token is None:
            raise _syntax("a term is missing at the end", len(self._text))
        if token.kind == "open":
            self._depth += 1
            if self._depth > DEPTH_LIMIT:
                raise _syntax(f"more than {DEPTH_LIMIT} parentheses deep", token.position)
            test = self._all()
            closing = self._next()
            if closing is None or closing.kind != "close":
                raise _syntax("a parenthesis is left open", token.position)
            self._depth -= 1
            return test
        if token.kind != "path" or token.text in ("AND", "OR", "NOT"):
            raise _syntax(f"a field is expected, not `{token.text}`", token.position)
        self._terms += 1
        if self._terms > TERMS_LIMIT:
            raise _syntax(f"more than {TERMS_LIMIT} terms", token.position)
        relation = self._next()
        if relation is None or relation.kind != "operator":
            raise _syntax(f"an operator is expected after `{token.text}`", token.position + len(token.text))
        value, position = self._value()
        return _Comparison(token, relation.text, value, position, self._roots).build()

    def _value(self) -> tuple[str, int]:
        found = _VALUE.match(self._text, self._at)
        if found is None:
            raise _syntax("a value is expected", self._at)
        self._at = found.end()
        kind = found.lastgroup or ""
        text = found.group(kind)
        return (text if kind == "bare" else _unescape(text)), found.start(kind)


class _Comparison:
    """Is one term, held against the types of its fields."""

    def __init__(self, path: _Token, relation: str, value: str, position: int, roots: Sequence[Message_]) -> None:
        self._path = path
        self._relation = relation
        self._value = value
        self._position = position
        self._roots = roots

    def build(self) -> _Test:
        segments = self._segments()
        fitting = [index for index, root in enumerate(self._roots) if segments[0] in root.fields_by_name]
        if not fitting:
            raise self._no_field(segments[0], self._roots[0])
        root = fitting[0]
        leaves, check = self._walk(self._roots[root], segments)
        negative = self._relation == "!="
        # `!=` holds if no element is equal: the contrary of `=`.
        return lambda roots: any(check(value) for value in leaves(roots[root])) != negative

    def _segments(self) -> list[str]:
        segments: list[str] = []
        at = 0
        text = self._path.text
        while at < len(text):
            found = _SEGMENT.match(text, at)
            if found is None:
                raise _syntax(f"`{text}` is no path", self._path.position + at)
            double, back, plain = found.groups()
            segments.append(_unescape(double) if double is not None else back if back is not None else plain)
            at = found.end()
        return segments

    def _walk(
        self, descriptor: Message_, segments: list[str]
    ) -> tuple[Callable[[Message], Iterator[Any]], Callable[[Any], bool]]:
        """Return what yields the values that a path leads to, and what tests one of them."""
        field = descriptor.fields_by_name.get(segments[0])
        if field is None:
            raise self._no_field(segments[0], descriptor)
        name, rest = field.name, segments[1:]
        if is_map(field):
            return self._walk_map(field, rest)
        inner = field.message_type
        if rest:
            if inner is None or inner.full_name in (TIMESTAMP, DURATION):
                raise self._no_field(rest[0], inner or descriptor)
            below, check = self._walk(inner, rest)
            if field.is_repeated:
                return lambda message: (leaf for item in getattr(message, name) for leaf in below(item)), check
            return (
                lambda message: below(getattr(message, name)) if message.HasField(name) else iter(()),
                check,
            )
        if field.is_repeated:
            check = self._present() if self._value == "*" and self._relation == ":" else self._leaf(field)
            return lambda message: iter(getattr(message, name)), check
        if self._relation == ":" and self._value == "*":
            return _presence(field), self._present()
        check = self._leaf(field)
        if field.has_presence:
            return lambda message: iter((getattr(message, name),) if message.HasField(name) else ()), check
        return lambda message: iter((getattr(message, name),)), check

    def _walk_map(
        self, field: Field, rest: list[str]
    ) -> tuple[Callable[[Message], Iterator[Any]], Callable[[Any], bool]]:
        name = field.name
        value = descriptors.value_of(field)
        if not descriptors.is_string(descriptors.key_of(field)):
            raise _syntax(f"`{name}` has no keys that a filter can name", self._path.position)
        if not rest:
            if self._relation != ":":
                raise _syntax(f"`{name}` is a map: name a key or use `:`", self._path.position)
            wanted = self._value
            if wanted == "*":
                return lambda message: iter(getattr(message, name)), self._present()
            return lambda message: iter((True,) if wanted in getattr(message, name) else ()), self._present()
        if value.message_type is None:
            key = ".".join(rest)
            check = self._present() if self._relation == ":" and self._value == "*" else self._leaf(value)

            def entry(message: Message) -> Iterator[Any]:
                held = getattr(message, name)
                return iter((held[key],) if key in held else ())

            return entry, check
        key = rest[0]
        if len(rest) == 1:
            raise _syntax(f"`{key}` is a message: name one of its fields, or `{name}:{key}`", self._path.position)
        below, check = self._walk(value.message_type, rest[1:])

        def inside(message: Message) -> Iterator[Any]:
            held = getattr(message, name)
            return below(held[key]) if key in held else iter(())

        return inside, check

    @staticmethod
    def _present() -> Callable[[Any], bool]:
        return lambda _: True

    def _leaf(self, field: Field) -> Callable[[Any], bool]:
        if field.enum_type is not None:
            return self._equality(self._enum(field.enum_type))
        kind = field.cpp_type
        if kind in _INTEGERS:
            return self._order(self._integer())
        if kind in _FLOATS:
            return self._order(self._float())
        if kind == FieldDescriptor.CPPTYPE_BOOL:
            if self._value not in ("true", "false"):
                raise self._bad_value("true or false")
            return self._equality(self._value == "true")
        if descriptors.is_string(field):
            return self._string(field)
        if field.message_type is not None and field.message_type.full_name == TIMESTAMP:
            at = self._timestamp()
            return self._order(at, key=lambda value: value.ToNanoseconds())
        if field.message_type is not None and field.message_type.full_name == DURATION:
            return self._order(self._duration(), key=lambda value: value.ToNanoseconds())
        raise _syntax(
            f"`{self._path.text}` cannot be compared; `{self._path.text}:*` asks if it is set", self._path.position
        )

    def _order(self, wanted: float, *, key: Callable[[Any], Any] | None = None) -> Callable[[Any], bool]:
        # The negation of `!=` is made where all elements are known.
        compare = operator.eq if self._relation in ("!=", ":") else _ORDER[self._relation]
        if key is None:
            return lambda value: compare(value, wanted)
        return lambda value: compare(key(value), wanted)

    def _equality(self, wanted: object) -> Callable[[Any], bool]:
        if self._relation not in ("=", "!=", ":"):
            raise _syntax(f"`{self._path.text}` has no order: use = or !=", self._path.position)
        return lambda value: bool(value == wanted)

    def _string(self, field: Field) -> Callable[[Any], bool]:
        wanted = self._value
        if self._relation == ":" and not field.is_repeated:
            return lambda value: wanted in value
        if self._relation in ("<", "<=", ">", ">="):
            compare = _ORDER[self._relation]
            return lambda value: compare(value, wanted)
        if len(wanted) > 1 and wanted.startswith("*") and wanted.endswith("*"):
            return lambda value: wanted[1:-1] in value
        if wanted.endswith("*"):
            return lambda value: value.startswith(wanted[:-1])
        if wanted.startswith("*"):
            return lambda value: value.endswith(wanted[1:])
        return lambda value: bool(value == wanted)

    def _enum(self, enum: Enum) -> int:
        prefix = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", enum.name).upper() + "_"
        for name in (self._value, prefix + self._value):
            if name in enum.values_by_name:
                number: int = enum.values_by_name[name].number
                return number
        choices = ", ".join(value.name.removeprefix(prefix) for value in enum.values[:40])
        raise self._bad_value(f"one of {choices}")

    def _integer(self) -> int:
        if not _INTEGER.fullmatch(self._value):
            raise self._bad_value("a whole number")
        return int(self._value)

    def _float(self) -> float:
        try:
            return float(self._value)
        except ValueError as error:
            raise self._bad_value("a number") from error

    def _timestamp(self) -> int:
        # Times of resources have nanoseconds, and Python would cut what is behind the microseconds.
        fraction = _FRACTION.search(self._value)
        whole = self._value if fraction is None else self._value[: fraction.start()] + self._value[fraction.end() :]
        try:
            parsed = datetime.fromisoformat(whole)
        except ValueError as error:
            raise self._bad_value('a time like "2026-01-31T12:00:00Z"') from error
        if parsed.tzinfo is None:
            raise self._bad_value('a time with its zone, like "2026-01-31T12:00:00Z"')
        since = parsed - datetime(1970, 1, 1, tzinfo=UTC)
        nanoseconds = since.microseconds * 1000 if fraction is None else int(fraction[1][:9].ljust(9, "0"))
        return (since.days * 86_400 + since.seconds) * 1_000_000_000 + nanoseconds

    def _duration(self) -> int:
        found = _DURATION.fullmatch(self._value)
        if found is None:
            raise self._bad_value('a duration like "1.5s"')
        sign, seconds, fraction = found.groups()
        value = int(seconds) * 1_000_000_000 + int((fraction or "").ljust(9, "0"))
        return -value if sign else value

    def _bad_value(self, wanted: str) -> errors.FilterSyntax:
        return _syntax(f"`{self._path.text}` takes {wanted}, not `{self._value[:60]}`", self._position)

    def _no_field(self, name: str, descriptor: Message_) -> errors.FilterSyntax:
        return _syntax(f"{descriptor.name} has no field `{name}` to filter on", self._path.position)


def _presence(field: Field) -> Callable[[Message], Iterator[Any]]:
    name, default = field.name, field.default_value
    if field.has_presence:
        return lambda message: iter((True,) if message.HasField(name) else ())
    return lambda message: iter((True,) if getattr(message, name) != default else ())


def _unescape(text: str) -> str:
    return re.sub(r"\\(.)", r"\1", text)


def _syntax(why: str, position: int) -> errors.FilterSyntax:
    return errors.FilterSyntax(f"the filter is wrong at character {position}: {why}", field="filter", position=position)
