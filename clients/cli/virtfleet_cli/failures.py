"""How the command fails: what, where, who holds it, what to try next; one exit code per kind of failure; no traceback.

0  done
1  a server refused the call, or an operation failed
2  the command line, a file or the environment is wrong
3  the fleet or a node cannot be reached
4  what was named does not exist
5  some of many failed
130  interrupted
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any, Final

import click

if TYPE_CHECKING:
    from collections.abc import Sequence

    from virtfleet_client import VirtfleetError

EXIT_OK: Final = 0
EXIT_REFUSED: Final = 1
EXIT_USAGE: Final = 2
EXIT_UNREACHABLE: Final = 3
EXIT_ABSENT: Final = 4
EXIT_PARTIAL: Final = 5
EXIT_INTERRUPTED: Final = 130

NEXT: Final[dict[str, str]] = {
    "RESOURCE_NOT_FOUND": "`virtfleet get {kind}` shows what there is",
    "RESOURCE_MOVED": "use its new name: {new_name}",
    "NODE_UNKNOWN": "`virtfleet node list` shows the nodes",
    "NODE_UNREACHABLE": "`virtfleet describe node {node_id}` shows when it was last heard",
    "WRONG_STATE": "`virtfleet describe {kind} {resource}` shows its state",
    "RESOURCE_IN_USE": "it is held by {holder}",
    "IDENTITY_IN_USE": "it is held by {holder}",
    "OPERATION_CONFLICT": "`virtfleet operation wait {operation}` waits for it",
    "ETAG_MISMATCH": "read it again: somebody has changed it in between",
    "PERMISSION_MISSING": "`virtfleet api AccessService.WhoAmI` shows who you are and what you may do",
    "CREDENTIALS_INVALID": "`virtfleet context list` shows which certificate is used",
    "CERTIFICATE_REVOKED": "ask for a new one: `virtfleet authority issue`",
    "NOT_LIVE_UPDATABLE": "`--scope config` changes it for the next start",
    "DELETION_PROTECTED": "set spec.deletion_protection=false first",
}
"""What to try after an error with a reason; variables of the error stand in braces."""

_STARTABLE: Final[dict[tuple[str, str], str]] = {
    (kind, state): f"`virtfleet {verb} {{resource}}` {done} it"
    for kind in ("networks", "pools")
    for state, verb, done in (("INACTIVE", "start", "starts"), ("RUNNING", "stop", "stops"))
}
"""What to try where something is in a wrong state that a command changes: by kind and state."""


def run(command: click.Command, arguments: Sequence[str]) -> int:
    """Run a command line and return the exit code."""
    output = sys.stdout
    try:
        # What is returned is the code of `Exit`, or what the command itself returns: nothing.
        code = command.main(args=list(arguments), prog_name="virtfleet", standalone_mode=False)
        if sys.stdout is not None:
            # Not at the end of the process, where a closed pipe could only be complained of.
            sys.stdout.flush()
        return code if isinstance(code, int) else EXIT_OK
    except click.exceptions.Exit as end:
        return end.exit_code
    except click.ClickException as error:
        error.show()
        return EXIT_USAGE
    except (KeyboardInterrupt, click.Abort):
        sys.stderr.write("virtfleet: interrupted\n")
        return EXIT_INTERRUPTED
    except (BrokenPipeError, SystemExit) as end:
        # click makes the end of a pipe an exit of its own, and then wraps the output.
        if isinstance(end, SystemExit) and sys.stdout is output:
            raise
        # Whoever read our output has read enough. What is still unwritten goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return EXIT_OK
    except Exception as error:
        code = explain(error, verbose="-v" in arguments or "--verbose" in arguments)
        if code is None:
            raise
        return code


def explain(error: Exception, *, verbose: bool) -> int | None:
    """Tell a person what went wrong; returns the exit code, None for what is a fault of ours."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        sys.stderr.write(f"virtfleet: {error.filename}: {error.strerror}\n")
        return EXIT_USAGE
    if isinstance(error, (OSError, ValueError)):
        sys.stderr.write(f"virtfleet: {error}\n")
        return EXIT_USAGE
    if "grpc" not in sys.modules:
        return None
    import grpc

    from virtfleet_client import VirtfleetError

    if isinstance(error, VirtfleetError):
        sys.stderr.write(f"virtfleet: {sentence(error)}\n")
        if verbose:
            sys.stderr.write(f"{error.status}\n")
        return exit_code(error)
    if isinstance(error, grpc.RpcError):
        sys.stderr.write(f"virtfleet: {error}\n")
        return EXIT_REFUSED
    return None


def exit_code(error: VirtfleetError) -> int:
    """Return the exit code for an error."""
    import grpc

    from virtfleet_client import PartialList

    if isinstance(error, PartialList):
        return EXIT_PARTIAL
    code = error.code()
    # With a reason it is an answer: a guest did not comply in its time, or a step took too long.
    unanswered = code is grpc.StatusCode.DEADLINE_EXCEEDED and not error.reason
    if code is grpc.StatusCode.UNAVAILABLE or unanswered:
        return EXIT_UNREACHABLE
    return EXIT_ABSENT if code is grpc.StatusCode.NOT_FOUND else EXIT_REFUSED


def sentence(error: VirtfleetError) -> str:
    """Return an error as a person reads it: text, reason, fields at fault, and what to try next."""
    text = error.details() or error.code().name
    where = f" [{', '.join(error.fields)}]" if error.fields else ""
    reason = f" ({error.reason})" if error.reason else f" ({error.code().name})"
    advice = _advice(error)
    return f"{text}{where}{reason}" + (f"\n  next: {advice}" if advice else "")


def named(name: str, text: str) -> str:
    """Return a sentence with the name of what it is about, which most begin with already."""
    return text if text.startswith(name) else f"{name}: {text}"


class _Variables(dict[str, str]):
    """Are the variables of an error; one that is missing makes the advice void."""

    def __missing__(self, key: str) -> str:
        raise KeyError(key)


def _advice(error: VirtfleetError) -> str:
    pattern = NEXT.get(error.reason, "")
    variables: dict[str, Any] = dict(error.metadata)
    resource = str(variables.get("resource", ""))
    if resource.count("/") >= 1:
        variables.setdefault("kind", resource.split("/")[-2])
    if error.reason == "WRONG_STATE":
        pattern = _STARTABLE.get((variables.get("kind", ""), str(variables.get("state"))), pattern)
    if "node" in variables:
        variables["node_id"] = str(variables["node"]).removeprefix("nodes/")
    try:
        return pattern.format_map(_Variables(variables))
    except KeyError:
        return ""
