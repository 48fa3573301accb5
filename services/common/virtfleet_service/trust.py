"""What a server believes: its certificates, the authorities, the denial list and the policy, as their files change.

A server whose settings name an identity directory is a member of a fleet: its certificate is renewed and the denial
list fetched as long as it runs (`enrollment.Membership`).
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from virtfleet_service.authorization import PolicyError
from virtfleet_service.errors import DocumentInvalid
from virtfleet_service.identity import Authenticator
from virtfleet_service.settings import SettingsError, TlsSettings
from virtfleet_service.tls import CertificateSource, Credentials, fingerprint

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from virtfleet_service.authorization import Authorizer
    from virtfleet_service.denial import Denials
    from virtfleet_service.settings import ServiceSettings

_log = logging.getLogger(__name__)

_MEMBERSHIP_PAUSE_SECONDS = 10.0

MEMBER_FILE = "fleet.toml"
"""Is in the identity directory of a node that has joined."""


class Trust:
    """Holds what a server believes and takes what is new in the files.

    Args:
        settings: Where the files are.
        service: The name of the service: its certificate in the identity directory.
        authorizer: Gets the policy.
        node_role: The role of callers with a node's certificate; empty: they are refused.
        needed: Whether the server has a listener with TLS.

    Raises:
        BackingMissing: A certificate file is absent or does not parse.
        SettingsError: The policy file cannot be used, or the identity directory is of another node.
        DocumentInvalid: What the node remembers of its fleet is damaged.
    """

    def __init__(
        self, settings: ServiceSettings, service: str, authorizer: Authorizer, *, node_role: str, needed: bool
    ) -> None:
        self._settings = settings
        self._service = service
        self._authorizer = authorizer
        # By file: what has been taken of it, and what was wrong with it last.
        self._taken: dict[str, object] = {}
        self._said: dict[str, str] = {}
        self._member = settings.identity_dir is not None and (settings.identity_dir / MEMBER_FILE).exists()
        if needed and not self._member and settings.identity_dir is not None:
            _log.warning(
                "%s is missing: nobody renews the certificates beside it, so join again before they end",
                settings.identity_dir / MEMBER_FILE,
            )
        trust_domain, gateways = self._fleet() if self._member else (settings.trust_domain, ())
        self.authenticator = Authenticator(trust_domain, authorizer, node_role=node_role, gateways=gateways)
        self.files = tls_files(settings, service)
        self.certificates = CertificateSource(self.files) if needed else None
        self._load_policy(first=True)
        self._load_denials()

    def _fleet(self) -> tuple[str, tuple[str, ...]]:
        from virtfleet_service.enrollment import Fleet

        directory = self._settings.identity_dir
        fleet = Fleet.load(directory) if directory is not None else None
        if fleet is None:
            return self._settings.trust_domain, ()
        if fleet.node != self._settings.node:
            raise SettingsError(f"identity_dir: {directory} is of node `{fleet.node}`, not `{self._settings.node}`")
        return fleet.trust_domain, fleet.gateway_identities

    @property
    def credentials(self) -> Credentials | None:
        """The certificate in use; None: no TLS."""
        return self.certificates.current if self.certificates is not None else None

    @property
    def denial_list_number(self) -> int:
        """The number of the denial list in force; 0: none."""
        denials = self.authenticator.denials
        return denials.number if denials is not None else 0

    async def keep_membership(self, changed: Callable[[], object]) -> None:
        """Renew the certificate and fetch the denial list until cancelled; returns at once outside of a fleet.

        Args:
            changed: Is called when a file has changed.
        """
        directory = self._settings.identity_dir
        if not self._member or directory is None or not (directory / f"{self._service}.crt").exists():
            return
        from virtfleet_service.enrollment import Membership

        while True:
            try:
                await Membership(directory, self._service, changed=changed, note=_log.warning).run()
            except Exception:  # noqa: BLE001  # without it the certificate would run out: try again, whatever it was
                _log.exception("keeping the membership of the fleet failed")
                await asyncio.sleep(_MEMBERSHIP_PAUSE_SECONDS)

    def refresh(self) -> None:
        """Look at all files and take what is new; what cannot be used is logged and the old stays in force."""
        if self.certificates is not None and self.certificates.reload_if_changed():
            self.authenticator.forget()
        self._load_policy()
        self._load_denials()

    def reload(self, *, validate_only: bool = False) -> None:
        """Read certificate, key, trust bundle and denial list again.

        Raises:
            BackingMissing: One is absent or does not parse; the old ones stay in use.
        """
        if self.certificates is None:
            return
        if validate_only:
            self.certificates.check()
            return
        if self.certificates.reload():
            self.authenticator.forget()
        self._taken.pop("denials", None)
        self._load_denials()

    def take_denials(self, denials: Denials) -> None:
        """Obey a list that is not in the file yet, unless it is older than that in force."""
        if denials.number >= self.denial_list_number:
            self.authenticator.denials = denials

    def _changed(self, what: str, path: Path) -> object:
        """Return what is to be noted (`_taken`) once the file has been taken; None: it is as it was."""
        found = fingerprint(path)
        return None if self._taken.get(what) == found else found

    def _complain(self, what: str, text: str) -> None:
        """Log what is wrong with a file once; it is looked at again with each refresh."""
        if self._said.get(what) != text:
            self._said[what] = text
            _log.error("%s", text)

    def _note(self, what: str, found: object) -> None:
        self._taken[what] = found
        self._said.pop(what, None)

    def _load_policy(self, *, first: bool = False) -> None:
        path = self._settings.policy_file
        found = None if path is None else self._changed("policy", path)
        if path is None or found is None:
            return
        try:
            self._authorizer.load_policy(path)
        except (PolicyError, OSError) as error:
            if first:
                raise SettingsError(f"policy_file: {path}: {error}") from error
            self._complain("policy", f"the policy file cannot be used, the old policy stays: {error}")
            return
        self._note("policy", found)
        self.authenticator.forget()

    def _load_denials(self) -> None:
        path = self.files.denial_list_file
        found = None if path is None else self._changed("denials", path)
        if path is None or self.certificates is None or found is None:
            return
        from cryptography import x509

        from virtfleet_service.denial import Denials

        try:
            authorities = x509.load_pem_x509_certificates(self.certificates.current.authorities)
            fresh = Denials.load(path, authorities)
        except (DocumentInvalid, OSError) as error:
            self._complain("denials", f"the denial list cannot be used, the old one stays: {error}")
            return
        self._note("denials", found)
        if fresh.number < self.denial_list_number:
            _log.error(
                "the denial list is older than the one in force, which stays",
                extra={"number": fresh.number, "in_force": self.denial_list_number},
            )
            return
        self.authenticator.denials = fresh


def tls_files(settings: ServiceSettings, service: str) -> TlsSettings:
    """Return where the certificate files are: as set one by one, else in the identity directory."""
    directory, given = settings.identity_dir, settings.tls
    if directory is None:
        return given
    return TlsSettings(
        certificate_file=given.certificate_file or directory / f"{service}.crt",
        key_file=given.key_file or directory / f"{service}.key",
        ca_file=given.ca_file or directory / "ca.crt",
        denial_list_file=given.denial_list_file or directory / "denied",
    )


async def watch(refresh: Callable[[], object], period_seconds: float) -> None:
    """Call a function again and again until cancelled; what it raises is logged."""
    while True:
        await asyncio.sleep(period_seconds)
        try:
            refresh()
        except Exception:  # noqa: BLE001  # one bad look must not end the watch that revocation hangs on
            _log.exception("looking at certificates, policy and denial list failed")
