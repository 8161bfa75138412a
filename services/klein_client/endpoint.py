"""Endpoint of a suite: address, TLS, token and the options of channels to it."""

from __future__ import annotations

import os
import re
import ssl
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import grpc

DEFAULT_TARGET = "127.0.0.1:50050"
TARGET_VARIABLE = "KLEIN_TARGET"
TOKEN_VARIABLE = "KLEIN_TOKEN"
MESSAGE_BYTES = 256 << 20
"""Most bytes of a message, which carries encoded images."""
_PEM_BYTES = 1 << 20
_TOKEN = re.compile(r"[!-~]{1,4096}")
_URL = re.compile(r"(https?|grpcs?)://([^/]*)(.*)", re.IGNORECASE | re.DOTALL)
_OPTIONS: tuple[tuple[str, Any], ...] = (
    ("grpc.service_config_disable_resolution", 1),
    ("grpc.enable_retries", 1),
    # A proxy that the environment names is for connections out of the network, not inside it.
    ("grpc.enable_http_proxy", 0),
    ("grpc.max_receive_message_length", MESSAGE_BYTES),
    ("grpc.max_send_message_length", MESSAGE_BYTES),
    ("grpc.http2.max_frame_size", 1 << 20),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),
)


@dataclass(frozen=True, kw_only=True)
class Tls:
    """TLS of a connection: PEM files as paths, or their contents as bytes."""

    ca: str | os.PathLike[str] | bytes | None = None
    """Authorities that are trusted; `None` means those that gRPC comes with."""
    certificate: str | os.PathLike[str] | bytes | None = None
    """Certificate to present to the server, followed by those of its issuers."""
    key: str | os.PathLike[str] | bytes | None = None
    """Private key of that certificate."""
    server_name: str = ""
    """Name that the server's certificate must have; empty means the host of the target."""

    @cached_property
    def credentials(self) -> grpc.ChannelCredentials:
        """Returns the credentials of a channel.

        Raises:
            ValueError: a file cannot be read or holds something else, or the key is not that of the certificate.
        """
        names = ("ca", "certificate", "key")
        contents = {name: _pem(name, value) for name in names if (value := getattr(self, name)) is not None}
        if ("certificate" in contents) != ("key" in contents):
            raise ValueError("tls: a certificate needs its key, and a key its certificate")
        _check(contents)
        return grpc.ssl_channel_credentials(
            contents.get("ca"), contents.get("key"), contents.get("certificate")
        )


class Endpoint:
    """Address of a suite, and everything that a connection to it needs.

    Args:
        target: `HOST:PORT`, `grpcs://HOST:PORT` or `https://HOST:PORT` for TLS, or a target of gRPC such as
            `dns:///HOST:PORT`; by default `KLEIN_TARGET`, else the suite on this machine.
        token: of the suite's own authentication; by default `KLEIN_TOKEN`.
        tls: True for TLS with public authorities.
        options: further options of the channel, which override those of the client.

    Raises:
        ValueError: one of them cannot be used.
    """

    def __init__(
        self,
        target: str | None = None,
        *,
        token: str | None = None,
        tls: Tls | bool = False,
        options: Sequence[tuple[str, Any]] = (),
    ) -> None:
        text = (os.environ.get(TARGET_VARIABLE, "") or DEFAULT_TARGET) if target is None else target
        if not text.strip():
            raise ValueError("the target is empty; name an orchestrator as HOST:PORT")
        url = _URL.fullmatch(text.strip())
        if url and (url[1].lower() in ("http", "grpc") or url[3] not in ("", "/")):
            raise ValueError(
                f"the target {text} is a URL, but gRPC takes HOST:PORT; write {url[2]}, or grpcs://{url[2]} for TLS"
            )
        self.target = url[2] if url else text.strip()
        self.authorization = authorization(token)
        self._tls = (tls if isinstance(tls, Tls) else Tls()) if tls or url else None
        self.credentials = self._tls.credentials if self._tls else None
        name = self._tls.server_name if self._tls else ""
        defaults = [
            *_OPTIONS,
            ("grpc.service_config", service_config()),
            *([("grpc.ssl_target_name_override", name)] if name else []),
        ]
        # gRPC takes the first of two options of a name.
        self.options = tuple(dict([*defaults, *options]).items())


def authorization(token: str | None = None) -> tuple[tuple[str, str], ...]:
    """Returns the metadata that carries a token, by default that of `KLEIN_TOKEN`; empty without one.

    Raises:
        ValueError: the text cannot be a token. It is not shown.
    """
    text = os.environ.get(TOKEN_VARIABLE, "").strip() if token is None else token.strip()
    if text and not _TOKEN.fullmatch(text):
        raise ValueError("the token has characters that no token has, or too many")
    return (("authorization", f"Bearer {text}"),) if text else ()


def service_config() -> str:
    """Returns the service config of klein_api, which has the policy of retries, as JSON."""
    return resources.files("klein_api.v1").joinpath("service_config.json").read_text(encoding="utf-8")


def _pem(name: str, value: str | os.PathLike[str] | bytes) -> bytes:
    if isinstance(value, bytes):
        return value
    try:
        with Path(value).open("rb") as file:
            data = file.read(_PEM_BYTES + 1)
    except OSError as error:
        raise ValueError(f"tls: {name} {value} cannot be read: {error.strerror}") from error
    if len(data) > _PEM_BYTES:
        raise ValueError(f"tls: {name} {value} has more than {_PEM_BYTES} bytes; it is no PEM file")
    return data


def _check(contents: dict[str, bytes]) -> None:
    """Checks PEM data with OpenSSL: gRPC would report bad data at the first call, as a server that does not answer."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    if "ca" in contents:
        try:
            context.load_verify_locations(cadata=contents["ca"].decode("ascii"))
        except (ssl.SSLError, ValueError) as error:
            raise ValueError("tls: ca holds no certificate in PEM format") from error
    if "certificate" in contents:
        with TemporaryDirectory() as folder:
            files = []
            for name in ("certificate", "key"):
                file = Path(folder, name)
                file.touch(0o600)
                file.write_bytes(contents[name])
                files.append(file)
            try:
                # The password of an encrypted key would be asked for on the terminal.
                context.load_cert_chain(files[0], files[1], password=lambda: b"-")
            except ssl.SSLError as error:
                raise ValueError(
                    "tls: certificate and key are no pair in PEM format, or the key is encrypted"
                ) from error
