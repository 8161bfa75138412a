"""Secret of the jobs: it seals the keys that jobs keep, and makes the secrets of webhooks."""

from __future__ import annotations

import base64
import hashlib
import hmac
import os
import secrets
from pathlib import Path

from cryptography.fernet import Fernet, InvalidToken

from klein_services.gateway.webhook_sender import SECRET_PREFIX

SECRET_BYTES = 32
MAXIMUM_FILE_BYTES = 4096


class SecretError(Exception):
    """The file of the secret cannot be used."""


class JobSecret:
    """Random bytes that all gateways of a job database share.

    Args:
        secret: at least `SECRET_BYTES` bytes.
    """

    def __init__(self, secret: bytes) -> None:
        self._secret = secret
        self._sealing = Fernet(base64.urlsafe_b64encode(self._derived(b"seal")))

    def seal(self, key: str) -> str:
        """Returns a client's key as the database keeps it: encrypted and authenticated."""
        return self._sealing.encrypt(key.encode()).decode("ascii")

    def unseal(self, sealed: str) -> str:
        """Returns the key of a sealed one.

        Raises:
            SecretError: it was sealed with another secret.
        """
        try:
            return self._sealing.decrypt(sealed.encode()).decode()
        except InvalidToken:
            raise SecretError("the key of the job was sealed with another secret") from None

    def webhook_secret(self, owner: str) -> str:
        """Returns the secret that signs the webhooks of a key; each has another, which only its client can get."""
        derived = self._derived(b"webhook:" + owner.encode())
        return SECRET_PREFIX + base64.b64encode(derived).decode("ascii")

    def _derived(self, purpose: bytes) -> bytes:
        return hmac.new(self._secret, purpose, hashlib.sha256).digest()


def read_secret(path: Path, *, create: bool) -> JobSecret:
    """Reads the file of the secret.

    Args:
        path: the file, with any bytes but at least 32 that cannot be guessed.
        create: whether to make the file if there is none, readable for its owner only.

    Raises:
        SecretError: the file cannot be read or made, or is too short or too long.
    """
    try:
        if create:
            _create(path)
        with path.open("rb") as file:
            content = file.read(MAXIMUM_FILE_BYTES + 1).strip()
    except OSError as error:
        raise SecretError(f"{path}: {error.strerror}") from None
    if not SECRET_BYTES <= len(content) <= MAXIMUM_FILE_BYTES:
        raise SecretError(f"{path}: it must have {SECRET_BYTES} to {MAXIMUM_FILE_BYTES} bytes")
    return JobSecret(content)


def _create(path: Path) -> None:
    """Makes the file with a random secret unless it exists; two processes that both try get the same one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        return
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(base64.b64encode(secrets.token_bytes(SECRET_BYTES)) + b"\n")
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(draft, path)
        except FileExistsError:
            return
    finally:
        draft.unlink()
