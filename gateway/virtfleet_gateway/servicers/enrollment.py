"""The gRPC edge of enrolment: `virtfleet.fleet.v1.EnrollmentService`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from virtfleet.fleet.v1 import enrollment_pb2
from virtfleet_service import paging, requests

if TYPE_CHECKING:
    from virtfleet_gateway.certificates import Certificates
    from virtfleet_gateway.denial_list import DenialList
    from virtfleet_gateway.enrollment import Enrollment
    from virtfleet_gateway.join_tokens import JoinTokens
    from virtfleet_service.call import Call
    from virtfleet_service.store import Store


class EnrollmentServicer:
    """Serves `virtfleet.fleet.v1.EnrollmentService`."""

    def __init__(
        self,
        store: Store,
        tokens: JoinTokens,
        enrollment: Enrollment,
        certificates: Certificates,
        denial_list: DenialList,
    ) -> None:
        self._store = store
        self._tokens = tokens
        self._enrollment = enrollment
        self._certificates = certificates
        self._denial_list = denial_list

    async def create_join_token(
        self, request: enrollment_pb2.CreateJoinTokenRequest, call: Call
    ) -> enrollment_pb2.JoinToken:
        """Make a join token."""
        return await self._tokens.create(request, call)

    async def list_join_tokens(self, request: enrollment_pb2.ListJoinTokensRequest, call: Call) -> bytes:
        """List join tokens."""
        return paging.list_reply(
            self._store, "join_token", request, enrollment_pb2.ListJoinTokensResponse, parent="", call=call
        )

    async def delete_join_token(
        self, request: enrollment_pb2.DeleteJoinTokenRequest, call: Call
    ) -> enrollment_pb2.DeleteJoinTokenResponse:
        """Forget a join token."""
        return await requests.once(
            self._store, call, request, lambda transaction: self._tokens.delete(transaction, request)
        )

    async def enroll_node(
        self, request: enrollment_pb2.EnrollNodeRequest, _call: Call
    ) -> enrollment_pb2.EnrollNodeResponse:
        """Admit a node."""
        return await self._enrollment.enroll_node(request)

    async def renew_certificate(
        self, request: enrollment_pb2.RenewCertificateRequest, call: Call
    ) -> enrollment_pb2.RenewCertificateResponse:
        """Issue a new certificate for the caller's own identity."""
        return await requests.once(
            self._store, call, request, lambda transaction: self._enrollment.renew(transaction, request, call)
        )

    async def issue_user_certificate(
        self, request: enrollment_pb2.IssueUserCertificateRequest, call: Call
    ) -> enrollment_pb2.IssueUserCertificateResponse:
        """Issue a certificate for a person or a controller."""
        return await requests.once(
            self._store, call, request, lambda transaction: self._enrollment.issue_user(transaction, request, call)
        )

    async def list_certificates(self, request: enrollment_pb2.ListCertificatesRequest, call: Call) -> bytes:
        """List certificates."""
        return paging.list_reply(
            self._store, "certificate", request, enrollment_pb2.ListCertificatesResponse, parent="", call=call
        )

    async def revoke_certificate(
        self, request: enrollment_pb2.RevokeCertificateRequest, call: Call
    ) -> enrollment_pb2.Certificate:
        """Put a certificate on the denial list."""
        return await self._certificates.revoke(request, call)

    async def get_trust_bundle(
        self, request: enrollment_pb2.GetTrustBundleRequest, call: Call
    ) -> enrollment_pb2.TrustBundle:
        """Give the CA certificates and the denial list; take one from members, never from the enrolment port."""
        if request.HasField("denial_list") and call.peer is not None:
            await self._certificates.take_in(request.denial_list, call.caller.subject)
        return self._denial_list.trust_bundle(request)
