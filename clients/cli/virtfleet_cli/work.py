"""Operations as people see them: many at once, a line with a bar for each, a summary, and what Ctrl-C does."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Final

import click

from virtfleet_cli.failures import EXIT_PARTIAL, exit_code, named, sentence

if TYPE_CHECKING:
    from google.longrunning import operations_pb2
    from rich.progress import Progress, TaskID

    from virtfleet_cli.session import Session
    from virtfleet_client import VirtfleetError

_SIDE_BY_SIDE: Final = 16


class Crew:
    """Runs one call on each of many resources and waits for the operations.

    Args:
        session: The session.
        done: What a success is called: `started`.
        wait: Whether operations are waited for.
        cancel: Whether Ctrl-C cancels what runs, or leaves it running.
    """

    def __init__(self, session: Session, done: str, *, wait: bool = True, cancel: bool = False) -> None:
        self._session = session
        self._done = done
        self._wait = wait
        self._cancel = cancel
        self._running: dict[str, str] = {}

    def run(self, names: Sequence[str], call: Callable[[str], Any]) -> None:
        """Run the call on each name; ends the command with the right exit code if one fails.

        Args:
            names: The full names.
            call: Makes the call for a name; returns an operation, or the resource.
        """
        ended: queue.SimpleQueue[tuple[str, VirtfleetError | Exception | None]] = queue.SimpleQueue()
        waiting: queue.SimpleQueue[str] = queue.SimpleQueue()
        for name in names:
            waiting.put(name)
        with ExitStack() as stack:
            progress = self._progress(stack) if self._session.errors.is_terminal else None

            def work() -> None:
                while True:
                    try:
                        name = waiting.get_nowait()
                    except queue.Empty:
                        return
                    ended.put((name, self._one(name, call, progress)))

            # Daemons: who interrupts the command does not wait for answers of the fleet.
            for _ in range(min(_SIDE_BY_SIDE, len(names))):
                threading.Thread(target=work, daemon=True).start()
            try:
                failed = self._gather(ended, len(names))
            except KeyboardInterrupt:
                while not waiting.empty():
                    waiting.get_nowait()
                self._interrupted()
                raise
        self._report(names, failed)

    @staticmethod
    def _gather(
        ended: queue.SimpleQueue[tuple[str, VirtfleetError | Exception | None]], count: int
    ) -> list[tuple[str, VirtfleetError]]:
        from virtfleet_client import VirtfleetError

        failed = []
        for _ in range(count):
            name, error = ended.get()
            if isinstance(error, VirtfleetError):
                failed.append((name, error))
            elif error is not None:
                raise error
        return failed

    def _progress(self, stack: ExitStack) -> Progress:
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[step]}"),
            TimeElapsedColumn(),
        )
        return stack.enter_context(Progress(*columns, console=self._session.errors, transient=False))

    def _one(
        self, name: str, call: Callable[[str], Any], progress: Progress | None
    ) -> VirtfleetError | Exception | None:
        from google.longrunning import operations_pb2

        from virtfleet_client import VirtfleetError

        task = progress.add_task(name, total=100, step="") if progress is not None else None
        try:
            answer = call(name)
            if isinstance(answer, operations_pb2.Operation):
                self._finish(name, answer, progress, task)
        except VirtfleetError as error:
            if progress is not None and task is not None:
                progress.update(task, step=f"failed: {error.reason or error.code().name}")
            return error
        except Exception as error:  # noqa: BLE001 - it is raised where the command waits
            return error
        if progress is not None and task is not None:
            progress.update(task, completed=100, step=self._done)
        return None

    def _finish(
        self, name: str, operation: operations_pb2.Operation, progress: Progress | None, task: TaskID | None
    ) -> None:
        from virtfleet_client.errors import from_status

        def show(metadata: Any) -> None:  # noqa: ANN401 - OperationMetadata
            if progress is not None and task is not None:
                progress.update(task, completed=metadata.progress_ratio * 100 or None, step=metadata.phase)

        if not self._wait and not operation.done:
            click.echo(operation.name)
            return
        if not operation.done:
            self._running[name] = operation.name
            operation = self._session.fleet.finish(operation, progress=show)
            del self._running[name]
        if operation.HasField("error"):
            raise from_status(operation.error)

    def _interrupted(self) -> None:
        """Cancel what runs, or say that it goes on."""
        from google.longrunning import operations_pb2

        from virtfleet_client import VirtfleetError

        for name, operation in list(self._running.items()):
            if not self._cancel:
                click.echo(f"{name}: goes on as {operation}", err=True)
                continue
            try:
                self._session.fleet.operations.CancelOperation(
                    operations_pb2.CancelOperationRequest(name=operation), timeout=5
                )
                click.echo(f"{name}: cancelled", err=True)
            except VirtfleetError as error:
                click.echo(f"{name}: goes on as {operation}: {error.details()}", err=True)

    def _report(self, names: Sequence[str], failed: list[tuple[str, VirtfleetError]]) -> None:
        bad = {name for name, _ in failed}
        for name in names:
            if name not in bad:
                click.echo(f"{name} {self._done}")
        for name, error in failed:
            click.echo(f"virtfleet: {named(name, sentence(error))}", err=True)
        if len(names) > 1:
            click.echo(f"{len(names) - len(failed)} {self._done}, {len(failed)} failed", err=True)
        if failed:
            code = exit_code(failed[0][1]) if len(names) == 1 else EXIT_PARTIAL
            raise click.exceptions.Exit(code)
