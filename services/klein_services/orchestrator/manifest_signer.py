"""Signer of images: embeds signed C2PA manifests, off the event loop, with credentials that may rotate."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from io import BytesIO
from typing import Any, Final

from klein_core.image_format import TRAINED_ALGORITHMIC_MEDIA
from klein_services.orchestrator.input_images import InputImage
from klein_services.orchestrator.provenance import SOFTWARE_NAME, Manifest, ingredient
from klein_services.runtime.metrics import SIGN_SECONDS, SIGNED_IMAGES
from klein_services.runtime.pem import Credentials, PemError, PemFiles
from klein_services.runtime.settings import SettingsError
from klein_services.runtime.tls import CredentialStore
from klein_services.runtime.worker import Worker

DIGEST: Final = "digest"
CREDENTIALS: Final = "credentials"
THUMBNAIL: Final = "thumbnail"
INGREDIENT_CONTENTS: Final = (DIGEST, CREDENTIALS, THUMBNAIL)
"""What a manifest holds of each file of the request: its digest; its own manifests, too; a small picture, too."""
SIGN_SECONDS_LIMIT = 30.0
"""Longest time from handing an image over to its signature. A time-stamp authority may be slow."""
MANIFEST_BYTES_LIMIT = 1 << 20
"""Most bytes that a manifest may add to an image. Clients' files may bring manifests of any size."""
SIGNER = "signer"
"""Kind of the certificate that signs images, in the metrics of certificates."""
_CURVES = {"secp256r1": "es256", "secp384r1": "es384", "secp521r1": "es512"}
_RSA_BITS = 2048
_THUMBNAILS = {"enabled": True, "long_edge": 256, "format": "jpeg", "prefer_smallest_format": False}
_TRIAL_IMAGE = bytes.fromhex(
    "89504e470d0a1a0a0000000d49484452000000010000000108000000003a7e9b550000000a49444154"
    "789c6360000000020001e221bc330000000049454e44ae426082"
)
"""A PNG file of one pixel."""
_TRIAL: Manifest = {
    "claim_generator_info": [{"name": SOFTWARE_NAME}],
    "assertions": [
        {
            "label": "c2pa.actions.v2",
            "data": {"actions": [{"action": "c2pa.created", "digitalSourceType": TRAINED_ALGORITHMIC_MEDIA}]},
        }
    ],
}
_log = logging.getLogger("klein.provenance")


class SigningFailed(Exception):
    """An image could not be signed, and images are never sent unsigned: a fault of the server."""


class ManifestSigner:
    """Signs images with mounted credentials; follows their files once it is started.

    Args:
        files: the certificate chain, the signer's first, and its key.
        ingredients: one of `INGREDIENT_CONTENTS`.
        timestamp_url: an RFC 3161 time-stamp authority that is asked for each image; empty asks none.
        reload_seconds: time between two looks at the files.
        queue_limit: images that may wait.

    Raises:
        SettingsError: c2pa is not installed, or the credentials cannot sign.
    """

    def __init__(
        self,
        files: PemFiles,
        *,
        ingredients: str = DIGEST,
        timestamp_url: str = "",
        reload_seconds: float = 10.0,
        queue_limit: int = 1024,
    ) -> None:
        self._ingredients = ingredients
        self._timestamp_url = timestamp_url
        try:
            self.store = CredentialStore(files, "orchestrator", SIGNER, reload_seconds)
            """The credentials; each new state of them is taken into use with the next image."""
            self._seen = self.store.current
            self._context = self._checked_context(self._seen)
        except PemError as error:
            raise SettingsError(str(error)) from None
        except ModuleNotFoundError as error:
            raise SettingsError(
                f"KLEIN_C2PA_CERTIFICATE is set, and {error.name} is not installed, which signing needs. "
                "Install it with: pip install 'klein-suite[provenance]'"
            ) from None
        for outcome in ("signed", "failed"):
            SIGNED_IMAGES.labels(outcome)
        # One thread: signing holds Python's lock for most of its time, and two threads are no faster.
        self._worker = Worker("provenance", queue_limit)

    def start(self) -> None:
        """Starts to follow the files."""
        self.store.start()

    async def sign(
        self,
        manifest: Manifest,
        inputs: Sequence[InputImage],
        media_type: str,
        chunks: Sequence[memoryview],
    ) -> bytes:
        """Returns an image file with a signed manifest.

        Args:
            manifest: as `provenance.image_manifest` returns it.
            inputs: files of the request, which become ingredients.
            media_type: one of `provenance.MEDIA_TYPES`.
            chunks: the file.

        Raises:
            SigningFailed: it cannot be signed, or took too long.
            QueueFull: too many images wait.
        """
        outcome = "failed"
        try:
            async with asyncio.timeout(SIGN_SECONDS_LIMIT):
                done = await self._worker.run(lambda: self._signed(manifest, inputs, media_type, chunks))
            outcome = "signed"
        except TimeoutError:
            raise SigningFailed(f"signing took longer than {SIGN_SECONDS_LIMIT:g} s") from None
        finally:
            SIGNED_IMAGES.labels(outcome).inc()
        SIGN_SECONDS.labels(media_type.removeprefix("image/")).observe(done.compute_seconds)
        return done.value

    def close(self) -> None:
        self.store.stop()
        self._worker.close()

    def _signed(
        self,
        manifest: Manifest,
        inputs: Sequence[InputImage],
        media_type: str,
        chunks: Sequence[memoryview],
    ) -> bytes:
        """Signs an image; runs on the worker."""
        from c2pa import C2paError

        self._follow_credentials()
        data = b"".join(chunks)
        described = [(image, ingredient(image)) for image in inputs]
        try:
            if self._ingredients != DIGEST and inputs:
                signed = self._embed(manifest, described, media_type, data, opens_files=True)
                if len(signed) - len(data) <= MANIFEST_BYTES_LIMIT:
                    return signed
                _log.warning("the manifests of a request's files are too large; only their digests are kept")
            return self._embed(manifest, described, media_type, data)
        except C2paError as error:
            raise SigningFailed(f"c2pa: {error}") from error

    def _embed(
        self,
        manifest: Manifest,
        described: Sequence[tuple[InputImage, Manifest]],
        media_type: str,
        data: bytes,
        *,
        opens_files: bool = False,
        context: Any = None,
    ) -> bytes:
        from c2pa import Builder, C2paError

        by_digest = [] if opens_files else [definition for _, definition in described]
        with Builder(manifest | {"ingredients": by_digest}, context or self._context) as builder:
            for image, definition in described if opens_files else ():
                try:
                    builder.add_ingredient(definition, image.media_type, BytesIO(image.data))
                except C2paError as error:
                    # Pillow reads files that c2pa does not, and such a file must not fail the request.
                    _log.info("%s is recorded by its digest only: %s", image.field, error)
                    return self._embed(manifest, described, media_type, data)
            file = BytesIO()
            builder.sign(media_type, BytesIO(data), file)
        return file.getvalue()

    def _follow_credentials(self) -> None:
        """Takes rotated credentials into use, or keeps the present ones if the new ones cannot sign."""
        newest = self.store.current
        if newest is self._seen:
            return
        self._seen = newest
        try:
            self._context = self._checked_context(newest)
        except SettingsError as error:
            _log.error("rotated signing credentials are not used: %s", error)

    def _checked_context(self, credentials: Credentials) -> Any:
        """Returns a context that signs, after it has signed an image for a trial.

        Raises:
            SettingsError: it cannot.
        """
        from c2pa import C2paError, C2paSignerInfo, Context, Settings, Signer

        algorithm, key = signing_key(credentials.key)

        def context(timestamp_url: str) -> Any:
            info = C2paSignerInfo(algorithm, credentials.certificate, key, timestamp_url or None)
            thumbnails = _THUMBNAILS if self._ingredients == THUMBNAIL else {"enabled": False}
            settings = {
                "builder": {"thumbnail": thumbnails},
                # A client's file may name any address as the place of its manifest; it is not fetched.
                "verify": {"remote_manifest_fetch": False, "ocsp_fetch": False},
            }
            return Context(settings=Settings.from_dict(settings), signer=Signer.from_info(info))

        try:
            # Without the authority, so that one that is down does not keep the orchestrator from starting.
            self._embed(_TRIAL, (), "image/png", _TRIAL_IMAGE, context=context(""))
            return context(self._timestamp_url)
        except C2paError as error:
            raise SettingsError(
                f"c2pa cannot sign with KLEIN_C2PA_CERTIFICATE: {error}. C2PA asks for a certificate for digital "
                "signatures, with an extended key usage such as emailProtection, that another one has signed"
            ) from None


def signing_key(data: bytes) -> tuple[str, bytes]:
    """Returns C2PA's name of a key's signature algorithm, and the key as c2pa takes it: PEM, PKCS 8.

    Raises:
        SettingsError: C2PA allows no signatures by such a key.
    """
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

    key = serialization.load_pem_private_key(data, password=None)
    match key:
        case ec.EllipticCurvePrivateKey() if key.curve.name in _CURVES:
            algorithm = _CURVES[key.curve.name]
        case ed25519.Ed25519PrivateKey():
            algorithm = "ed25519"
        case rsa.RSAPrivateKey() if key.key_size >= _RSA_BITS:
            algorithm = "ps256"
        case _:
            raise SettingsError(
                "KLEIN_C2PA_KEY is of a kind that C2PA does not allow; it must be a key on P-256, P-384 or P-521, "
                f"Ed25519, or RSA of at least {_RSA_BITS} bits"
            )
    form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return algorithm, key.private_bytes(*form)
