"""Where a server is and how to prove who one is."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qsl, urlsplit

import grpc

from virtfleet_client import files

CHANNEL_OPTIONS: tuple[tuple[str, int | str], ...] = (
    ("grpc.max_receive_message_length", 8 << 20),
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    # The one above ends nothing while a ping is under way; this one, a minute by default, does.
    ("grpc.http2.ping_timeout_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 5_000),
)
"""Answers stay below 3 MiB, so 8 MiB never stands in the way; keepalive finds a dead gateway within 30 s."""


@dataclass(frozen=True, slots=True)
class Credentials:
    """Holds the files that mutual TLS needs.

    Attributes:
        ca_file: The certificates of the fleet's authority (PEM).
        certificate_file: The certificate of the caller (PEM), as `virtfleet authority issue` writes it.
        key_file: Its private key (PEM).
    """

    ca_file: Path
    certificate_file: Path
    key_file: Path

    def stamps(self) -> tuple[object, ...]:
        """Return what changes when one of the files is replaced.

        Raises:
            OSError: One cannot be looked at.
        """
        looks = [path.stat() for path in (self.ca_file, self.certificate_file, self.key_file)]
        return tuple((look.st_mtime_ns, look.st_size, look.st_ino) for look in looks)

    def for_channel(self) -> grpc.ChannelCredentials:
        """Return what a gRPC channel needs.

        Raises:
            OSError: A file cannot be read, or certificate and key do not fit together.
        """
        authorities, key, chain = (files.read(path) for path in (self.ca_file, self.key_file, self.certificate_file))
        # gRPC would only say that the handshake failed.
        try:
            context = ssl.create_default_context(cafile=self.ca_file)
        except ssl.SSLError as error:
            message = f"{self.ca_file}: holds no certificate of an authority: {error.strerror}"
            raise OSError(message) from error
        try:
            context.load_cert_chain(self.certificate_file, self.key_file)
        except ssl.SSLError as error:
            message = f"{self.certificate_file} and {self.key_file}: are no certificate with its key: {error.strerror}"
            raise OSError(message) from error
        return grpc.ssl_channel_credentials(authorities, key, chain)


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Is the address of a gateway, or of one service of a node.

    Attributes:
        target: What gRPC connects to: `host:port` or `unix:/path`.
        secure: Whether the transport is mutual TLS.
        server_name: The DNS name that the certificate of the server must have; empty: the host of the target.
        proxied: The URI that the helper process `virtfleet proxy` gives a socket for; empty: gRPC speaks it itself.
    """

    target: str
    secure: bool
    server_name: str = ""
    proxied: str = ""

    @classmethod
    def parse(cls, uri: str) -> Endpoint:
        """Parse `tls://host:port`, `unix:///path/to/socket`, or a bare `host:port` (mutual TLS).

        `tls://host:port?server_name=NAME` demands NAME of the certificate instead of the host. `ssh://…` and
        `command:…` go through the helper process `virtfleet proxy`; with `server_name=` TLS is spoken through it.

        Raises:
            ValueError: The URI has none of these forms.
        """
        scheme = uri.partition(":")[0]
        if scheme in ("ssh", "command"):
            name = dict(parse_qsl(urlsplit(uri).query)).get("server_name", "")
            return cls(target=uri, secure=bool(name), server_name=name, proxied=uri)
        if "://" not in uri:
            uri = f"tls://{uri}"
        parts = urlsplit(uri)
        if parts.scheme == "unix" and parts.path:
            return cls(target=f"unix:{parts.path}", secure=False)
        if parts.scheme == "tls" and parts.hostname and parts.port and not parts.path:
            host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
            query = dict(item.split("=", 1) for item in parts.query.split("&") if "=" in item)
            return cls(target=f"{host}:{parts.port}", secure=True, server_name=query.get("server_name", ""))
        message = (
            f"{uri!r} is no address of virtfleet: tls://host:port, unix:///path, ssh://host/path or command:program"
        )
        raise ValueError(message)

    def options(self) -> list[tuple[str, int | str]]:
        """Return the channel options for this endpoint."""
        options = list(CHANNEL_OPTIONS)
        if self.server_name:
            options.append(("grpc.ssl_target_name_override", self.server_name))
        if not self.secure:
            # A unix path is no host name; without this gRPC sends the escaped path as the authority.
            options.append(("grpc.default_authority", "localhost"))
        return options
