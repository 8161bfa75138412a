"""Settings of the orchestrator."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from klein_core.params import DEFAULT_LIMITS
from klein_services.orchestrator.content_policy import POINTS, ContentPolicy, PolicyOptions, channel_options
from klein_services.orchestrator.manifest_signer import DIGEST, INGREDIENT_CONTENTS, ManifestSigner
from klein_services.orchestrator.request import AdmissionLimits
from klein_services.orchestrator.routing import (
    RoutingError,
    RoutingTable,
    read_routing_table,
    single_route_table,
)
from klein_services.orchestrator.stage_channels import Channels
from klein_services.orchestrator.tokens import read_tokens
from klein_services.orchestrator.usage import STANDARD_OUTPUT
from klein_services.runtime.channels import IMAGE_MESSAGE_BYTES
from klein_services.runtime.pem import PemFiles
from klein_services.runtime.settings import (
    ServerSettings,
    SettingsError,
    metrics_port_setting,
    pem_files,
    pem_problems,
    setting,
)
from klein_services.runtime.tls import CredentialStore

_BYTES_PER_PIXEL = 3.03
"""Bytes of an image file that does not compress: RGB, and the format's overhead."""


@dataclass(frozen=True, kw_only=True)
class OrchestratorSettings(ServerSettings):
    """Routing, limits and cache; without a table one model is served, of the same name at every stage."""

    port: int = setting(50050, help="Port of the gRPC server; 0 takes a free one", minimum=0, maximum=65535)
    metrics_port: int = metrics_port_setting(9467)
    queue_limit: int = setting(
        256, help="Requests in progress before more are refused", minimum=1, maximum=100000
    )
    routing_table: str = setting(
        "", help="Path of a TOML file of models and their stages; empty means one model"
    )
    model_name: str = setting("pico", help="Name of the model when there is no routing table")
    text_encoder_target: str = setting("localhost:50051", help="gRPC target of the text-encoder")
    denoiser_target: str = setting("localhost:50052", help="gRPC target of the denoiser")
    vae_decoder_target: str = setting("localhost:50053", help="gRPC target of the vae-decoder")
    default_size_px: int = setting(
        1024,
        help="Width and height in pixels of a request that gives none and has no reference; less where the model was "
        "trained for less",
        minimum=64,
    )
    maximum_pixel_count: int = setting(
        DEFAULT_LIMITS.pixel_count,
        help="Most pixels of one image; fewer where the model was trained for fewer",
        minimum=4096,
        maximum=DEFAULT_LIMITS.pixel_count,
    )
    maximum_reference_count: int = setting(
        DEFAULT_LIMITS.reference_count, help="Most references of one request", minimum=0, maximum=10
    )
    maximum_reference_bytes: int = setting(
        20 * 1024 * 1024,
        help="Most bytes of the file of a reference, an initial image or a mask",
        minimum=1024,
        maximum=64 * 1024 * 1024,
    )
    maximum_image_count: int = setting(
        DEFAULT_LIMITS.image_count, help="Most images of one request", minimum=1, maximum=64
    )
    maximum_adapter_count: int = setting(
        DEFAULT_LIMITS.adapter_count, help="Most adapters of one request", minimum=0, maximum=64
    )
    maximum_request_seconds: float = setting(
        3600.0, help="Longest time that a request may take, deadline or not", minimum=1, maximum=86400
    )
    cache_bytes: int = setting(
        256 * 1024 * 1024,
        help="Bytes of prompt embeddings and latents of references and initial images kept; 0 keeps none",
        minimum=0,
    )
    idempotency_seconds: float = setting(
        600.0,
        help="Seconds for which the result of a request with an idempotency key is kept; 0 ignores such keys",
        minimum=0,
        maximum=86400,
    )
    idempotency_bytes: int = setting(
        64 * 1024 * 1024,
        help="Bytes of all results that are kept for idempotency keys; 0 ignores such keys",
        minimum=0,
    )
    oip: bool = setting(
        False,
        help="Whether clients of KServe and Triton are served, too: the Open Inference Protocol v2 over gRPC",
    )
    describe_ttl_seconds: float = setting(
        15.0, help="Seconds for which a stage's description is kept", minimum=0, maximum=3600
    )
    dns_interval_seconds: float = setting(
        1.0,
        help="Seconds between two looks at the addresses of stages' dns: targets, to find new replicas; 0 looks only "
        "when a connection ends",
        minimum=0,
        maximum=3600,
    )
    stage_wait_seconds: float = setting(
        15.0,
        help="Longest time that a request waits for a stage without a serving replica; 0 fails it at once",
        minimum=0,
        maximum=3600,
    )
    scaler_settle_seconds: float = setting(
        30.0,
        help="Seconds after the start during which KEDA gets no backlog of 0 for a stage that no request has used yet: "
        "clients may still be connecting",
        minimum=0,
        maximum=3600,
    )
    log_prompts: bool = setting(
        False,
        help="Whether prompts appear in this process's logs and in the traces; otherwise no log has any",
    )
    resume_bytes: int = setting(
        32 * 1024 * 1024,
        help="Most bytes of one request's latents kept to resume it when a stage is lost; larger requests start again; "
        "0 keeps none",
        minimum=0,
        maximum=1024**3,
    )
    image_metadata: bool = setting(
        True,
        help="Whether the seed, model, steps and digital source type are stored in the image files and manifests",
    )
    c2pa_certificate: str = setting(
        "", help="PEM file of the certificate chain that signs images with C2PA manifests; empty signs none"
    )
    c2pa_key: str = setting(
        "", help="PEM file of the private key of the first certificate, without a password"
    )
    c2pa_ingredients: str = setting(
        DIGEST,
        help="Content of a manifest about the files of a request: their digests; also their own manifests, which may "
        "hold pictures; or also thumbnails of them and of the image",
        choices=INGREDIENT_CONTENTS,
    )
    c2pa_timestamp_url: str = setting(
        "", help="URL of an RFC 3161 time-stamp authority that is asked for each image; empty asks none"
    )
    content_policy_target: str = setting(
        "",
        help="gRPC target of a ContentPolicyService that decides about requests and images; empty asks none",
    )
    content_policy_points: str = setting(
        "both", help="What the content policy decides about", choices=("both", *POINTS)
    )
    content_policy_timeout_seconds: float = setting(
        5.0,
        help="Longest time in seconds that a decision of the content policy may take",
        minimum=0.01,
        maximum=600,
    )
    content_policy_tls: bool = setting(
        True,
        help="Whether the content policy is called with the TLS files of the stages where those are set; else it is "
        "called in plaintext",
    )
    content_policy_fail_open: bool = setting(
        False, help="Whether requests and images without a decision are allowed; else they are refused"
    )
    content_policy_sends_files: bool = setting(
        True, help="Whether the content policy gets the image files of requests; else it gets their digests"
    )
    stage_tls_ca: str = setting(
        "",
        help="PEM file of the authorities of the stages' certificates; empty: stages are called in plaintext",
    )
    stage_tls_certificate: str = setting(
        "", help="PEM file of the certificate, and its issuers, that is presented to stages"
    )
    stage_tls_key: str = setting("", help="PEM file of that certificate's private key")
    stage_tls_name: str = setting(
        "", help="Name that every stage's certificate must have; empty: the host of its target"
    )

    @property
    def stage_tls_files(self) -> PemFiles:
        """Files of the TLS with which stages are called."""
        fields = ("stage_tls_certificate", "stage_tls_key", "stage_tls_ca")
        return pem_files(self.stage_tls_certificate, self.stage_tls_key, self.stage_tls_ca, fields)

    tokens_file: str = setting(
        "", help="Path of a TOML file of the tokens that clients need; empty asks for none"
    )

    usage_log: str = setting(
        "", help="Path of a file that gets a JSON line for each request; - is standard output; empty is off"
    )

    def problems(self) -> Iterator[str]:
        """Yields what is wrong with files and with settings together, such as a response too large to send."""
        yield from super().problems()
        yield from self.stage_tls_problems()
        if self.usage_log not in ("", STANDARD_OUTPUT) and not Path(self.usage_log).parent.is_dir():
            yield f"KLEIN_USAGE_LOG is {self.usage_log!r}; its folder does not exist"
        if self.tokens_file:
            try:
                read_tokens(Path(self.tokens_file))
            except SettingsError as error:
                yield f"KLEIN_TOKENS_FILE: {error}"
        try:
            table = self.table()
        except SettingsError as error:
            yield str(error)
        else:
            yield from self.table_problems(table)
        try:
            signer = self.signer()
        except SettingsError as error:
            yield str(error)
        else:
            if signer is not None:
                signer.close()

    def table_problems(self, table: RoutingTable) -> Iterator[str]:
        """Yields what is wrong with a table under these settings: a response too large to send."""
        routes = table.routes
        largest = max(route.maximum_pixel_count for route in routes.values())
        if self.maximum_image_count * largest * _BYTES_PER_PIXEL > IMAGE_MESSAGE_BYTES:
            fitting = int(IMAGE_MESSAGE_BYTES / largest / _BYTES_PER_PIXEL)
            yield (
                f"KLEIN_MAXIMUM_IMAGE_COUNT is {self.maximum_image_count}; a response of "
                f"{IMAGE_MESSAGE_BYTES >> 20} MiB holds {fitting} images of {largest} pixels: allow fewer images or "
                "fewer pixels"
            )

    def stage_tls_problems(self) -> Iterator[str]:
        """Yields what is wrong with the TLS of calls to stages."""
        yield from pem_problems(self.stage_tls_files)
        if (self.stage_tls_certificate or self.stage_tls_name) and not self.stage_tls_ca:
            yield (
                "KLEIN_STAGE_TLS_CERTIFICATE and KLEIN_STAGE_TLS_NAME need KLEIN_STAGE_TLS_CA; without it stages are "
                "called in plaintext"
            )

    def table(self) -> RoutingTable:
        """Reads the routing table.

        Raises:
            RoutingError: it cannot be used; every problem is named.
        """
        if self.routing_table:
            try:
                return read_routing_table(Path(self.routing_table))
            except RoutingError as error:
                raise RoutingError(f"KLEIN_ROUTING_TABLE: {self.routing_table}", error.problems) from None
        return single_route_table(
            self.model_name,
            self.text_encoder_target,
            self.denoiser_target,
            self.vae_decoder_target,
            self.default_size_px,
            self.maximum_pixel_count,
        )

    def signer(self) -> ManifestSigner | None:
        """Reads the credentials that sign images; `None` when images are not signed.

        Raises:
            SettingsError: they cannot sign, or only one of both is given.
        """
        if not self.c2pa_certificate and not self.c2pa_key:
            return None
        if self.c2pa_timestamp_url and not self.c2pa_timestamp_url.startswith(("http://", "https://")):
            raise SettingsError(
                f"KLEIN_C2PA_TIMESTAMP_URL is {self.c2pa_timestamp_url!r}; it must begin with http:// or https://"
            )
        fields = ("c2pa_certificate", "c2pa_key", "c2pa_certificate")
        return ManifestSigner(
            pem_files(self.c2pa_certificate, self.c2pa_key, "", fields),
            ingredients=self.c2pa_ingredients,
            timestamp_url=self.c2pa_timestamp_url,
            reload_seconds=self.tls_reload_seconds,
            # Room for every image of every request and one preview each, so that none is refused after its work.
            queue_limit=self.queue_limit * (self.maximum_image_count + 1),
        )

    def content_policy(self, credentials: CredentialStore | None = None) -> ContentPolicy | None:
        """Returns the client of the content policy; `None` when there is none.

        Args:
            credentials: of TLS to the stages, if they are called so.
        """
        if not self.content_policy_target:
            return None
        channels = Channels(
            credentials if self.content_policy_tls else None,
            options=channel_options(self.limits().request_bytes),
        )
        options = PolicyOptions(
            timeout_seconds=self.content_policy_timeout_seconds,
            fails_open=self.content_policy_fail_open,
            points=POINTS if self.content_policy_points == "both" else (self.content_policy_points,),
            sends_files=self.content_policy_sends_files,
        )
        return ContentPolicy(self.content_policy_target, channels, options)

    def limits(self) -> AdmissionLimits:
        return AdmissionLimits(
            self.maximum_reference_count,
            self.maximum_reference_bytes,
            self.maximum_image_count,
            self.maximum_adapter_count,
        )
