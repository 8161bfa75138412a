"""Every Prometheus metric of the suite, defined and named once.

RPC metrics have the names of go-grpc-prometheus; those of the domain begin with `klein_`. Labels are bounded:
never a prompt, a seed or a request id.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product

import grpc
from google.protobuf import descriptor_pool
from prometheus_client import Counter, Gauge, Histogram, disable_created_metrics

from klein_services.runtime import tracing

RPC_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
REQUEST_BUCKETS = (0.1, 0.25, 0.5, 1, 2, 3, 5, 8, 13, 20, 30, 60, 120)
STEP_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
QUEUE_BUCKETS = (0.001, 0.01, 0.05, 0.1, 0.25, 0.5, 1, 2, 5, 10, 30, 60)
COUNT_BUCKETS = (1, 2, 4, 8, 16, 32)
TOKEN_BUCKETS = tuple(float(256 * 2**power) for power in range(10))

REASONS = (
    "adapter_memory_full",
    "content_denied",
    "content_policy_failed",
    "deadline_unreachable",
    "device_fault",
    "failed_precondition",
    "invalid_argument",
    "method_not_allowed",
    "model_not_allowed",
    "not_found",
    "out_of_memory",
    "permission_denied",
    "queue_full",
    "quota_exceeded",
    "resource_exhausted",
    "stage_unavailable",
    "unauthenticated",
    "unavailable",
    "undecodable_message",
    "unknown_adapter",
    "unknown_model",
    "unknown_peer",
    "unusable_adapter",
)
"""Values of `reason`: `ErrorInfo.reason` of refusals, or their status codes, in lower case."""
OTHER_REASON = "other"
"""The `reason` of a refusal that a stage of another version made."""
OUTCOMES = ("succeeded", "rejected", "refused", "failed", "cancelled", "expired")
FLOWS = ("text-to-image", "edit", "multi-reference", "masked-edit")
STAGE_CALLS = (
    ("text-encoder", "encode-prompt"),
    ("vae-decoder", "encode-initial-image"),
    ("vae-decoder", "encode-reference"),
    ("denoiser", "denoise"),
    ("vae-decoder", "decode"),
)
"""Stage and operation of every call that the orchestrator makes for a request, in the order of a request's life."""
HOPS = (
    ("text-encoder", "denoiser"),
    ("vae-decoder", "denoiser"),
    ("denoiser", "vae-decoder"),
    ("vae-decoder", "orchestrator"),
)
"""Source and destination of every transfer that the orchestrator relays or receives."""

_METHOD = ("grpc_type", "grpc_service", "grpc_method")
RPC_STARTED = Counter("grpc_server_started", "RPCs that this server began to handle.", _METHOD)
RPC_HANDLED = Counter(
    "grpc_server_handled",
    "RPCs that ended, by status code; CANCELLED is neither success nor failure: the client disconnected.",
    (*_METHOD, "grpc_code"),
)
RPC_SECONDS = Histogram(
    "grpc_server_handling_seconds",
    "Seconds from an RPC's arrival to its end, streams included.",
    _METHOD,
    buckets=RPC_BUCKETS,
)

QUEUE_DEPTH = Gauge("klein_queue_depth", "Requests that are accepted and wait for the device.", ["stage"])
QUEUE_LARGE_PIXELS = Gauge(
    "klein_queue_large_pixels",
    "Pixels of images of more than 4,194,304 pixels that wait or are worked on.",
    ["stage"],
)
HELD_BYTES = Gauge(
    "klein_held_bytes", "Bytes of image files and of pixels that requests hold while they wait.", ["stage"]
)
QUEUE_WAIT_SECONDS = Histogram(
    "klein_queue_wait_seconds",
    "Seconds that a request waited for the device.",
    ["stage"],
    buckets=QUEUE_BUCKETS,
)
RUNNING = Gauge("klein_running_requests", "Requests that the device computes now.", ["stage"])
BACKLOG_SECONDS = Gauge(
    "klein_backlog_seconds",
    "Device seconds that accepted requests still need, by measured times; 1 for each request not yet measured.",
    ["stage"],
)
SLOTS_IN_USE = Gauge(
    "klein_slots_in_use", "Requests that the server holds: received, computed or answered.", ["stage"]
)
SLOTS = Gauge(
    "klein_slots_limit", "Requests that the server holds at most; further ones are refused.", ["stage"]
)
STAGE_SECONDS = Histogram(
    "klein_stage_duration_seconds",
    "Seconds that the device computed for one request.",
    ["stage", "operation"],
    buckets=RPC_BUCKETS,
)
BATCH_WORKS = Histogram(
    "klein_batch_works",
    "Works of one shape that the device computed together; without samples where batching is off.",
    ["stage", "operation"],
    buckets=COUNT_BUCKETS,
)
ABANDONED_SECONDS = Counter(
    "klein_abandoned_work_seconds",
    "Seconds computed for requests that were cancelled or expired before they got their answer.",
    ["stage"],
)
WATCHDOG_HANGS = Counter(
    "klein_watchdog_hangs",
    "Times that work did not end and the watchdog began to end this process.",
    ["stage"],
)
REQUEST_RECOVERIES = Counter(
    "klein_request_recoveries",
    "Times that a request went on with another replica after a stage was lost.",
    ["stage"],
)
REJECTED = Counter(
    "klein_request_rejected",
    "Refused requests; `reason` is the status detail's in lower case, the status code's where it has none, or other.",
    ["stage", "reason"],
)
DEADLINE_MISSED = Counter(
    "klein_deadline_missed", "Requests whose deadline passed before they were answered.", ["stage"]
)
LOAD_SECONDS = Gauge(
    "klein_model_load_seconds",
    "Seconds from the begin of the process to its first request, by phase; their sum is the whole.",
    ["stage", "phase"],
)
CERTIFICATE_EXPIRY = Gauge(
    "klein_certificate_expiry_timestamp_seconds",
    "Unix time at which a certificate expires: `kind` is server for the one that is presented to clients, client for "
    "the one that is presented to stages, signer for the one that signs images. Absent where there is none.",
    ["stage", "kind"],
)
CERTIFICATE_RELOADS = Counter(
    "klein_certificate_reloads",
    "Changes of the files of a certificate, its key or authorities; `outcome` is loaded, or refused for files that "
    "cannot be used.",
    ["stage", "kind", "outcome"],
)
SERVING = Gauge("klein_serving", "1 while the server takes work, 0 while it loads or drains.", ["stage"])
DEVICE_MEMORY_BYTES = Gauge(
    "klein_device_memory_bytes",
    "Device memory of this process by kind: allocated by tensors, or reserved by torch.",
    ["stage", "kind"],
)
INFO = Gauge(
    "klein_stage_info", "1; the labels say what runs here.", ["stage", "model", "device", "dtype", "version"]
)

STEP_SECONDS = Histogram(
    "klein_denoise_step_seconds", "Seconds of one packed step.", ["stage"], buckets=STEP_BUCKETS
)
STEP_TOKENS = Histogram(
    "klein_denoise_step_tokens", "Tokens of one packed step.", ["stage"], buckets=TOKEN_BUCKETS
)
STEP_REQUESTS = Histogram(
    "klein_denoise_step_requests", "Requests in one packed step.", ["stage"], buckets=COUNT_BUCKETS
)
STEP_OCCUPANCY = Gauge(
    "klein_denoise_step_occupancy_ratio", "Tokens of the last packed step over its token budget.", ["stage"]
)
STEP_TOKEN_BUDGET = Gauge(
    "klein_denoise_step_token_budget",
    "Tokens that a packed step may have now, fewer after the device ran out of memory; 0 is one image a step.",
    ["stage"],
)

HOP_BYTES = Counter(
    "klein_hop_bytes", "Tensor and image bytes relayed between two processes.", ["source", "destination"]
)
HOP_SECONDS = Histogram(
    "klein_hop_seconds",
    "Seconds from the first to the last frame of a relayed tensor or image.",
    ["source", "destination"],
    buckets=RPC_BUCKETS,
)
STAGE_CALL_SECONDS = Histogram(
    "klein_stage_call_duration_seconds",
    "Seconds from the orchestrator's call to a stage to the end of its answer, queueing and transfer included.",
    ["stage", "operation"],
    buckets=RPC_BUCKETS,
)
CACHE_REQUESTS = Counter(
    "klein_cache_requests",
    "Look-ups in the orchestrator's caches and in the denoiser's; `outcome` is hit or miss.",
    ["kind", "outcome"],
)
CACHE_BYTES = Gauge(
    "klein_cache_bytes", "Bytes held in a cache; reference_cache and adapter are device memory.", ["kind"]
)
ADAPTER_LOADS = Counter(
    "klein_adapter_loads", "Adapter files read to the device; `outcome` is loaded or refused.", ["outcome"]
)
CACHE_EVICTIONS = Counter("klein_cache_evictions", "Entries that made room for others.", ["kind"])
USAGE_REQUESTS = Counter(
    "klein_usage_requests", "Requests for images by the name of their token.", ["caller", "outcome"]
)
USAGE_IMAGES = Counter(
    "klein_usage_images", "Images delivered by the name of the request's token.", ["caller"]
)
USAGE_MEGAPIXELS = Counter(
    "klein_usage_megapixels",
    "Megapixels of references and initial images (input) and of images delivered (output), by token name.",
    ["caller", "direction"],
)
USAGE_IN_FLIGHT = Gauge(
    "klein_usage_requests_in_flight", "Requests of a tenant that are in progress, by token name.", ["caller"]
)
USAGE_LINES = Counter(
    "klein_usage_log_lines", "Lines of the usage log; `outcome` is written or lost.", ["outcome"]
)
USAGE_LINES_WAITING = Gauge("klein_usage_log_waiting_lines", "Lines of the usage log that wait for the disk.")
TOKENS_RELOADS = Counter(
    "klein_tokens_reloads",
    "Changes of the tokens file; `outcome` is loaded, or failed: then the last good one holds.",
    ["outcome"],
)
TOKENS_CURRENT = Gauge(
    "klein_tokens_current",
    "1 while the tokens in use are those of the tokens file, 0 while that cannot be used.",
)
ROUTING_TABLE_LOADS = Counter(
    "klein_routing_table_loads",
    "Routing tables read again on SIGHUP; `outcome` is loaded, or refused where the old one stays.",
    ["outcome"],
)
REQUEST_SECONDS = Histogram(
    "klein_request_duration_seconds",
    "Seconds from a request's arrival at the public API to its answer.",
    ["model", "flow", "outcome"],
    buckets=REQUEST_BUCKETS,
)
IMAGES = Counter(
    "klein_images",
    "Images asked of the public API; `outcome` is succeeded, rejected (a mistake of the client), refused (no "
    "capacity), failed, cancelled or expired.",
    ["model", "flow", "outcome"],
)
PIXELS = Counter("klein_pixels", "Pixels of images that were answered.", ["model", "flow"])
CONTENT_POLICY_DECISIONS = Counter(
    "klein_content_policy_decisions",
    "Checks by the content policy; `point` is request or image, `decision` is allow, deny or error.",
    ["point", "decision"],
)
CONTENT_POLICY_SECONDS = Histogram(
    "klein_content_policy_duration_seconds",
    "Seconds from the call of the content policy to its decision.",
    ["point"],
    buckets=RPC_BUCKETS,
)
SIGNED_IMAGES = Counter(
    "klein_c2pa_signatures",
    "Images and previews given to the C2PA signer; `outcome` is signed or failed.",
    ["outcome"],
)
SIGN_SECONDS = Histogram(
    "klein_c2pa_sign_duration_seconds",
    "Seconds that signing one image took, without the wait for the signer.",
    ["format"],
    buckets=STEP_BUCKETS,
)


@dataclass(frozen=True)
class Method:
    """An RPC method by the labels of its metrics."""

    kind: str
    """unary, client_stream, server_stream or bidi_stream."""
    service: str
    name: str

    @classmethod
    def of(cls, path: str, request_streaming: bool, response_streaming: bool) -> Method:
        """Returns the method of a call's path, `/package.Service/Method`."""
        service, _, name = path.removeprefix("/").rpartition("/")
        return cls(_KINDS[request_streaming, response_streaming], service, name)

    @property
    def labels(self) -> tuple[str, str, str]:
        return (self.kind, self.service, self.name)


_KINDS = {
    (False, False): "unary",
    (True, False): "client_stream",
    (False, True): "server_stream",
    (True, True): "bidi_stream",
}


def initialize(stage: str, service_names: Iterable[str], operations: Sequence[str] = ()) -> None:
    """Creates a server's label sets, so that its counters exist at 0 before the first request.

    A server without operations has no device and no queue.
    """
    # The _created series double the number of series, and nothing reads them.
    disable_created_metrics()  # type: ignore[no-untyped-call]
    for service_name in service_names:
        for method in descriptor_pool.Default().FindServiceByName(service_name).methods:
            path = f"/{service_name}/{method.name}"
            labels = Method.of(path, method.client_streaming, method.server_streaming).labels
            RPC_STARTED.labels(*labels)
            RPC_SECONDS.labels(*labels)
            for code in grpc.StatusCode:
                RPC_HANDLED.labels(*labels, code.name)
    SERVING.labels(stage)
    DEADLINE_MISSED.labels(stage)
    if operations:
        initialize_queue(stage, operations)
        WATCHDOG_HANGS.labels(stage)
    for reason in (*REASONS, OTHER_REASON):
        REJECTED.labels(stage, reason)


def initialize_queue(stage: str, operations: Iterable[str] = ()) -> None:
    """Creates the label sets of a device's queue, and of the operations that wait in it."""
    for metric in (
        QUEUE_DEPTH,
        QUEUE_WAIT_SECONDS,
        RUNNING,
        BACKLOG_SECONDS,
        ABANDONED_SECONDS,
        DEADLINE_MISSED,
    ):
        metric.labels(stage)
    for operation in operations:
        STAGE_SECONDS.labels(stage, operation)


def initialize_steps(stage: str) -> None:
    """Creates the label sets of a stage that computes in steps."""
    for metric in (STEP_SECONDS, STEP_TOKENS, STEP_REQUESTS, STEP_OCCUPANCY, STEP_TOKEN_BUDGET):
        metric.labels(stage)


def initialize_requests(models: Iterable[str]) -> None:
    """Creates the label sets of the orchestrator's requests, stage calls and transfers.

    Args:
        models: names of the routed models, and the one that stands for all others.
    """
    for model, flow in product(models, FLOWS):
        PIXELS.labels(model, flow)
        for outcome in OUTCOMES:
            IMAGES.labels(model, flow, outcome)
            REQUEST_SECONDS.labels(model, flow, outcome)
    for stage, operation in STAGE_CALLS:
        STAGE_CALL_SECONDS.labels(stage, operation)
    for source, destination in HOPS:
        HOP_BYTES.labels(source, destination)
        HOP_SECONDS.labels(source, destination)


def initialize_caches(kinds: Iterable[str]) -> None:
    """Creates the label sets of caches that a process has."""
    for kind in kinds:
        CACHE_BYTES.labels(kind)
        CACHE_EVICTIONS.labels(kind)
        for outcome in ("hit", "miss"):
            CACHE_REQUESTS.labels(kind, outcome)


def count_rejection(stage: str, reason: str) -> None:
    """Counts a refused request. A reason of another version's stage counts as other: labels stay bounded."""
    REJECTED.labels(stage, reason if reason in REASONS else OTHER_REASON).inc()


def exemplar() -> dict[str, str] | None:
    """Returns the labels that link an observation to the current trace; `None` unless the trace is exported."""
    identity = tracing.sampled_trace_id()
    return {"trace_id": identity} if identity else None
