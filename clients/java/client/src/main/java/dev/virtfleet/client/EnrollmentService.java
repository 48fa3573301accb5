// Code generated from the protos by tools/java_services.py. DO NOT EDIT.

package dev.virtfleet.client;

import dev.virtfleet.fleet.v1.Certificate;
import dev.virtfleet.fleet.v1.CreateJoinTokenRequest;
import dev.virtfleet.fleet.v1.DeleteJoinTokenRequest;
import dev.virtfleet.fleet.v1.DeleteJoinTokenResponse;
import dev.virtfleet.fleet.v1.EnrollNodeRequest;
import dev.virtfleet.fleet.v1.EnrollNodeResponse;
import dev.virtfleet.fleet.v1.EnrollmentServiceGrpc;
import dev.virtfleet.fleet.v1.GetTrustBundleRequest;
import dev.virtfleet.fleet.v1.IssueUserCertificateRequest;
import dev.virtfleet.fleet.v1.IssueUserCertificateResponse;
import dev.virtfleet.fleet.v1.JoinToken;
import dev.virtfleet.fleet.v1.ListCertificatesRequest;
import dev.virtfleet.fleet.v1.ListCertificatesResponse;
import dev.virtfleet.fleet.v1.ListJoinTokensRequest;
import dev.virtfleet.fleet.v1.ListJoinTokensResponse;
import dev.virtfleet.fleet.v1.RenewCertificateRequest;
import dev.virtfleet.fleet.v1.RenewCertificateResponse;
import dev.virtfleet.fleet.v1.RevokeCertificateRequest;
import dev.virtfleet.fleet.v1.TrustBundle;
import io.grpc.CallOptions;
import io.grpc.Channel;

/**
 * Calls {@code virtfleet.fleet.v1.EnrollmentService}. Brings nodes and people into the fleet and takes them out. Served
 * by gateways only. How a node joins: an administrator calls CreateJoinToken for one node name and carries the token to
 * the node. The node makes its keys, connects to the enrolment port of the gateway, calls GetTrustBundle, checks that
 * the SHA-256 of a CA key in it is the one in its token, and then, trusting that CA alone, calls EnrollNode. So neither
 * an impostor of the gateway nor one of the node gets anything. Keys never leave the machine they were made on. Threads
 * may share it. What narrows a call ({@code withDeadlineAfter} and so on) returns a copy. No argument and no result is
 * null.
 */
public final class EnrollmentService extends FleetService<EnrollmentService> {

    EnrollmentService(VirtfleetClient client, Channel channel, CallOptions options) {
        super(client, channel, options);
    }

    @Override
    protected EnrollmentService build(Channel channel, CallOptions options) {
        return new EnrollmentService(client(), channel, options);
    }

    /** {@return the generated stub whose calls return futures} */
    public EnrollmentServiceGrpc.EnrollmentServiceFutureStub futureStub() {
        return EnrollmentServiceGrpc.newFutureStub(getChannel());
    }

    /** {@return the generated stub whose calls are told to observers: for streams of requests} */
    public EnrollmentServiceGrpc.EnrollmentServiceStub asyncStub() {
        return EnrollmentServiceGrpc.newStub(getChannel());
    }

    /**
     * Makes a token with which one node of that name may join, once, within the hour. The answer is the only message
     * that ever holds the token itself. A repetition with the same request_id gets ALREADY_EXISTS RESOURCE_EXISTS
     * instead of the token. ALREADY_EXISTS RESOURCE_EXISTS · INVALID_ARGUMENT NAME_MALFORMED.
     *
     * @param request what is asked for; it stays as it is
     * @return the answer
     * @throws VirtfleetException the call failed
     */
    public JoinToken createJoinToken(CreateJoinTokenRequest request) {
        return call(EnrollmentServiceGrpc.getCreateJoinTokenMethod(), request);
    }

    /**
     * Lists join tokens, never with their secrets. Used and expired ones stay listed for a day.
     *
     * @param request what is asked for; it stays as it is
     * @return every item, page by page as they are read
     */
    public Pages<JoinToken> listJoinTokens(ListJoinTokensRequest request) {
        return pages(EnrollmentServiceGrpc.getListJoinTokensMethod(), request, ListJoinTokensResponse::getJoinTokensList, false);
    }

    /**
     * Asks for one page. Lists join tokens, never with their secrets. Used and expired ones stay listed for a day.
     *
     * @param request what is asked for; it stays as it is
     * @return the page
     * @throws VirtfleetException the call failed
     */
    public ListJoinTokensResponse listJoinTokensPage(ListJoinTokensRequest request) {
        return call(EnrollmentServiceGrpc.getListJoinTokensMethod(), request);
    }

    /**
     * Makes a join token worthless and forgets it. NOT_FOUND RESOURCE_NOT_FOUND, unless {@code allow_missing}.
     *
     * @param request what is asked for; it stays as it is
     * @return the answer
     * @throws VirtfleetException the call failed
     */
    public DeleteJoinTokenResponse deleteJoinToken(DeleteJoinTokenRequest request) {
        return call(EnrollmentServiceGrpc.getDeleteJoinTokenMethod(), request);
    }

    /**
     * Admits a node: issues one certificate a service for the keys in its requests and puts it into the registry. Served
     * on the enrolment port to callers without a certificate; the token is the proof. A repetition with the same token
     * and the same keys, within the token's hour, gets the same certificates: a lost answer costs nothing. With a new
     * token a node of that name is enrolled anew: it keeps uid, labels and spec, and its old certificates are denied.
     * UNAUTHENTICATED JOIN_TOKEN_INVALID: unknown, used with other keys, expired, or of another node · INVALID_ARGUMENT
     * DOCUMENT_INVALID: a certificate request that does not parse, whose signature fails, or whose key is weak.
     *
     * @param request what is asked for; it stays as it is
     * @return the answer
     * @throws VirtfleetException the call failed
     */
    public EnrollNodeResponse enrollNode(EnrollNodeRequest request) {
        return call(EnrollmentServiceGrpc.getEnrollNodeMethod(), request);
    }

    /**
     * Issues a new certificate for the identity of the certificate with which the caller is connected, for the key in
     * the request. The old one stays good until its end. Every call issues another one. UNAUTHENTICATED
     * CERTIFICATE_REVOKED · PERMISSION_DENIED PERMISSION_MISSING: the caller renews one that is not its own ·
     * FAILED_PRECONDITION WRONG_STATE: certificates of this identity are not renewed by their holders (people get new
     * ones by IssueUserCertificate).
     *
     * @param request what is asked for; it stays as it is
     * @return the answer
     * @throws VirtfleetException the call failed
     */
    public RenewCertificateResponse renewCertificate(RenewCertificateRequest request) {
        return call(EnrollmentServiceGrpc.getRenewCertificateMethod(), request);
    }

    /**
     * Issues a certificate for a person or a controller, for the key in the request. Nobody can give roles that they do
     * not have.
     *
     * <p>INVALID_ARGUMENT NAME_MALFORMED, DOCUMENT_INVALID, FIELD_OUT_OF_RANGE (a role that there is not) ·
     * PERMISSION_DENIED PERMISSION_MISSING.
     *
     * @param request what is asked for; it stays as it is
     * @return the answer
     * @throws VirtfleetException the call failed
     */
    public IssueUserCertificateResponse issueUserCertificate(IssueUserCertificateRequest request) {
        return call(EnrollmentServiceGrpc.getIssueUserCertificateMethod(), request);
    }

    /**
     * Lists the certificates that the authority has issued, until a day after their end: by the methods here, for
     * gateways, and by {@code virtfleet authority issue}, which are listed a second or two after the command.
     *
     * @param request what is asked for; it stays as it is
     * @return every item, page by page as they are read
     */
    public Pages<Certificate> listCertificates(ListCertificatesRequest request) {
        return pages(EnrollmentServiceGrpc.getListCertificatesMethod(), request, ListCertificatesResponse::getCertificatesList, false);
    }

    /**
     * Asks for one page. Lists the certificates that the authority has issued, until a day after their end: by the
     * methods here, for gateways, and by {@code virtfleet authority issue}, which are listed a second or two after the
     * command.
     *
     * @param request what is asked for; it stays as it is
     * @return the page
     * @throws VirtfleetException the call failed
     */
    public ListCertificatesResponse listCertificatesPage(ListCertificatesRequest request) {
        return call(EnrollmentServiceGrpc.getListCertificatesMethod(), request);
    }

    /**
     * Puts a certificate, or every certificate of its identity, on the denial list: within 5 s no process of the fleet
     * takes it, on open streams neither. Succeeds if it is revoked already. There is no way back. NOT_FOUND
     * RESOURCE_NOT_FOUND: the gateway does not know it, and {@code allow_missing} is not set · INVALID_ARGUMENT
     * NAME_MALFORMED, FIELD_CONFLICT: with {@code allow_missing} the name holds no serial number, or {@code
     * whole_identity} is asked for of an identity that nobody knows · ABORTED ETAG_MISMATCH.
     *
     * @param request what is asked for; it stays as it is
     * @return the answer
     * @throws VirtfleetException the call failed
     */
    public Certificate revokeCertificate(RevokeCertificateRequest request) {
        return call(EnrollmentServiceGrpc.getRevokeCertificateMethod(), request);
    }

    /**
     * Gets the CA certificates and the denial list. Every process of the fleet calls it every 2 s with the numbers that
     * it has. Served on the enrolment port too, to callers without a certificate: nothing in it is secret, the CA is
     * checked by the hash in the token and the list by its signature. A {@code denial_list} of the caller that the
     * authority has signed is taken in; no other call with the effect NONE records anything.
     *
     * @param request what is asked for; it stays as it is
     * @return the answer
     * @throws VirtfleetException the call failed
     */
    public TrustBundle getTrustBundle(GetTrustBundleRequest request) {
        return call(EnrollmentServiceGrpc.getGetTrustBundleMethod(), request);
    }
}
