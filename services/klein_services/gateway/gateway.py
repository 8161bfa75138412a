"""Gateway: everything that its handlers share, made once and closed with the process."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from http import HTTPStatus

from starlette.requests import Request

from klein_client import AsyncClient, Tls
from klein_services.gateway.bodies import BodyReader
from klein_services.gateway.downloads import Downloads
from klein_services.gateway.errors import ApiError
from klein_services.gateway.job_settings import NO_JOBS
from klein_services.gateway.jobs import Jobs, open_jobs
from klein_services.gateway.known_callers import KnownCallers
from klein_services.gateway.outbound import Outbound
from klein_services.gateway.rate_limits import RateLimits
from klein_services.gateway.readiness import Readiness
from klein_services.gateway.recent_requests import RecentRequests
from klein_services.gateway.result_store import LocalResultStore, ResultStore, s3_store
from klein_services.gateway.settings import GatewaySettings
from klein_services.gateway.suite_watch import SuiteWatch
from klein_services.gateway.usage import PriceError, Usage, read_prices
from klein_services.runtime.channels import open_channel
from klein_services.runtime.settings import SettingsError


@dataclass(frozen=True)
class Gateway:
    """Shared parts of all APIs; `gateway_of` returns it to a handler."""

    settings: GatewaySettings
    bodies: BodyReader
    readiness: Readiness
    client: AsyncClient
    """Client of the orchestrator. It has no token of its own: each request passes on its caller's."""
    downloads: Downloads
    results: ResultStore
    limits: RateLimits
    usage: Usage
    suite_watch: SuiteWatch
    jobs_or_none: Jobs | None = None
    """`None` where the APIs with jobs are off."""
    recent_requests: RecentRequests = field(default_factory=RecentRequests)
    known_callers: KnownCallers = field(default_factory=KnownCallers)

    @property
    def jobs(self) -> Jobs:
        """Jobs of the gateway.

        Raises:
            ApiError: the APIs with jobs are off.
        """
        if self.jobs_or_none is None:
            message = "The APIs with jobs are off: KLEIN_JOBS_DATABASE is off."
            raise ApiError(HTTPStatus.NOT_FOUND, "jobs_off", message)
        return self.jobs_or_none

    def url(self, request: Request, path: str) -> str:
        """Returns the absolute URL of a path of this gateway, as the request's client reaches it."""
        return self.base_url(request) + path

    def result_url(self, key: str, base_url: str) -> str:
        """Returns a link to an image of the result store."""
        return self.results.url(key, base_url, self.settings.results_link_seconds)

    def base_url(self, request: Request) -> str:
        """Returns the URL under which the request's client reaches the gateway, without a slash at its end."""
        return self.settings.public_url.rstrip("/") or f"{request.url.scheme}://{request.url.netloc}"


@asynccontextmanager
async def open_gateway(settings: GatewaySettings) -> AsyncIterator[Gateway]:
    """Opens the shared parts for the duration of the block.

    Raises:
        PemError: the files of TLS cannot be used.
        SettingsError: the folder of results or the price table cannot be used.
    """
    async with AsyncExitStack() as stack:
        files = settings.target_tls_files
        credentials = files.read() if files.are_set else None
        # Health has its own channel: the client has no call for it, and probes must not wait behind images.
        channel = open_channel(settings.target, credentials=credentials, server_name=settings.target_tls_name)
        await stack.enter_async_context(channel)
        readiness = Readiness(channel)
        readiness.start()
        stack.push_async_callback(readiness.close)
        tls: Tls | bool = False
        if credentials is not None:
            tls = Tls(
                ca=credentials.authorities or None,
                certificate=credentials.certificate or None,
                key=credentials.key or None,
                server_name=settings.target_tls_name,
            )
        # Without retries: a client of HTTP gets the refusal with its time, and has a policy of its own.
        client = AsyncClient(
            settings.target, token="", tls=tls, timeout_seconds=settings.request_timeout_seconds, retry=False
        )
        await stack.enter_async_context(client)
        outbound = Outbound(settings.private_hosts)
        stack.push_async_callback(outbound.close)
        downloads = Downloads(outbound, settings.download_seconds, settings.reference_limit_mib << 20)
        results = _open_results(settings)
        stack.push_async_callback(results.close)
        try:
            usage = Usage(read_prices(settings.price_table))
        except PriceError as error:
            raise SettingsError(f"KLEIN_PRICE_TABLE: {error}") from None
        jobs = None
        if settings.jobs_database != NO_JOBS:
            link_seconds = settings.results_link_seconds
            opened = open_jobs(settings, client, results, outbound, link_seconds=link_seconds, usage=usage)
            jobs = await stack.enter_async_context(opened)
        yield Gateway(
            settings=settings,
            bodies=BodyReader(settings),
            readiness=readiness,
            client=client,
            downloads=downloads,
            results=results,
            limits=RateLimits(settings.requests_per_minute, settings.requests_burst),
            usage=usage,
            suite_watch=SuiteWatch(settings.metrics_pages),
            jobs_or_none=jobs,
        )


def _open_results(settings: GatewaySettings) -> ResultStore:
    if settings.results_bucket:
        return s3_store(
            settings.results_bucket,
            settings.results_prefix,
            settings.results_endpoint,
            settings.results_region,
        )
    folder = settings.results_path
    try:
        store = LocalResultStore(folder, settings.results_mib << 20, settings.results_seconds)
    except OSError as error:
        raise SettingsError(
            f"KLEIN_RESULTS_FOLDER: {folder} cannot be used: {error.strerror or error}"
        ) from None
    store.start()
    return store


def gateway_of(request: Request) -> Gateway:
    """Returns the gateway that a request is for."""
    gateway: Gateway = request.app.state.gateway
    return gateway
