"""Settings of the gateway."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from klein_services.runtime.pem import PemFiles
from klein_services.runtime.settings import (
    ProcessSettings,
    metrics_port_setting,
    pem_files,
    pem_problems,
    setting,
)


@dataclass(frozen=True, kw_only=True)
class GatewaySettings(ProcessSettings):
    """Address, orchestrator, limits."""

    port: int = setting(8080, help="Port of the HTTP server; 0 takes a free one", minimum=0, maximum=65535)
    metrics_port: int = metrics_port_setting(9468)
    max_connections: int = setting(
        1024,
        help="Connections that may be open at once; further ones get 503. Fewer where the process may open fewer files",
        minimum=1,
        maximum=10**6,
    )
    target: str = setting("127.0.0.1:50050", help="gRPC target of the orchestrator")
    target_tls_ca: str = setting(
        "",
        help="PEM file of the authorities that the orchestrator's certificate is checked with; empty: plaintext",
    )
    target_tls_certificate: str = setting(
        "", help="PEM file of the certificate that the gateway presents to the orchestrator"
    )
    target_tls_key: str = setting("", help="PEM file of that certificate's private key")
    target_tls_name: str = setting(
        "", help="Name that the orchestrator's certificate must have; empty: the target's host"
    )
    public_url: str = setting(
        "",
        help="URL under which clients reach the gateway, https://images.example; empty takes each request's Host",
    )
    body_limit_mib: int = setting(
        128, help="Most MiB of a request's body, all files of an upload together", minimum=1, maximum=4096
    )
    body_memory_mib: int = setting(
        1024,
        help="MiB of the bodies of all requests in progress; more are refused with 503",
        minimum=1,
        maximum=10**6,
    )
    header_timeout_seconds: float = setting(
        10.0,
        help="Seconds within which a new connection must finish TLS and send a request's headers",
        minimum=0.1,
        maximum=3600,
    )
    body_timeout_seconds: float = setting(
        60.0, help="Seconds within which a request's body must arrive", minimum=0.1, maximum=3600
    )
    keep_alive_seconds: int = setting(
        30, help="Seconds after which a connection without a request is closed", minimum=1, maximum=3600
    )
    request_timeout_seconds: float = setting(
        600.0, help="Seconds that a request to the orchestrator may take", minimum=1, maximum=86400
    )

    @property
    def target_tls_files(self) -> PemFiles:
        """Files of the TLS between gateway and orchestrator."""
        fields = ("target_tls_certificate", "target_tls_key", "target_tls_ca")
        return pem_files(self.target_tls_certificate, self.target_tls_key, self.target_tls_ca, fields)

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        yield from pem_problems(self.target_tls_files)
        if self.target_tls_name and not self.target_tls_files.are_set:
            yield "KLEIN_TARGET_TLS_NAME is set without KLEIN_TARGET_TLS_CA, without which there is no TLS"
        if self.public_url and not self.public_url.startswith(("http://", "https://")):
            yield f"KLEIN_PUBLIC_URL is {self.public_url!r}; it must begin with http:// or https://"
        if self.body_memory_mib < self.body_limit_mib:
            yield (
                f"KLEIN_BODY_MEMORY_MIB is {self.body_memory_mib}; it must be at least KLEIN_BODY_LIMIT_MIB, "
                f"{self.body_limit_mib}"
            )
