"""Clients of single stages: prompts to embeddings, images to latents and latents to images. Without torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Self, TypeVar

import grpc

from klein_api.v1 import image_pb2
from klein_api.v1 import text_encoder_service_pb2 as text_encoder
from klein_api.v1 import vae_decoder_service_pb2 as vae_decoder
from klein_api.v1.text_encoder_service_pb2_grpc import TextEncoderServiceStub
from klein_api.v1.vae_decoder_service_pb2_grpc import VaeDecoderServiceStub
from klein_client.endpoint import Endpoint, Tls
from klein_client.errors import InternalError, call_error
from klein_client.request import timeout_of
from klein_client.tensors import FRAME_BYTES, Tensor, TensorReader

PIXELS_PER_LATENT = 16
"""Width and height in pixels of one latent."""
_Response = TypeVar("_Response")


class Stage:
    """Connection to one stage, which opens with the first call; may be used by several threads.

    Args:
        target: `HOST:PORT` of the stage, or `grpcs://HOST:PORT` for TLS.
        kind: `text-encoder` or `vae-decoder`, for errors.
        model: name that the stage must serve the model under; empty means any.
        tls: True for TLS with public authorities, or `Tls` with files.
        timeout_seconds: longest time of a call.

    Raises:
        ValueError: an argument cannot be used.
    """

    def __init__(
        self,
        target: str,
        kind: str,
        *,
        model: str = "",
        tls: Tls | bool = False,
        timeout_seconds: float = 600.0,
    ) -> None:
        # Stages take no tokens: the one for the suite is not shown to them.
        self._endpoint = Endpoint(target, token="", tls=tls)
        self._kind = kind
        self.model = model
        self._timeout_seconds = timeout_of(timeout_seconds, timeout_seconds)
        options, credentials = self._endpoint.options, self._endpoint.credentials
        if credentials is None:
            self.channel = grpc.insecure_channel(self._endpoint.target, options=options)
        else:
            self.channel = grpc.secure_channel(self._endpoint.target, credentials, options=options)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connection."""
        self.channel.close()

    def responses(self, method: Callable[..., Iterable[_Response]], request: Any) -> Iterator[_Response]:
        """Yields the messages of a call; leaving the iteration cancels it.

        Raises:
            KleinError: the call failed.
        """
        call: Any = method(request, timeout=self._timeout_seconds)
        try:
            yield from call
        except grpc.RpcError as error:
            raise call_error(error, self._endpoint.target, f"klein {self._kind}") from error
        finally:
            call.cancel()


class TextEncoder(Stage):
    """Client of a text-encoder; the arguments are those of `Stage`."""

    def __init__(self, target: str, **options: Any) -> None:
        super().__init__(target, "text-encoder", **options)
        self._stub = TextEncoderServiceStub(self.channel)

    def encode(self, prompt: str) -> Tensor:
        """Returns the embedding of a prompt: (sequence length, channels).

        Raises:
            KleinError: the call failed.
        """
        request = text_encoder.EncodePromptRequest(model=self.model, prompt=prompt)
        reader = TensorReader("prompt_embedding", rank=2)
        for response in self.responses(self._stub.EncodePrompt, request):
            if response.HasField("prompt_embedding"):
                reader.add(response.prompt_embedding)
        return reader.tensor()


class VaeDecoder(Stage):
    """Client of a vae-decoder; the arguments are those of `Stage`."""

    def __init__(self, target: str, **options: Any) -> None:
        super().__init__(target, "vae-decoder", **options)
        self._stub = VaeDecoderServiceStub(self.channel)

    def decode(self, latents: Tensor) -> bytearray:
        """Returns the RGB bytes of an image, (16 rows, 16 columns, 3), of its latents: (rows, columns, channels).

        Raises:
            KleinError: the call failed, or the stage refuses the latents.
        """

        def parts() -> Iterator[vae_decoder.DecodeLatentsRequest]:
            spec = vae_decoder.DecodeSpec(model=self.model, format=image_pb2.IMAGE_FORMAT_RAW_RGB)
            yield vae_decoder.DecodeLatentsRequest(spec=spec)
            for frame in latents.frames():
                yield vae_decoder.DecodeLatentsRequest(latents=frame)

        rows, columns, _ = latents.shape
        byte_count = rows * columns * PIXELS_PER_LATENT**2 * 3
        pixels = bytearray()
        for response in self.responses(self._stub.DecodeLatents, parts()):
            pixels += response.image_chunk
            if len(pixels) > byte_count:
                break
        if len(pixels) != byte_count:
            raise InternalError(
                f"the stage broke the protocol: the image has {len(pixels)} bytes, not {byte_count}"
            )
        return pixels

    def encode(self, image: bytes) -> Tensor:
        """Returns the latents, (rows, columns, channels), of an image file, which the stage scales and crops to
        multiples of 16 and at most a megapixel.

        Raises:
            KleinError: the call failed, or the stage refuses the file.
        """

        def parts() -> Iterator[vae_decoder.EncodeReferenceRequest]:
            yield vae_decoder.EncodeReferenceRequest(spec=vae_decoder.ReferenceSpec(model=self.model))
            for start in range(0, len(image), FRAME_BYTES):
                yield vae_decoder.EncodeReferenceRequest(image_chunk=image[start : start + FRAME_BYTES])

        reader = TensorReader("reference_latents", rank=3)
        for response in self.responses(self._stub.EncodeReference, parts()):
            if response.HasField("reference_latents"):
                reader.add(response.reference_latents)
        return reader.tensor()
