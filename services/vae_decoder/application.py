"""The vae-decoder as a server's application: loading the model, and the service around it."""

from __future__ import annotations

import grpc
import torch

from klein_api.v1 import stage_service_pb2, vae_decoder_service_pb2_grpc
from klein_core.checkpoint.layouts import VAE
from klein_core.params import SIZE_MULTIPLE_PX
from klein_core.vae_decoder.references import ReferenceLimits
from klein_core.vae_decoder.stage import VaeDecoder
from klein_core.vae_decoder.tiling import TilingPolicy
from klein_core.weights_digest import weights_digest
from services.runtime.devices import report_memory, resolve_device, resolve_dtype, set_threads
from services.runtime.errors import StageUnavailable
from services.runtime.places import Places
from services.runtime.stage_application import Loaded, StageApplication
from services.runtime.tensors import dtype_name
from services.runtime.worker import Worker
from services.vae_decoder.servicer import DECODE, ENCODE_REFERENCE, VaeDecoderServicer, Workers
from services.vae_decoder.settings import VaeDecoderSettings


class VaeDecoderApplication(StageApplication):
    """One autoencoder behind one worker."""

    name = "vae-decoder"
    service_names = ("klein_api.v1.VaeDecoderService",)
    operations = (ENCODE_REFERENCE, DECODE)

    def __init__(self, settings: VaeDecoderSettings) -> None:
        super().__init__(settings)
        self._settings = settings
        # Requests that are received, computed or answered; each may hold a file or an image.
        self.places = Places(2 * settings.queue_limit)
        # What has been decoded must not be refused for want of a place, so this queue has one for all of them.
        self._files = Worker(f"{self.name}-files", self.places.limit)
        self._decoder: VaeDecoder | None = None

    @property
    def decoder(self) -> VaeDecoder:
        """The loaded model.

        Raises:
            StageUnavailable: it is not loaded yet.
        """
        if self._decoder is None:
            raise StageUnavailable("the model is not loaded")
        return self._decoder

    def register(self, server: grpc.aio.Server) -> None:
        super().register(server)
        workers = Workers(device=self.worker, files=self._files)
        servicer = VaeDecoderServicer(workers, self.places, self._settings, lambda: self.decoder)
        vae_decoder_service_pb2_grpc.add_VaeDecoderServiceServicer_to_server(servicer, server)

    def load_model(self) -> Loaded:
        set_threads(self._settings.threads)
        device = resolve_device(self._settings.device)
        report_memory(self.name, device)
        decoder = VaeDecoder.from_folder(
            self._settings.model_files(VAE),
            device,
            resolve_dtype(self._settings.dtype),
            ReferenceLimits(byte_count=self._settings.reference_bytes),
            TilingPolicy(self._settings.tiling, (self._settings.tiling_limit_mib << 20) or None),
        )
        _warm_up(decoder, self._settings.warm_up_size_px)
        self._decoder = decoder
        facts = stage_service_pb2.VaeDecoderFacts(latent_channels=decoder.config.packed_channels)
        return Loaded(
            device=str(device),
            dtype=dtype_name(decoder.dtype),
            weights_digest=weights_digest(decoder.autoencoder),
            facts=facts,
        )

    async def close(self) -> None:
        await super().close()
        self._files.close()


def _warm_up(decoder: VaeDecoder, size_px: int) -> None:
    side_px = size_px - size_px % SIZE_MULTIPLE_PX
    decoder.decode(decoder.encode(torch.zeros(side_px, side_px, 3)))
