"""TLS of servers and channels: credentials that follow their files, and the names of clients."""

from __future__ import annotations

import ipaddress
import logging
import math
import threading
from collections.abc import Collection, Iterable, Mapping

import grpc

from klein_services.runtime import metrics
from klein_services.runtime.errors import UnknownPeer
from klein_services.runtime.pem import Credentials, PemError, PemFiles
from klein_services.runtime.settings import ServerSettings

SERVER = "server"
"""Kind of the certificate that a server presents."""
CLIENT = "client"
"""Kind of the certificate that the orchestrator presents to stages."""
_NAME_PROPERTIES = ("x509_subject_alternative_name", "x509_common_name")
_log = logging.getLogger("klein.tls")


class CredentialStore:
    """Credentials of PEM files, read again by a thread when the files change. Broken files change nothing.

    Args:
        files: where the credentials are.
        stage: label of the metrics.
        kind: `SERVER` or `CLIENT`, likewise.
        interval_seconds: time between two looks at the files.

    Raises:
        PemError: the files cannot be used.
    """

    def __init__(self, files: PemFiles, stage: str, kind: str, interval_seconds: float) -> None:
        self._files = files
        self._labels = (stage, kind)
        self._interval_seconds = interval_seconds
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._watch, name=f"tls-{kind}", daemon=True)
        contents = files.contents()
        self._seen: tuple[bytes, ...] | str = contents
        """Contents or error of the last look, so that each state of the files is judged once."""
        self.current: Credentials
        """The newest credentials that can be used; may be read on any thread."""
        self._use(files.check(contents))
        for outcome in ("loaded", "refused"):
            metrics.CERTIFICATE_RELOADS.labels(stage, kind, outcome)

    def start(self) -> None:
        """Starts to follow the files."""
        self._thread.start()

    def stop(self) -> None:
        """Stops following the files."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join()

    def reload(self) -> None:
        """Reads the files now. New ones that cannot be used are logged and counted, once."""
        seen: tuple[bytes, ...] | str = ""
        try:
            seen = contents = self._files.contents()
            if seen == self._seen:
                return
            self._use(self._files.check(contents))
        except PemError as error:
            # Files that cannot be read have no contents; their error stands for them.
            seen = seen or str(error)
            if seen == self._seen:
                return
            outcome = "refused"
            _log.error("%s; the credentials in use stay", error)
        else:
            outcome = "loaded"
            _log.info("credentials were replaced", extra={"kind": self._labels[1]})
        self._seen = seen
        metrics.CERTIFICATE_RELOADS.labels(*self._labels, outcome).inc()

    def _use(self, credentials: Credentials) -> None:
        self.current = credentials
        if math.isfinite(credentials.expires_at):
            metrics.CERTIFICATE_EXPIRY.labels(*self._labels).set(credentials.expires_at)

    def _watch(self) -> None:
        while not self._stopping.wait(self._interval_seconds):
            self.reload()


def server_credentials(store: CredentialStore) -> grpc.ServerCredentials:
    """Returns credentials that each new connection takes from the store.

    With authorities in the store, clients must present a certificate that one of them issued.
    """
    offered = store.current

    def configuration(credentials: Credentials) -> grpc.ServerCertificateConfiguration:
        pair = (credentials.key, credentials.certificate)
        return grpc.ssl_server_certificate_configuration([pair], credentials.authorities or None)

    def fetch() -> grpc.ServerCertificateConfiguration | None:
        """Returns the configuration to use from now on, `None` to keep the last; gRPC calls it on its threads."""
        nonlocal offered
        current = store.current
        if current is offered:
            return None
        offered = current
        return configuration(current)

    return grpc.dynamic_ssl_server_credentials(
        configuration(offered),
        fetch,  # type: ignore[arg-type]  # the stubs forget that None is allowed
        bool(offered.authorities),
    )


def channel_credentials(credentials: Credentials) -> grpc.ChannelCredentials:
    """Returns credentials of a channel; without authorities it trusts those that gRPC comes with."""
    return grpc.ssl_channel_credentials(
        credentials.authorities or None, credentials.key or None, credentials.certificate or None
    )


def check_peer(auth_context: Mapping[str, Iterable[bytes]], allowed: Collection[str]) -> None:
    """Checks that one of the names in a client's certificate is allowed; with no names all are.

    Raises:
        UnknownPeer: none is.
    """
    if not allowed:
        return
    names = [name.decode() for key in _NAME_PROPERTIES for name in auth_context.get(key, ()) if name]
    if not set(names) & set(allowed):
        raise UnknownPeer(names)


def exposure(settings: ServerSettings, port: int, *, takes_tokens: bool, asks_for_tokens: bool) -> str:
    """Returns a warning about a port that other machines may reach without credentials; empty when there is none.

    Args:
        settings: address and TLS of the server.
        port: its port.
        takes_tokens: whether it has a setting for bearer tokens.
        asks_for_tokens: whether that is set.
    """
    host = settings.host.strip("[]")
    try:
        is_local = ipaddress.ip_address(host).is_loopback
    except ValueError:
        is_local = host == "localhost"
    if is_local or settings.tls_client_ca or (settings.tls_certificate and asks_for_tokens):
        return ""
    place = f"port {port} of {settings.host}"
    if asks_for_tokens:
        return f"tokens travel in plaintext to {place}: set KLEIN_TLS_CERTIFICATE and KLEIN_TLS_KEY"
    credentials = "KLEIN_TLS_CLIENT_CA or KLEIN_TOKENS_FILE" if takes_tokens else "KLEIN_TLS_CLIENT_CA"
    if settings.tls_certificate:
        return f"every machine that reaches {place} can use it: set {credentials} to admit only known clients"
    return (
        f"every machine that reaches {place} can use it, in plaintext and without credentials: set "
        f"KLEIN_TLS_CERTIFICATE, KLEIN_TLS_KEY and {credentials}, or KLEIN_HOST=127.0.0.1"
    )
