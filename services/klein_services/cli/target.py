"""Target: the orchestrator that a command calls, and the TLS and the token with which it does."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypedDict

import typer

from klein_services.cli.errors import CliError, with_period
from klein_services.cli.exit_codes import MISUSED
from klein_services.cli.ports import DEFAULT_PORT, LOOPBACK
from klein_services.runtime.pem import Credentials, PemError, PemFiles

if TYPE_CHECKING:
    from klein_client import Client, Tls

DEFAULT_TARGET = f"{LOOPBACK}:{DEFAULT_PORT}"
_LONGEST_TOKEN_FILE = 8192
_FLAGS = ("--tls-certificate", "--tls-key", "--tls-ca")
_URL = re.compile(r"(https?|grpcs?)://([^/]*)(.*)", re.IGNORECASE | re.DOTALL)


@dataclass(frozen=True)
class Target:
    """Address of an orchestrator, and credentials for TLS; without credentials it is called in plaintext."""

    address: str
    credentials: Credentials | None = None
    server_name: str = ""
    """Name that the server's certificate must have; empty means the address."""

    def __str__(self) -> str:
        return self.address


class Connection(TypedDict):
    """Arguments of a client that are about its connection."""

    target: str
    token: str | None
    tls: Tls | bool


def open_client(target: Target | str, token: str = "") -> Client:
    """Returns a client with the arguments that `connection` returns; raises CliError as that does."""
    from klein_client import Client

    # A command that fails at once, with the time to wait in its message, leaves the choice to its user.
    return Client(**connection(target, token), retry=False)


def connection(target: Target | str, token: str = "") -> Connection:
    """Returns the arguments of a client of an orchestrator, in plaintext if only an address is given.

    Args:
        target: the orchestrator.
        token: of the suite's own authentication; empty means that of `KLEIN_TOKEN`.

    Raises:
        CliError: the text cannot be a token. It is not shown.
    """
    # Imported here: this module is loaded by commands that call nothing.
    from klein_client import Tls
    from klein_client.endpoint import TOKEN_VARIABLE, authorization

    called = Target(target) if isinstance(target, str) else target
    try:
        authorization(token or None)
    except ValueError as error:
        raise CliError(
            "The token has characters that no token has, or too many.",
            f"{TOKEN_VARIABLE} and --token-file must hold a token and nothing else.",
            MISUSED,
        ) from error
    tls: Tls | bool = False
    if (credentials := called.credentials) is not None:
        tls = Tls(
            ca=credentials.authorities or None,
            certificate=credentials.certificate or None,
            key=credentials.key or None,
            server_name=called.server_name,
        )
    return Connection(target=called.address, token=token or None, tls=tls)


def read_token(file: Path | None) -> str:
    """Returns the token in a file, without the white space around it; empty without a file.

    Raises:
        CliError: the file cannot be read, or is empty.
    """
    if file is None:
        return ""
    try:
        with file.open("rb") as content:
            token = content.read(_LONGEST_TOKEN_FILE).decode("ascii", "replace").strip()
    except OSError as error:
        raise CliError(f"--token-file {file} cannot be read: {error.strerror}.", exit_code=MISUSED) from error
    if not token:
        raise CliError(f"--token-file {file} is empty.", exit_code=MISUSED)
    return token


def read_target(
    target: str, authority: Path | None, certificate: Path | None, key: Path | None, server_name: str
) -> Target:
    """Returns the target that flags describe.

    Raises:
        CliError: the target is a URL of another kind, or the files cannot be used.
    """
    url = _URL.fullmatch(target.strip())
    if url and (url[1].lower() in ("http", "grpc") or url[3] not in ("", "/")):
        raise CliError(
            f"--target {target} is a URL, but gRPC takes HOST:PORT.",
            f"Write {url[2]}, or grpcs://{url[2]} for TLS.",
            MISUSED,
        )
    own, private, trusted = (str(path or "") for path in (certificate, key, authority))
    files = PemFiles(own, private, trusted, _FLAGS)
    if not url and not files.are_set:
        if server_name:
            raise CliError("--tls-name has no use without TLS.", "Add --tls-ca, or write grpcs://.", MISUSED)
        return Target(target)
    try:
        return Target(url[2] if url else target, files.read(), server_name)
    except PemError as error:
        raise CliError(with_period(str(error)), exit_code=MISUSED) from error


def _checked_target(target: str) -> str:
    if not target.strip():
        raise typer.BadParameter("it is empty; name an orchestrator as HOST:PORT")
    return target


TargetFlag = Annotated[
    str,
    typer.Option(
        "--target",
        metavar="[grpcs://]HOST:PORT",
        envvar="KLEIN_TARGET",
        help="The orchestrator to call; grpcs:// or https:// calls it with TLS and trusts public authorities.",
        callback=_checked_target,
    ),
]
AuthorityFlag = Annotated[
    Path | None,
    typer.Option(
        "--tls-ca",
        metavar="FILE",
        envvar="KLEIN_TARGET_TLS_CA",
        help="Call with TLS and trust the authorities in this PEM file.",
    ),
]
CertificateFlag = Annotated[
    Path | None,
    typer.Option(
        "--tls-certificate",
        metavar="FILE",
        envvar="KLEIN_TARGET_TLS_CERTIFICATE",
        help="PEM file of the certificate to present to the server.",
    ),
]
KeyFlag = Annotated[
    Path | None,
    typer.Option(
        "--tls-key",
        metavar="FILE",
        envvar="KLEIN_TARGET_TLS_KEY",
        help="PEM file of that certificate's private key.",
    ),
]
ServerNameFlag = Annotated[
    str,
    typer.Option(
        "--tls-name",
        metavar="NAME",
        envvar="KLEIN_TARGET_TLS_NAME",
        help="Name that the server's certificate must have; by default the host of --target.",
    ),
]
