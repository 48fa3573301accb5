"""What one reader of the fleet's watch wants, and may see."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from virtfleet_gateway.shapes import BASIC, Change, Entry, Sort
from virtfleet_service import filters, tokens

if TYPE_CHECKING:
    from collections.abc import Callable

    from google.protobuf.message import Message

    from virtfleet_gateway.shapes import Shape
    from virtfleet_service.call import Call


class Selection:
    """Says what a reader wants, and may see.

    Args:
        shape: The messages of the package.
        request: The WatchResourcesRequest.
        call: The call; its caller must be allowed to see a resource.
        find: Returns the resource that a change is about, as it is now; None: there is none.
    """

    def __init__(
        self,
        shape: Shape,
        request: Any,  # noqa: ANN401 - one class a package
        call: Call,
        find: Callable[[Change], Entry | None],
    ) -> None:
        self._find = find
        numbers = set(request.resource_types)
        self.kinds = frozenset(
            kind.name for kind in shape.kind_by_name.values() if not numbers or kind.number in numbers
        )
        self.all_kinds = not numbers
        self.events = frozenset(request.event_types)
        self.view: int = request.view
        self.text: str = request.filter
        self.binding = tokens.binding_of(
            "fleet watch", sorted(numbers), sorted(self.events), self.text, self.view == BASIC
        )
        """Stands for what is wanted, in resume tokens."""
        self._tests: dict[str, Callable[[Message], bool]] = {}
        if self.text:
            self._tests = {
                name: filters.compile_filter(self.text, shape.kind_by_name[name].message) for name in self.kinds
            }
        self._sees: Callable[[str], bool] | None = None if call.sees_all else call.may_see
        self._filtered = shape.filtered
        self.plain = self.all_kinds and not self.events and not self.text and self._sees is None
        """Whether everything is wanted, so that what is put together for one such reader is good for all."""

    def holds(self, entry: Entry) -> bool:
        """Tell whether a resource is wanted."""
        if entry.kind.name not in self.kinds or (self._sees is not None and not self._sees(entry.name)):
            return False
        test = self._tests.get(entry.kind.name)
        return test is None or entry.holds(self.text, test)

    def _is_wanted(self, event: Change) -> bool:
        if self.events and event.event_type not in self.events:
            return False
        if not self._tests:
            return True
        # About a resource for which the filter holds: now, or when it happened, if it is gone.
        about = self._find(event) or event.previous
        return about is not None and self.holds(about)

    def encode(self, change: Change, *, in_turn: bool = True) -> bytes | None:
        """Return a change as the reader is to see it; None: not at all.

        Args:
            change: The change.
            in_turn: Whether the reader has been told of what was before it. A slow one has not: what it knows may be
                older, and may have been wanted.
        """
        if self.plain:
            return change.encode(self.view)
        if change.kind not in self.kinds and not (change.sort is Sort.EVENT and self.all_kinds):
            return None
        if self._sees is not None and not (
            self._sees(change.name) or (change.new_name and self._sees(change.new_name))
        ):
            return None
        if change.sort is Sort.EVENT:
            return change.encode(self.view) if self._is_wanted(change) else None
        if not self._tests or (change.entry is not None and self.holds(change.entry)):
            return change.encode(self.view)
        if in_turn and change.previous is not None and not self.holds(change.previous):
            # Neither it nor what was before it is wanted.
            return None
        return self._filtered(change) if change.entry is not None else change.encode(self.view)
