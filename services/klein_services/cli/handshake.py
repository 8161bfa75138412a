"""Handshake errors: why a connection that was opened could not be used, as a sentence and the flag to change."""

from __future__ import annotations

from typing import TYPE_CHECKING

from klein_services.cli.errors import CliError

if TYPE_CHECKING:
    from klein_services.cli.target import Target

_CLOSED = ("Socket closed", "Connection reset", "Broken pipe", "CERTIFICATE_REQUIRED", "ALERT")
"""Parts of messages about a server that ends the connection; it does not send its reason in time to be read."""


def handshake_error(message: str, target: Target) -> CliError | None:
    """Returns the error that a failed call's message stands for; `None` when it is not about the handshake."""
    if "last error" not in message and "failed to connect" not in message:
        return None
    closed = any(text in message for text in _CLOSED)
    credentials = target.credentials
    if credentials is None:
        return (
            CliError(
                f"{target} closed the plaintext connection; it may require TLS.",
                "Add --tls-ca FILE with its authority, or write --target grpcs://… for a public one.",
            )
            if closed
            else None
        )
    if "has expired" in message or "not yet valid" in message:
        return CliError(
            f"The certificate of {target} is not valid at this time.",
            "The server's operator renews it (KLEIN_TLS_CERTIFICATE); check this machine's clock, too.",
        )
    if "CERTIFICATE_VERIFY_FAILED" in message:
        trusted = "in --tls-ca" if credentials.authorities else "that are public"
        return CliError(
            f"None of the authorities {trusted} issued the certificate of {target}.",
            "Name the file of its authority with --tls-ca.",
        )
    if "Hostname Verification" in message:
        return CliError(
            f"The certificate of {target} is for another name.",
            "Call it by a name in its certificate, or state that name with --tls-name.",
        )
    if "WRONG_VERSION_NUMBER" in message or "HTTP_REQUEST" in message:
        return CliError(
            f"{target} does not speak TLS.",
            "Name the port that does with --target, or leave out --tls-ca and grpcs://.",
        )
    if not closed:
        return None
    if credentials.certificate:
        return CliError(
            f"{target} does not accept the certificate in --tls-certificate.",
            "Use one that its authority (KLEIN_TLS_CLIENT_CA) issued and that has not expired.",
        )
    return CliError(
        f"{target} ended the TLS handshake; it may require a certificate.",
        "Present one with --tls-certificate and --tls-key.",
    )
