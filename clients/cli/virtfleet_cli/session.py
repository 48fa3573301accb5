"""What one run of the command has: the fleet it talks to, connected when first needed, and how it speaks to people."""

from __future__ import annotations

import os
import sys
from contextlib import ExitStack
from functools import cached_property
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from rich.console import Console

    from virtfleet_client import Fleet


class Session:
    """Holds the global options and the connection. Commands get it by `@pass_session`.

    Args:
        context: The name of a context; empty: the current one.
        address: An address; empty: that of the context.
        verbose: Whether errors are shown whole.
        colour: Whether colours may be used where the output is a terminal.
        timeout_seconds: How long one call may take.
    """

    def __init__(self, *, context: str, address: str, verbose: bool, colour: bool, timeout_seconds: float) -> None:
        self.context = context
        self.address = address
        self.verbose = verbose
        self.timeout_seconds = timeout_seconds
        # As no-color.org has it: set and not empty.
        self.colour = colour and not os.environ.get("NO_COLOR")
        self._stack = ExitStack()

    @cached_property
    def fleet(self) -> Fleet:
        """The connection; made now.

        Raises:
            ValueError: Nothing says where the fleet is, or what does cannot be used.
            OSError: A certificate cannot be read.
        """
        from virtfleet_client import connect

        return self._stack.enter_context(connect(self.address, context=self.context))

    def reach(self) -> None:
        """Fail as any call does where the fleet cannot be reached: a watch would try for ever, and say nothing.

        Raises:
            VirtfleetError: It cannot be reached in time, or refuses the caller.
        """
        from virtfleet.common.v1 import admin_pb2

        self.fleet.access.WhoAmI(admin_pb2.WhoAmIRequest(), timeout=self.timeout_seconds)

    @cached_property
    def console(self) -> Console:
        """Where people read answers."""
        from rich.console import Console

        return Console(no_color=not self.colour, highlight=False, soft_wrap=not sys.stdout.isatty())

    @cached_property
    def errors(self) -> Console:
        """Where people read errors and progress."""
        from rich.console import Console

        return Console(stderr=True, no_color=not self.colour, highlight=False)

    @property
    def interactive(self) -> bool:
        """Whether a person reads the output."""
        return sys.stdout.isatty()

    def close(self) -> None:
        """End the connection."""
        self._stack.close()


pass_session = click.make_pass_decorator(Session)
