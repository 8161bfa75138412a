"""The table of the gateway's panels."""

from __future__ import annotations

from deploy.observability.panel import IN, Board, Panel, graph, quantiles, rate

GATEWAY = "the gateway"
"""Reason for which a panel may have no data: the process is optional."""


def _graph(title: str, unit: str, description: str, *queries: tuple[str, str]) -> Panel:
    return graph(title, unit, description, *queries, needs=GATEWAY)


GATEWAY_BOARD = Board(
    "klein-gateway",
    "Klein gateway",
    "The HTTP process in detail: its APIs, jobs and webhooks.",
    (
        _graph(
            "Ready gateways",
            "short",
            "While the orchestrator serves and the gateway does not drain.",
            (f"sum(klein_gateway_ready{{{IN}}})", "gateways"),
        ),
        _graph(
            "Requests by status",
            "reqps",
            "499: the client left.",
            rate("klein_gateway_requests_total", "status"),
        ),
        _graph("Requests by API", "reqps", "Answered.", rate("klein_gateway_requests_total", "api")),
        _graph(
            "Request duration",
            "s",
            "From the headers to the end of the answer.",
            *quantiles("klein_gateway_request_duration_seconds", IN, "api"),
        ),
        _graph(
            "Requests in progress",
            "short",
            "By gateway.",
            (f"klein_gateway_requests_in_progress{{{IN}}}", "{{instance}}"),
        ),
        _graph(
            "Bytes of bodies",
            "bytes",
            "Of requests in progress.",
            (f"klein_gateway_body_bytes{{{IN}}}", "{{instance}}"),
        ),
        _graph("Images", "ops", "Delivered, by API.", rate("klein_gateway_images_total", "api")),
        _graph("Megapixels", "short", "A second.", rate("klein_gateway_megapixels_total", "api, direction")),
        _graph(
            "Cost",
            "short",
            "A second, in the currency of the price table.",
            rate("klein_gateway_cost_total", "api"),
        ),
        _graph(
            "Jobs made and ended",
            "ops",
            "By API.",
            rate("klein_gateway_jobs_created_total", "api"),
            rate("klein_gateway_jobs_ended_total", "outcome"),
        ),
        _graph(
            "Open jobs",
            "short",
            "In the database, which several gateways may share, and run by each.",
            (f"max by (state) (klein_gateway_jobs_open{{{IN}}})", "{{state}}"),
            (f"klein_gateway_jobs_running{{{IN}}}", "run by {{instance}}"),
        ),
        _graph(
            "Wait of a job",
            "s",
            "Until its run begins.",
            *quantiles("klein_gateway_job_wait_seconds", IN, "api"),
        ),
        _graph(
            "Duration of a job",
            "s",
            "Of its last run.",
            *quantiles("klein_gateway_job_duration_seconds", IN, "api"),
        ),
        _graph(
            "Jobs taken over",
            "ops",
            "From a gateway that had stopped.",
            (f"sum(rate(klein_gateway_job_recoveries_total{{{IN}}}[$__rate_interval]))", "jobs"),
        ),
        _graph("Webhook calls", "ops", "By outcome.", rate("klein_gateway_webhook_calls_total", "outcome")),
        _graph(
            "Webhooks that wait",
            "short",
            "In the database.",
            (f"max(klein_gateway_webhooks_waiting{{{IN}}})", "calls"),
        ),
    ),
)
