"""Prometheus metrics of the gateway."""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

from klein_services.runtime.metrics import REQUEST_BUCKETS

REQUESTS = Counter(
    "klein_gateway_requests",
    "Answered HTTP requests by API and HTTP status; 499 means that the client left.",
    ["api", "status"],
)
REQUEST_SECONDS = Histogram(
    "klein_gateway_request_duration_seconds",
    "Seconds from an HTTP request's headers to the end of its answer.",
    ["api"],
    buckets=REQUEST_BUCKETS,
)
IN_PROGRESS = Gauge("klein_gateway_requests_in_progress", "HTTP requests that are being answered.")
BODY_BYTES = Gauge("klein_gateway_body_bytes", "Bytes of the bodies of requests in progress.")
READY = Gauge(
    "klein_gateway_ready", "1 while the orchestrator serves and the gateway does not drain, else 0."
)

IMAGES = Counter("klein_gateway_images", "Images that were delivered.", ["api"])
MEGAPIXELS = Counter(
    "klein_gateway_megapixels", "Megapixels of delivered images and of their inputs.", ["api", "direction"]
)
COST = Counter("klein_gateway_cost", "Cost of delivered images, in the currency of the price table.", ["api"])
