"""Settings of the gateway."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from klein_services.gateway.job_settings import JobSettings
from klein_services.gateway.usage import PriceError, read_prices
from klein_services.runtime.pem import PemFiles
from klein_services.runtime.scrape import TargetsError, check_targets
from klein_services.runtime.settings import (
    metrics_port_setting,
    pem_files,
    pem_problems,
    setting,
)

_ORIGIN = re.compile(r"https?://[^/\s]+")


@dataclass(frozen=True, kw_only=True)
class GatewaySettings(JobSettings):
    """Address, orchestrator, limits."""

    port: int = setting(8080, help="Port of the HTTP server; 0 takes a free one", minimum=0, maximum=65535)
    metrics_port: int = metrics_port_setting(9468)
    max_connections: int = setting(
        1024,
        help="Connections that may be open at once; further ones get 503. Fewer where the process may open fewer files",
        minimum=1,
        maximum=10**6,
    )
    target: str = setting("127.0.0.1:50050", help="gRPC target of the orchestrator")
    target_tls_ca: str = setting(
        "",
        help="PEM file of the authorities that the orchestrator's certificate is checked with; empty: plaintext",
    )
    target_tls_certificate: str = setting(
        "", help="PEM file of the certificate that the gateway presents to the orchestrator"
    )
    target_tls_key: str = setting("", help="PEM file of that certificate's private key")
    target_tls_name: str = setting(
        "", help="Name that the orchestrator's certificate must have; empty: the target's host"
    )
    public_url: str = setting(
        "",
        help="URL under which clients reach the gateway, https://images.example; empty takes each request's Host",
    )
    metrics_targets: str = setting(
        "",
        help="Metrics pages of the suite, HOST:PORT or dns:///NAME:PORT (all addresses of a name), with commas between "
        "them: for the page at /",
    )
    body_limit_mib: int = setting(
        128, help="Most MiB of a request's body, all files of an upload together", minimum=1, maximum=4096
    )
    body_memory_mib: int = setting(
        1024,
        help="MiB of the bodies of all requests in progress; more are refused with 503",
        minimum=1,
        maximum=10**6,
    )
    header_timeout_seconds: float = setting(
        10.0,
        help="Seconds within which a new connection must finish TLS and send a request's headers",
        minimum=0.1,
        maximum=3600,
    )
    body_timeout_seconds: float = setting(
        60.0, help="Seconds within which a request's body must arrive", minimum=0.1, maximum=3600
    )
    keep_alive_seconds: int = setting(
        30, help="Seconds after which a connection without a request is closed", minimum=1, maximum=3600
    )
    request_timeout_seconds: float = setting(
        600.0, help="Seconds that a request to the orchestrator may take", minimum=1, maximum=86400
    )

    requests_per_minute: float = setting(
        0.0,
        help="Requests for images a minute that each key may make, else each address; 0 is no limit",
        minimum=0,
        maximum=10**6,
    )
    requests_burst: int = setting(
        10, help="Requests that a key may make at once before the rate counts", minimum=1, maximum=10**6
    )
    price_table: str = setting("", help="TOML file of prices per megapixel; empty: answers have no cost")
    model_aliases: str = setting(
        "",
        help="Names that requests may give for a model, such as gpt-image-1=klein-4b, separated by commas; without a "
        "model after = it is the default model",
    )
    cors_origins: str = setting(
        "",
        help="Origins, separated by commas, whose pages may call the gateway, https://app.example; * allows all; "
        "empty: none",
    )
    download_seconds: float = setting(
        20.0, help="Seconds that the download of a reference may take", minimum=0.1, maximum=600
    )
    download_private_hosts: str = setting(
        "",
        help="Names, separated by commas, of hosts that references and webhooks may have although their addresses are "
        "private; * allows every host",
    )
    reference_limit_mib: int = setting(
        20, help="Most MiB of one reference, initial image or mask", minimum=1, maximum=64
    )
    results_folder: str = setting(
        "", help="Folder of images that are fetched by a link; empty: klein/results in XDG_STATE_HOME"
    )
    results_mib: int = setting(
        4096, help="MiB of all images in the folder; the oldest give way", minimum=1, maximum=10**9
    )
    results_seconds: float = setting(
        86400.0,
        help="Seconds after which an image in the folder is deleted",
        minimum=1,
        maximum=31536000,
    )
    results_link_seconds: float = setting(
        3600.0, help="Seconds for which a link to an image works", minimum=1, maximum=604800
    )
    results_bucket: str = setting(
        "", help="Bucket of an S3-compatible store that images are kept in, instead of the folder"
    )
    results_prefix: str = setting("", help="Begin of the names of images in the bucket, such as klein/")
    results_endpoint: str = setting(
        "", help="URL of the S3-compatible store; empty: AWS. Clients must reach it, too"
    )
    results_region: str = setting("", help="Region of the bucket; empty: that of boto3's configuration")

    @property
    def aliases(self) -> dict[str, str]:
        """Model by alias; empty for the default model."""
        pairs = (each.partition("=") for each in self.model_aliases.split(",") if each.strip())
        return {alias.strip(): model.strip() for alias, _, model in pairs}

    @property
    def origins(self) -> list[str]:
        """Origins in `cors_origins`."""
        return [origin.strip().rstrip("/") for origin in self.cors_origins.split(",") if origin.strip()]

    @property
    def private_hosts(self) -> frozenset[str]:
        """Names in `download_private_hosts`."""
        return frozenset(name.strip() for name in self.download_private_hosts.split(",") if name.strip())

    @property
    def results_path(self) -> Path:
        """Folder of a local result store."""
        if self.results_folder:
            return Path(self.results_folder)
        state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
        return Path(state) / "klein" / "results"

    @property
    def target_tls_files(self) -> PemFiles:
        """Files of the TLS between gateway and orchestrator."""
        fields = ("target_tls_certificate", "target_tls_key", "target_tls_ca")
        return pem_files(self.target_tls_certificate, self.target_tls_key, self.target_tls_ca, fields)

    @property
    def metrics_pages(self) -> tuple[str, ...]:
        """Targets in `metrics_targets`."""
        return tuple(each.strip() for each in self.metrics_targets.split(",") if each.strip())

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        yield from pem_problems(self.target_tls_files)
        if self.target_tls_name and not self.target_tls_files.are_set:
            yield "KLEIN_TARGET_TLS_NAME is set without KLEIN_TARGET_TLS_CA, without which there is no TLS"
        if self.public_url and not self.public_url.startswith(("http://", "https://")):
            yield f"KLEIN_PUBLIC_URL is {self.public_url!r}; it must begin with http:// or https://"
        if any("=" not in each for each in self.model_aliases.split(",") if each.strip()):
            yield f"KLEIN_MODEL_ALIASES is {self.model_aliases!r}; it must be NAME=MODEL, separated by commas"
        for origin in self.origins:
            if origin != "*" and not _ORIGIN.fullmatch(origin):
                yield f"KLEIN_CORS_ORIGINS has {origin!r}, which is no origin such as https://app.example"
        try:
            read_prices(self.price_table)
        except PriceError as error:
            yield f"KLEIN_PRICE_TABLE: {error}"
        if self.results_bucket and find_spec("boto3") is None:
            yield "KLEIN_RESULTS_BUCKET needs boto3; install it with: pip install 'klein-suite[s3]'"
        if self.results_endpoint and not self.results_bucket:
            yield "KLEIN_RESULTS_ENDPOINT is set without KLEIN_RESULTS_BUCKET"
        try:
            check_targets(self.metrics_pages, "KLEIN_METRICS_TARGETS")
        except TargetsError as error:
            yield str(error)
        if self.body_memory_mib < self.body_limit_mib:
            yield (
                f"KLEIN_BODY_MEMORY_MIB is {self.body_memory_mib}; it must be at least KLEIN_BODY_LIMIT_MIB, "
                f"{self.body_limit_mib}"
            )
