"""Join tokens: how they are made, found by their secret, and forgotten. The store holds hashes of secrets alone."""

from __future__ import annotations

import datetime as dt
import hashlib
import secrets
from typing import TYPE_CHECKING, Final

from virtfleet.fleet.v1 import enrollment_pb2
from virtfleet_service import names, requests, resources
from virtfleet_service.errors import FieldRequired, JoinTokenInvalid, NameMalformed, ResourceExists, ResourceNotFound

if TYPE_CHECKING:
    from virtfleet_service.call import Call
    from virtfleet_service.store import Store, Transaction

TOKEN_LIFETIME = dt.timedelta(hours=1)
LISTED_AFTER_END = dt.timedelta(days=1)
"""How long ended tokens stay listed."""

NODE_PREFIX: Final = "nodes/"
_CAUSE: Final = "virtfleet.fleet.v1.EnrollmentService."


class JoinTokens:
    """Keeps the join tokens of a fleet in the store of a gateway.

    Args:
        store: The gateway's store.
        key_hash: The SHA-256 of the authority's public key, which each token carries.
    """

    def __init__(self, store: Store, key_hash: str) -> None:
        self._store = store
        self._key_hash = key_hash

    async def create(self, request: enrollment_pb2.CreateJoinTokenRequest, call: Call) -> enrollment_pb2.JoinToken:
        """Make a token; the answer alone holds its secret.

        What is remembered for a repetition of the call lacks the secret, as everything that is stored does: a
        repetition is refused.

        Raises:
            NameMalformed: The node or the id has a wrong form.
            ResourceExists: A token of that id exists, or the call is a repetition.
        """
        node = node_id(request.join_token.spec.node, "join_token.spec.node")
        secret = secrets.token_urlsafe(32)
        token = enrollment_pb2.JoinToken(
            display_name=request.join_token.display_name,
            labels=request.join_token.labels,
            annotations=request.join_token.annotations,
        )
        token_id = request.join_token_id or f"t-{secrets.token_hex(8)}"
        resources.create_head(token, f"joinTokens/{names.check_id(token_id, 'join_token_id')}")
        token.spec.node = f"{NODE_PREFIX}{node}"
        ends = _now() + TOKEN_LIFETIME
        if request.join_token.spec.HasField("lifetime"):
            token.spec.lifetime.CopyFrom(request.join_token.spec.lifetime)
            ends = _now() + token.spec.lifetime.ToTimedelta()
        token.status.state = enrollment_pb2.JOIN_TOKEN_STATE_ACTIVE
        token.status.expire_time.FromDatetime(ends)
        token.status.ca_key_sha256 = self._key_hash
        if request.validate_only:
            if self._store.get(token.name) is not None:
                raise ResourceExists(f"{token.name} exists", resource=token.name)
            return token

        made = False

        def work(transaction: Transaction) -> enrollment_pb2.JoinToken:
            nonlocal made
            if transaction.get(token.name) is not None:
                raise ResourceExists(f"{token.name} exists", resource=token.name)
            transaction.put("join_token", token, cause=f"{_CAUSE}CreateJoinToken")
            transaction.put_record("tokenHash", secret_hash(secret), token.name.encode())
            made = True
            return token

        kept = await requests.once(self._store, call, request, work)
        if not made:
            raise ResourceExists(
                f"{kept.name} was made by the first of these calls; its secret was in that answer alone",
                resource=kept.name,
            )
        answer = enrollment_pb2.JoinToken()
        answer.CopyFrom(token)
        answer.token = f"vf1.{node}.{secret}.{self._key_hash}"
        return answer

    def delete(
        self, transaction: Transaction, request: enrollment_pb2.DeleteJoinTokenRequest
    ) -> enrollment_pb2.DeleteJoinTokenResponse:
        """Forget a token, inside a transaction that remembers the request_id.

        Raises:
            ResourceNotFound: There is none, and `allow_missing` is not set.
        """
        row = transaction.get(request.name)
        if row is None or row.kind != "join_token":
            if request.allow_missing:
                return enrollment_pb2.DeleteJoinTokenResponse()
            raise ResourceNotFound(f"there is no {request.name}", resource=request.name)
        token = enrollment_pb2.JoinToken.FromString(row.body)
        resources.check_preconditions(token, etag=request.etag, expected_uid=request.expected_uid)
        if not request.validate_only:
            self._delete(transaction, token, cause=f"{_CAUSE}DeleteJoinToken")
        return enrollment_pb2.DeleteJoinTokenResponse()

    @staticmethod
    def _delete(transaction: Transaction, token: enrollment_pb2.JoinToken, *, cause: str) -> None:
        transaction.delete(token.name, cause=cause)
        for key, body in transaction.list_records("tokenHash"):
            if body.decode() == token.name:
                transaction.delete_record("tokenHash", key)
                transaction.delete_record("admission", key)

    def lapse(self, transaction: Transaction) -> None:
        """Say of tokens that have not been used in their time that they have ended; forget those of long ago."""
        for row in transaction.list("join_token"):
            token = enrollment_pb2.JoinToken.FromString(row.body)
            ends = token.status.expire_time.ToDatetime(dt.UTC)
            if ends + LISTED_AFTER_END < _now():
                self._delete(transaction, token, cause="expired")
            elif ends <= _now() and token.status.state == enrollment_pb2.JOIN_TOKEN_STATE_ACTIVE:
                token.status.state = enrollment_pb2.JOIN_TOKEN_STATE_EXPIRED
                transaction.put("join_token", token, cause="expired")

    @staticmethod
    def usable(transaction: Transaction, digest: str, node: str, named: str) -> enrollment_pb2.JoinToken:
        """Return the token with a secret, if it may admit a node; a used one may, for a repetition.

        Args:
            transaction: The one that admits the node.
            digest: The hash of the secret.
            node: The node that asks.
            named: The node in the text of the token.

        Raises:
            JoinTokenInvalid: It is unknown, of another node, or has expired.
        """
        name = transaction.get_record("tokenHash", digest)
        row = transaction.get(name.decode()) if name is not None else None
        if row is None:
            raise JoinTokenInvalid("the join token is unknown", node=f"nodes/{node}")
        token = enrollment_pb2.JoinToken.FromString(row.body)
        if token.spec.node != f"{NODE_PREFIX}{node}" or named != node:
            raise JoinTokenInvalid("the join token is of another node", node=f"nodes/{node}")
        if token.status.expire_time.ToDatetime(dt.UTC) <= _now():
            raise JoinTokenInvalid("the join token has expired", node=f"nodes/{node}")
        return token


def node_id(name: str, path: str) -> str:
    """Return the id in `nodes/{node}`."""
    if not name:
        raise FieldRequired(f"`{path}` is required", field=path)
    node = name.removeprefix(NODE_PREFIX)
    if not name.startswith(NODE_PREFIX) or not names.is_id(node):
        raise NameMalformed(f"{path} must be nodes/ and an id", field=path)
    return node


def secret_hash(text: str) -> str:
    """Return the SHA-256 of a text in hexadecimal digits."""
    return hashlib.sha256(text.encode()).hexdigest()


def _now() -> dt.datetime:
    return dt.datetime.now(dt.UTC)
