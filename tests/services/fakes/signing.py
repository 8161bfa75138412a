"""A certificate authority made on the fly, credentials that it issues, and a reader that trusts it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from io import BytesIO
from pathlib import Path
from typing import Any

import c2pa
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

_PEM = serialization.Encoding.PEM


def new_key(curve=ec.SECP256R1):
    return ec.generate_private_key(curve())


def _name(common_name: str) -> x509.Name:
    parts = [(NameOID.ORGANIZATION_NAME, "Klein tests"), (NameOID.COMMON_NAME, common_name)]
    return x509.Name([x509.NameAttribute(*part) for part in parts])


def _builder(subject: str, issuer: str, public_key, valid_days: tuple[float, float], usage: x509.KeyUsage):
    begin, end = (datetime.now(UTC) + timedelta(days=days) for days in valid_days)
    return (
        x509.CertificateBuilder()
        .subject_name(_name(subject))
        .issuer_name(_name(issuer))
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(begin)
        .not_valid_after(end)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
    )


def _usage(*, signs: bool) -> x509.KeyUsage:
    return x509.KeyUsage(signs, False, False, False, False, not signs, not signs, False, False)


@dataclass
class Authority:
    """Issues credentials into a folder, as `certificate.pem` and `key.pem`."""

    folder: Path
    key: Any = field(default_factory=new_key)

    def __post_init__(self) -> None:
        builder = _builder("Authority", "Authority", self.key.public_key(), (-2, 30), _usage(signs=False))
        builder = builder.add_extension(x509.BasicConstraints(True, None), critical=True)
        self.certificate = builder.sign(self.key, hashes.SHA256())

    @property
    def files(self) -> tuple[Path, Path]:
        return self.folder / "certificate.pem", self.folder / "key.pem"

    @property
    def settings(self) -> dict[str, object]:
        certificate, key = self.files
        return {"c2pa_certificate": str(certificate), "c2pa_key": str(key)}

    def issue(
        self,
        name: str = "Signer",
        *,
        key=None,
        valid_days: tuple[float, float] = (-1, 10),
        usage=ExtendedKeyUsageOID.EMAIL_PROTECTION,
    ) -> tuple[bytes, bytes]:
        """Writes new credentials; returns them."""
        key = new_key() if key is None else key
        builder = _builder(name, "Authority", key.public_key(), valid_days, _usage(signs=True))
        builder = builder.add_extension(x509.BasicConstraints(False, None), critical=True).add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key()), critical=False
        )
        if usage is not None:
            builder = builder.add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
        certificate = builder.sign(self.key, hashes.SHA256()).public_bytes(_PEM)
        # As OpenSSL writes keys on curves by default, which is not what c2pa takes.
        old_form = serialization.PrivateFormat.TraditionalOpenSSL
        is_edwards = isinstance(key, ed25519.Ed25519PrivateKey)
        form = serialization.PrivateFormat.PKCS8 if is_edwards else old_form
        private = key.private_bytes(_PEM, form, serialization.NoEncryption())
        for path, data in zip(self.files, (certificate, private), strict=True):
            # By rename, as a mounted secret changes.
            (self.folder / "new").write_bytes(data)
            (self.folder / "new").rename(path)
        return certificate, private

    def read(self, data: bytes, media_type: str) -> SignedFile:
        """Reads a file's manifest, trusting this authority and no other."""
        trust = {"trust_anchors": self.certificate.public_bytes(_PEM).decode()}
        context = c2pa.Context.from_dict({"trust": trust, "verify": {"remote_manifest_fetch": False}})
        with c2pa.Reader(media_type, BytesIO(data), context=context) as reader:
            return SignedFile(reader.get_validation_state(), json.loads(reader.json()))


@dataclass
class SignedFile:
    """A manifest as it was read, and how far it is trusted: Trusted, Valid or Invalid."""

    state: str
    store: dict[str, Any]

    @property
    def manifest(self) -> dict[str, Any]:
        return self.store["manifests"][self.store["active_manifest"]]

    @property
    def actions(self) -> list[dict[str, Any]]:
        return self.assertion("c2pa.actions.v2")["actions"]

    @property
    def ingredients(self) -> dict[str, dict[str, Any]]:
        """By title."""
        return {each["title"]: each for each in self.manifest.get("ingredients", [])}

    @property
    def signer(self) -> str:
        return self.manifest["signature_info"]["common_name"]

    @property
    def failures(self) -> list[str]:
        return [each["code"] for each in self.store["validation_results"]["activeManifest"]["failure"]]

    def assertion(self, label: str) -> dict[str, Any]:
        (found,) = [each for each in self.manifest["assertions"] if each["label"] == label]
        return found["data"]
