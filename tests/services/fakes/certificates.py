"""Authorities, certificates and keys, made on the fly as PEM files."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from klein_services.runtime.pem import Credentials, PemFiles


@dataclass(frozen=True)
class Pair:
    """A certificate, its key, and the files of both."""

    certificate: Path
    key: Path

    def replaced_by(self, other: Pair) -> None:
        """Writes another pair over the files, as `kubectl create secret` and editors do: one after the other."""
        self.certificate.write_bytes(other.certificate.read_bytes())
        self.key.write_bytes(other.key.read_bytes())


class Authority:
    """An authority that issues certificates into a folder."""

    def __init__(self, folder: Path, name: str = "authority") -> None:
        # Imported here, so that this module can be collected without the package.
        from cryptography import x509
        from cryptography.hazmat.primitives.asymmetric import ec

        self._folder = folder
        self._name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._count = 0
        self.file = folder / f"{name}.pem"
        builder = self._builder(self._name, self._key, timedelta(days=2)).add_extension(
            x509.BasicConstraints(ca=True, path_length=None), critical=True
        )
        self.file.write_bytes(self._signed(builder))

    def issue(
        self,
        *names: str,
        common_name: str = "",
        lifetime: timedelta = timedelta(days=1),
        password: bytes | None = None,
    ) -> Pair:
        """Issues a certificate for host names, addresses and URIs; a negative lifetime ended in the past."""
        from cryptography import x509
        from cryptography.hazmat.primitives.asymmetric import ec
        from cryptography.hazmat.primitives.serialization import (
            BestAvailableEncryption,
            Encoding,
            NoEncryption,
            PrivateFormat,
        )

        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name(
            [x509.NameAttribute(x509.NameOID.COMMON_NAME, common_name)] if common_name else []
        )
        builder = self._builder(subject, key, lifetime)
        if names:
            alternatives = x509.SubjectAlternativeName([_general_name(name) for name in names])
            builder = builder.add_extension(alternatives, critical=not common_name)
        self._count += 1
        stem = f"{self.file.stem}-{self._count}"
        pair = Pair(self._folder / f"{stem}.pem", self._folder / f"{stem}.key")
        pair.certificate.write_bytes(self._signed(builder))
        encryption = BestAvailableEncryption(password) if password else NoEncryption()
        pair.key.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption))
        return pair

    def credentials(self, pair: Pair | None = None) -> Credentials:
        """Returns what a client that trusts this authority connects with."""
        certificate, key = (str(pair.certificate), str(pair.key)) if pair else ("", "")
        return PemFiles(certificate, key, str(self.file), ("certificate", "key", "ca")).read()

    def _builder(self, subject, key, lifetime: timedelta):
        from cryptography import x509

        now = datetime.now(UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(days=3))
            .not_valid_after(now + lifetime)
        )

    def _signed(self, builder) -> bytes:
        from cryptography.hazmat.primitives import hashes
        from cryptography.hazmat.primitives.serialization import Encoding

        return builder.sign(self._key, hashes.SHA256()).public_bytes(Encoding.PEM)


def _general_name(name: str):
    from cryptography import x509

    if "://" in name:
        return x509.UniformResourceIdentifier(name)
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)
