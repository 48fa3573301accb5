"""What every call goes through, in fixed order, between the transport and its handler.

    who calls (certificate, socket, conveyed caller, denial list) → decode → which node → permission on the target →
    unknown fields → rules of the proto → permission on every reference → handler → audit → answer

One handler a method and listener is built when the server starts; a call then costs little more than the steps
themselves.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import secrets
from contextlib import aclosing
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING, Any, Final

import grpc

from virtfleet_service import logs, names, unread
from virtfleet_service.call import CALLER_KEY, CURRENT, NODE_KEY, Call, Caller
from virtfleet_service.errors import (
    CredentialsInvalid,
    FieldRequired,
    MessageTooLarge,
    MethodNotImplemented,
    NameMalformed,
    ServiceDraining,
    Unexpected,
    VirtfleetError,
    WrongNode,
)
from virtfleet_service.identity import local_caller
from virtfleet_service.validation import REPLY_LIMIT_BYTES, request_check

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable

    from google.protobuf.message import Message

    from virtfleet_service.authorization import Authorizer
    from virtfleet_service.identity import Authenticator, Identity
    from virtfleet_service.logs import AuditLog
    from virtfleet_service.methods import FoundReference, MethodFacts
    from virtfleet_service.telemetry import Meters, MethodMeter, Span, Tracer
    from virtfleet_service.validation import RequestCheck

    Context = grpc.aio.ServicerContext[Any, Any]

_log = logging.getLogger(__name__)


TLS: Final = "tls"
LOCAL: Final = "local"
PEER: Final = "peer"
ANONYMOUS: Final = "anonymous"

END_OF_STREAM_PAUSE_SECONDS: Final = 0.005

_REFUSALS: Final = frozenset({grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNAUTHENTICATED})
_ANONYMOUS_CALLER: Final = Caller(logs.ANONYMOUS, (), "tls")


@dataclass(frozen=True, slots=True)
class Listener:
    """Is one way in.

    Attributes:
        kind: `tls`, `local` (a socket of one role), `peer` (the socket between services), `anonymous` (enrolment).
        role: The role of a local socket.
    """

    kind: str
    role: str = ""


class Pipeline:
    """Builds the handlers of a server.

    Args:
        node: The node; empty at a gateway.
        service: The name of the service.
        authorizer: Judges what they may do.
        audit: Records mutations and refusals.
        meters: Counts calls.
    """

    def __init__(
        self,
        *,
        node: str,
        service: str,
        authorizer: Authorizer,
        audit: AuditLog,
        meters: Meters,
    ) -> None:
        self._node = node
        self._node_name = f"nodes/{node}"
        self._node_prefix = f"nodes/{node}/"
        self._places = frozenset({node, f"{node}/{service}"})
        self.authenticator: Authenticator | None = None
        self._authorizer = authorizer
        self._audit = audit
        self._meters = meters
        self.tracer: Tracer | None = None
        self.draining = False
        self._reviewed = 0
        self.turned_away = 0
        """How many calls have been refused because the server is about to stop."""
        self.calls: dict[Call, asyncio.Task[Any]] = {}

    # Who calls.

    def begin(self, facts: MethodFacts, listener: Listener, context: Context) -> Call:
        """Return the call with its caller.

        Raises:
            Unauthenticated: Nobody knows who calls.
            PermissionMissing: The caller is a node.
            WrongNode: The metadata name another node.
            ServiceDraining: The server is about to stop.
        """
        conveyed: str | bytes | None = None
        place: str | bytes | None = None
        for key, value in context.invocation_metadata() or ():
            if key == CALLER_KEY:
                if conveyed is not None:
                    raise CredentialsInvalid("the call conveys two callers")
                conveyed = value
            elif key == NODE_KEY:
                place = value
        caller, peer = self.authenticate(listener, context, conveyed)
        if place is not None and self._node and place not in self._places:
            raise WrongNode(
                f"the metadata ask for `{place!s}`, this is `{self._node}`",
                node=self._node_name,
                asked=str(place),
            )
        if facts.service.startswith("virtfleet."):
            self.check_draining()
        return Call(facts, caller, self._authorizer, node=self._node, context=context, peer=peer)

    def check_draining(self) -> None:
        """Refuse a new call if the server is about to stop.

        Raises:
            ServiceDraining: It is.
        """
        if self.draining:
            self.turned_away += 1
            raise ServiceDraining("the server is about to stop; call again", retry_delay_seconds=1)

    @property
    def _authenticator(self) -> Authenticator:
        if self.authenticator is None:
            raise RuntimeError("the server has not been started")
        return self.authenticator

    def authenticate(
        self, listener: Listener, context: Context, conveyed: str | bytes | None
    ) -> tuple[Caller, Identity | None]:
        """Return who calls, and the identity of the connection.

        Args:
            listener: Where the call came in.
            context: Its context.
            conveyed: The value of the metadata `x-virtfleet-caller-bin`; None: absent.

        Raises:
            Unauthenticated: Nobody knows who calls.
            PermissionMissing: The caller is a node.
        """
        encoded = conveyed.encode("latin-1") if isinstance(conveyed, str) else conveyed
        if listener.kind == TLS:
            chain = context.auth_context().get("x509_pem_cert")
            if not chain:
                raise CredentialsInvalid("the connection has no client certificate")
            caller, identity = self._authenticator.by_certificate(next(iter(chain)))
            if encoded is None:
                return caller, identity
            if not self._authenticator.may_convey(identity):
                # Dropping it would be safe too, but nobody sends this by mistake.
                raise CredentialsInvalid(
                    f"`{identity.uri}` is no gateway and may convey no other caller", subject=identity.uri
                )
            return self._authenticator.conveyed(encoded, "tls", identity.uri), identity
        if listener.kind == PEER:
            if encoded is None:
                raise CredentialsInvalid("a call on this socket must convey its caller")
            return self._authenticator.conveyed(encoded, "unix", ""), None
        if encoded is not None:
            raise CredentialsInvalid("a call on this socket may convey no other caller")
        if listener.kind == LOCAL:
            return local_caller(listener.role), None
        return _ANONYMOUS_CALLER, None

    # What is asked.

    def examine(self, facts: MethodFacts, check: RequestCheck, request: Message, encoded: bytes, call: Call) -> None:
        """Check a request: its node, its fields, and the caller's permissions on all that it names.

        Raises:
            VirtfleetError: It is refused.
        """
        name = facts.routing_name(request)
        if name:
            call.resource = name
            self._check_name(facts, name)
        elif facts.routing_required:
            field = ".".join(facts.routing)
            raise FieldRequired(f"`{field}` is required", field=field)
        if facts.has_request_id:
            call.request_id = getattr(request, "request_id")  # noqa: B009  # the class has no such attribute for mypy
        if facts.permission:
            self._authorize_target(facts, request, name, call)
        check.check(request, encoded)
        if facts.references:
            for found in facts.references.find(request):
                self._authorize_reference(facts, found, call)
        for item in facts.items:
            for index, part in enumerate(getattr(request, item.field)):
                self._authorize_item(facts, f"{item.field}[{index}].", item.id_field, part, name, call)
        if facts.mutation:
            self._audit.check()

    def _check_name(self, facts: MethodFacts, name: str) -> None:
        for pattern in facts.patterns:
            if pattern.fullmatch(name):
                break
        else:
            if facts.patterns or not names.is_name(name):
                raise self._malformed(".".join(facts.routing), name, facts.template)
        if self._node and not name.startswith(self._node_prefix) and name != self._node_name:
            if name.startswith("nodes/"):
                raise WrongNode(
                    f"`{name}` is not on this node `{self._node}`",
                    resource=name,
                    node=self._node_name,
                    asked=names.node_of(name),
                )
            if facts.routing_required:
                raise self._malformed(".".join(facts.routing), name, facts.template)

    @staticmethod
    def _malformed(field: str, name: str, template: str) -> NameMalformed:
        form = f" of the form `{template}`" if template else ""
        return NameMalformed(f"`{field}` must be a resource name{form}", field=field, name=name, template=template)

    def _authorize_target(self, facts: MethodFacts, request: Message, name: str, call: Call) -> None:
        authorizer, caller, permission = self._authorizer, call.caller, facts.permission
        if not facts.checks_names:
            if authorizer.prefixes(caller, permission) is None:
                raise authorizer.refusal(caller, permission, name)
        elif facts.id_field:
            id_ = getattr(request, facts.id_field)
            if id_:
                names.check_id(id_, facts.id_field)
            call.resource = names.child(name, facts.noun, id_)
            authorizer.authorize(caller, permission, call.resource)
        elif facts.is_parent and (not facts.mutation or facts.references or facts.items):
            # Each resource below is judged on its own: by the handler in lists, by its reference in batches.
            authorizer.authorize_within(caller, permission, name)
        elif facts.finds:
            authorizer.authorize_lookup(caller, permission, name)
        else:
            authorizer.authorize(caller, permission, name)

    def _authorize_reference(self, facts: MethodFacts, found: FoundReference, call: Call) -> None:
        value, reference = found.value, found.facts
        full = value
        if self._node:
            full = names.absolute(value, self._node, field=found.path) if names.is_name(value) else ""
        inner = reference.relative_pattern if not value.startswith("nodes/") else None
        pattern = inner or reference.pattern
        if not names.is_name(value) or (pattern is not None and not pattern.fullmatch(value)):
            raise self._malformed(found.path, value, reference.template)
        collection = reference.collection or names.collection_of(full)
        if collection == facts.noun and facts.name.startswith("Batch"):
            if not facts.mutation:
                self._authorizer.authorize_lookup(call.caller, facts.permission, full)
                return
            permission = facts.permission
        else:
            permission = f"{collection}.use" if facts.mutation else f"{collection}.get"
        self._authorizer.authorize(call.caller, permission, full)

    def _authorize_item(
        self, facts: MethodFacts, path: str, id_field: str, part: Message, parent: str, call: Call
    ) -> None:
        given = getattr(part, "parent") or parent  # noqa: B009  # as above
        if not names.is_name(given):
            raise self._malformed(path + "parent", given, "")
        if self._node and given != self._node_name and not given.startswith(self._node_prefix):
            raise WrongNode(f"`{given}` is not on this node `{self._node}`", resource=given, node=self._node_name)
        id_ = getattr(part, id_field) if id_field else ""
        if id_:
            names.check_id(id_, path + id_field)
        self._authorizer.authorize(call.caller, facts.permission, names.child(given, facts.noun, id_))

    # Handlers.

    def handler(
        self, facts: MethodFacts, implementation: object, listener: Listener
    ) -> grpc.RpcMethodHandler[Any, Any]:
        """Return the handler of a method on one listener."""
        method = getattr(implementation, facts.handler, None)
        if method is None:
            method = _missing(facts)
        check = request_check(facts.request_class, mutation=facts.mutation)
        if facts.client_streaming:
            handle = self._handle(facts, self._serve_stream_in(facts, method, check), listener)
            if facts.server_streaming:
                return grpc.stream_stream_rpc_method_handler(handle)
            return grpc.stream_unary_rpc_method_handler(handle)
        if facts.server_streaming:
            handle = self._handle(facts, self._serve_stream_out(facts, method, check), listener)
            return grpc.unary_stream_rpc_method_handler(handle)
        handle = self._handle(facts, self._serve_unary(facts, method, check), listener)
        return grpc.unary_unary_rpc_method_handler(handle)

    def unknown(self, path: str) -> grpc.RpcMethodHandler[Any, Any]:
        """Return the handler of a method that this server does not know."""

        async def handle(_requests: object, context: Context) -> None:
            await unread.drop(context, client_reads=True)
            error = MethodNotImplemented(f"this server has no method {path[1:]}", method=path[1:].replace("/", "."))
            await abort(context, error)

        return grpc.stream_stream_rpc_method_handler(handle)

    def _handle(
        self,
        facts: MethodFacts,
        serve: Callable[[Any, Context, Call], Awaitable[bytes | None]],
        listener: Listener,
    ) -> Callable[[Any, Context], Awaitable[bytes | None]]:
        meter = self._meters.method(facts.full_name)

        async def handle(given: Any, context: Context) -> bytes | None:  # noqa: ANN401  # bytes or an iterator of them
            started = perf_counter()
            call: Call | None = None
            span: Span | None = None
            try:
                call = self.begin(facts, listener, context)
                self.calls[call] = asyncio.current_task()  # type: ignore[assignment]  # gRPC runs each call as a task
                CURRENT.set(call)
                if self.tracer is not None:
                    span = self.tracer.begin(call)
                reply = await serve(given, context, call)
            except asyncio.CancelledError:
                failure = call.ended_by if call is not None else None
                if failure is None:
                    self._finish(facts, call, context, None)
                    end_span(span, meter, started, "CANCELLED")
                    raise
            except VirtfleetError as error:
                failure = error
            except grpc.aio.BaseError:
                # The client has gone between two messages; gRPC says so by an error of its own.
                self._finish(facts, call, context, None)
                end_span(span, meter, started, "CANCELLED")
                raise
            except Exception as error:  # noqa: BLE001  # the boundary: the client learns the log id only
                failure = unexpected(error)
            else:
                del self.calls[call]
                if facts.mutation:
                    call.answered()
                    self._audit.record(call, code="OK")
                end_span(span, meter, started, "OK")
                return reply
            self._finish(facts, call, context, failure)
            end_span(span, meter, started, failure.code.name, failure.reason)
            await _tell(facts, call, context, failure)
            return None

        return handle

    def _serve_unary(
        self, facts: MethodFacts, method: Callable[[Any, Call], Awaitable[Message | bytes]], check: RequestCheck
    ) -> Callable[[bytes, Context, Call], Awaitable[bytes]]:
        async def serve(encoded: bytes, _context: Context, call: Call) -> bytes:
            request = check.decode(encoded)
            self.examine(facts, check, request, encoded, call)
            reply = encode(await method(request, call))
            if len(reply) > REPLY_LIMIT_BYTES:
                raise MessageTooLarge(
                    f"the answer would have {len(reply)} bytes; ask for less at a time",
                    size_bytes=len(reply),
                    limit_bytes=REPLY_LIMIT_BYTES,
                )
            return reply

        return serve

    def _serve_stream_out(
        self, facts: MethodFacts, method: Callable[[Any, Call], Any], check: RequestCheck
    ) -> Callable[[bytes, Context, Call], Awaitable[None]]:
        async def serve(encoded: bytes, context: Context, call: Call) -> None:
            request = check.decode(encoded)
            self.examine(facts, check, request, encoded, call)
            if facts.mutation:
                self._audit.record(call, code="", event="begin")
            await _send(method(request, call), context)

        return serve

    def _serve_stream_in(
        self, facts: MethodFacts, method: Callable[[Any, Call], Any], check: RequestCheck
    ) -> Callable[[Any, Context, Call], Awaitable[bytes | None]]:
        async def serve(_given: object, context: Context, call: Call) -> bytes | None:
            encoded = await context.read()
            first: Message | None = None
            if encoded is not grpc.aio.EOF:
                first = check.decode(encoded)
                self.examine(facts, check, first, encoded, call)
                if facts.mutation:
                    self._audit.record(call, code="", event="begin")
            elif facts.routing_required:
                field = ".".join(facts.routing)
                raise FieldRequired(f"the stream ended before its first message, which carries `{field}`", field=field)
            async with aclosing(_receive(first, context, check)) as requests:
                if facts.server_streaming:
                    await _send(method(requests, call), context)
                    return None
                reply = encode(await method(requests, call))
            await unread.drop(context, client_reads=False)
            return reply

        return serve

    # What became of it.

    def _finish(self, facts: MethodFacts, call: Call | None, context: Context, failure: VirtfleetError | None) -> None:
        """Close the books on a call that failed, or (no failure) was cancelled by its client."""
        code = failure.code.name if failure is not None else "CANCELLED"
        if call is not None:
            self.calls.pop(call, None)
            call.answered()
            if facts.mutation or (failure is not None and failure.code in _REFUSALS):
                self._audit.record(call, code=code, reason=failure.reason if failure is not None else "")
        elif failure is not None:
            self._audit.refused(
                facts.full_name,
                peer=context.peer(),
                subject=failure.metadata.get("subject", ""),
                code=code,
                reason=failure.reason,
                message=failure.message,
            )

    def review(self) -> None:
        """Judge the callers of all open calls again.

        Who has a certificate that has ended or been denied loses the call, and the stream whoever a new policy does not
        allow it any more.
        """
        policy_is_new = self._reviewed != self._authorizer.generation
        self._reviewed = self._authorizer.generation
        for call, task in list(self.calls.items()):
            try:
                if call.peer is not None:
                    self._authenticator.recheck(call.peer)
                    if policy_is_new and call.method.streaming:
                        self._authenticator.recheck_roles(call.peer, call.caller, call.method.permission, call.resource)
                if call.caller.via:
                    self._authenticator.recheck_subject(call.caller)
            except VirtfleetError as error:
                end(call, task, error)

    def end_all(self, error: VirtfleetError, *, streams_only: bool) -> None:
        """End open calls with an error."""
        for call, task in list(self.calls.items()):
            if call.method.streaming or not streams_only:
                end(call, task, error)


def end(call: Call, task: asyncio.Task[Any], error: VirtfleetError) -> None:
    """End an open call with an error: its handler is cancelled, its client gets the error."""
    if call.ended_by is None:
        call.ended_by = error
        task.cancel()


async def abort(context: Context, error: VirtfleetError) -> None:
    """Answer a call with an error and its details.

    Raises:
        grpc.aio.AbortError: Always.
    """
    status = error.to_status()
    trailers = (("grpc-status-details-bin", status.SerializeToString()),)
    await context.abort(error.code, status.message, trailers)


async def _tell(facts: MethodFacts, call: Call | None, context: Context, failure: VirtfleetError) -> None:
    """Answer a call with its failure, when its client can take it."""
    if facts.client_streaming and (call is None or call.ended_by is None):
        await unread.drop(context, client_reads=facts.server_streaming)
    await abort(context, failure)


def encode(answer: Message | bytes) -> bytes:
    """Return the bytes of an answer, which a handler may have already."""
    return answer if isinstance(answer, bytes) else answer.SerializeToString()


def end_span(span: Span | None, meter: MethodMeter, started: float, code: str, reason: str = "") -> None:
    """Count a call that has ended and end its span if it has one."""
    meter.observe(code, perf_counter() - started)
    if span is not None:
        span.end(code, reason)


def unexpected(error: Exception) -> Unexpected:
    """Log an error that nobody foresaw and return what the client may know of it."""
    log_id = secrets.token_hex(6)
    _log.error("unexpected error", exc_info=error, extra={"log_id": log_id})
    return Unexpected(f"something failed in the server that should not; its log has it as {log_id}", log_id=log_id)


def _missing(facts: MethodFacts) -> Callable[[Any, Call], Awaitable[Any]]:
    async def method(_request: object, _call: Call) -> Any:  # noqa: ANN401  # never returns
        raise MethodNotImplemented(f"{facts.full_name} is not built yet", method=facts.full_name)

    return method


async def _send(answers: Any, context: Context) -> None:  # noqa: ANN401  # an async iterator, or a coroutine that gives one
    if inspect.isawaitable(answers):
        answers = await answers
    try:
        async for answer in answers:
            await context.write(encode(answer))
    finally:
        close = getattr(answers, "aclose", None)
        if close is not None:
            await close()


async def _receive(first: Message | None, context: Context, check: RequestCheck) -> AsyncGenerator[Message, None]:
    if first is None:
        return
    yield first
    while (encoded := await context.read()) is not grpc.aio.EOF:
        message = check.decode(encoded)
        check.check_piece(message)
        yield message
    # gRPC reports a client that has gone as the end of its stream first, and cancels the call a moment later. Whoever
    # takes a cut stream for a whole one loses data: wait for that moment before the handler learns of the end.
    await asyncio.sleep(END_OF_STREAM_PAUSE_SECONDS)
