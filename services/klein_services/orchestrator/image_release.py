"""Release of images: the checks and the signature that every image passes before its client gets it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from klein_api.v1.image_pb2 import ImageFormat
from klein_api.v1.image_service_pb2 import GeneratedImage
from klein_services.orchestrator.content_policy import ContentPolicy
from klein_services.orchestrator.manifest_signer import ManifestSigner
from klein_services.orchestrator.provenance import MEDIA_TYPES, image_manifest
from klein_services.orchestrator.request import ImageRequest
from klein_services.orchestrator.stage_client import Deadline


@dataclass(frozen=True)
class ImageRelease:
    """The content policy and the signer; each is `None` when it is not configured."""

    policy: ContentPolicy | None = None
    signer: ManifestSigner | None = None
    records_parameters: bool = True
    """Whether a manifest holds the seed, the steps and the adapters."""

    @property
    def allows_previews(self) -> bool:
        """Whether previews may be sent: where images are checked they may not, because no preview is checked."""
        return self.policy is None or not self.policy.checks_images

    def warnings(self, request: ImageRequest, *, wanted_previews: bool) -> list[str]:
        """Returns sentences for the client about what the release changes."""
        sentences: list[str] = []
        if self.signer is not None and request.format not in MEDIA_TYPES:
            name = ImageFormat.Name(request.format).removeprefix("IMAGE_FORMAT_")
            sentences.append(
                f"The images are not signed: {name} holds no C2PA manifest. PNG, JPEG and WebP do."
            )
        if wanted_previews and not self.allows_previews:
            sentences.append(
                "There are no previews, because a content policy checks images when they are done."
            )
        return sentences

    async def check_request(self, request: ImageRequest, deadline: Deadline) -> None:
        """Returns when the request may be carried out.

        Raises:
            ContentDenied, ContentPolicyFailed, DeadlinePassed: as `ContentPolicy.check_request`.
        """
        if self.policy is not None:
            await self.policy.check_request(request, deadline)

    async def released(
        self,
        request: ImageRequest,
        image: GeneratedImage,
        steps: int,
        chunks: Sequence[memoryview],
        deadline: Deadline,
    ) -> Sequence[memoryview]:
        """Returns the file that the client gets.

        Args:
            request: the request of the image.
            image: everything but its data.
            steps: steps of a finished image.
            chunks: the file as the vae-decoder wrote it.
            deadline: of the request.

        Raises:
            ContentDenied, ContentPolicyFailed, DeadlinePassed: as `ContentPolicy.check_image`.
            SigningFailed: the image cannot be signed.
        """
        if self.policy is not None and not image.step:
            await self.policy.check_image(request, image, chunks, deadline)
        if self.signer is None or image.format not in MEDIA_TYPES:
            return chunks
        manifest = image_manifest(request, image, steps, has_parameters=self.records_parameters)
        signed = await self.signer.sign(manifest, request.input_images, MEDIA_TYPES[image.format], chunks)
        return [memoryview(signed)]

    def start(self) -> None:
        """Follows the files of the signer's credentials."""
        if self.signer is not None:
            self.signer.start()

    async def close(self) -> None:
        """Closes both."""
        if self.policy is not None:
            await self.policy.close()
        if self.signer is not None:
            self.signer.close()
