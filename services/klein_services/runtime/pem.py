"""PEM files of a certificate, its key and trusted authorities: read together and checked."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cryptography.x509 import Certificate

FILE_BYTES = 1 << 20
"""Most bytes of a PEM file; a bundle of all public authorities has a fifth of that."""
_READS = 3
"""Attempts to read all files from one state: a mounted Secret replaces them at once, possibly between two reads."""


class PemError(Exception):
    """PEM files cannot be used; the text is one sentence that names the setting."""


@dataclass(frozen=True)
class Credentials:
    """Contents of PEM files that were checked; empty where no file is set."""

    certificate: bytes
    """A server's or client's own certificate, followed by those of its issuers but the root."""
    key: bytes
    authorities: bytes
    expires_at: float
    """Unix time at which the first certificate of `certificate` expires; infinite without one."""


@dataclass(frozen=True)
class PemFiles:
    """Paths of PEM files, empty where not set, and the settings or flags that they come from."""

    certificate: str
    key: str
    authorities: str
    names: tuple[str, str, str]
    """Settings or flags of certificate, key and authorities, for messages."""

    @property
    def are_set(self) -> bool:
        return any(self._paths)

    def contents(self) -> tuple[bytes, bytes, bytes]:
        """Reads all files from one state of them, as far as they hold still.

        Raises:
            PemError: a file cannot be read, or is too large to be one.
        """
        for _ in range(_READS):
            first, second = (
                tuple(_file_bytes(name, path) for name, path in zip(self.names, self._paths, strict=True))
                for _ in range(2)
            )
            if first == second:
                break
        certificate, key, authorities = second
        return certificate, key, authorities

    def check(self, contents: tuple[bytes, bytes, bytes]) -> Credentials:
        """Checks what `contents` returned.

        Raises:
            PemError: the first problem: a file without its counterpart, no PEM, an encrypted key, a key of another
                certificate, or a certificate that is not valid now.
        """
        certificate, key, authorities = contents
        if problem := next(self._problems(certificate, key, authorities), ""):
            raise PemError(problem)
        chain = _certificates(certificate) if certificate else []
        expires_at = min((each.not_valid_after_utc.timestamp() for each in chain), default=math.inf)
        return Credentials(certificate, key, authorities, expires_at)

    def read(self) -> Credentials:
        """Reads and checks the files; raises PemError."""
        return self.check(self.contents())

    @property
    def _paths(self) -> tuple[str, str, str]:
        return (self.certificate, self.key, self.authorities)

    def _problems(self, certificate: bytes, key: bytes, authorities: bytes) -> Iterator[str]:
        names, paths = self.names, self._paths
        if self.certificate and not self.key:
            yield f"{names[0]} is set without {names[1]}; a certificate needs its key"
        if self.key and not self.certificate:
            yield f"{names[1]} is set without {names[0]}; a key needs its certificate"
        if self.authorities and not _certificates(authorities):
            yield f"{names[2]}: {paths[2]} holds no certificate in PEM format"
        if self.certificate:
            chain = _certificates(certificate)
            if not chain:
                yield f"{names[0]}: {paths[0]} holds no certificate in PEM format"
            yield from (f"{names[0]}: {paths[0]} {problem}" for problem in _invalid_times(chain))
            if problem := _key_problem(key, chain[0]):
                yield f"{names[1]}: {paths[1]} {problem}"


def _file_bytes(name: str, path: str) -> bytes:
    if not path:
        return b""
    try:
        with Path(path).open("rb") as file:
            data = file.read(FILE_BYTES + 1)
    except OSError as error:
        raise PemError(f"{name}: {path} cannot be read: {error.strerror}") from None
    if len(data) > FILE_BYTES:
        raise PemError(f"{name}: {path} has more than {FILE_BYTES} bytes; it is no PEM file")
    return data


def _certificates(data: bytes) -> list[Certificate]:
    """Returns the certificates of a PEM file; none when one of them cannot be parsed."""
    # Imported here: this module is loaded by commands that never read a certificate.
    from cryptography.x509 import load_pem_x509_certificates

    try:
        certificates: list[Certificate] = load_pem_x509_certificates(data)
    except ValueError:
        return []
    return certificates


def _invalid_times(chain: list[Certificate]) -> Iterator[str]:
    now = datetime.fromtimestamp(time.time(), UTC)
    for certificate in chain:
        if certificate.not_valid_after_utc < now:
            yield f"expired at {certificate.not_valid_after_utc:%Y-%m-%d %H:%M} UTC"
        if certificate.not_valid_before_utc > now:
            yield f"is not valid before {certificate.not_valid_before_utc:%Y-%m-%d %H:%M} UTC"


def _key_problem(key: bytes, certificate: Certificate) -> str:
    """Returns why a key does not belong to a certificate; empty when it does."""
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key

    try:
        public = load_pem_private_key(key, password=None).public_key()
    except TypeError:
        return "is encrypted; store it without a passphrase"
    except ValueError:
        return "holds no private key in PEM format"
    form = (Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    if public.public_bytes(*form) != certificate.public_key().public_bytes(*form):
        return "is the key of another certificate"
    return ""
