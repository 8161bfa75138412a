"""The table of panels: dashboards of the overview, each process, and capacity."""

from __future__ import annotations

from deploy.observability.gateway_panels import GATEWAY_BOARD
from deploy.observability.panel import IN, RATE, REQUESTS, Board, Panel, graph, mean, number, quantiles, rate

SERVICES = {
    "text-encoder": "klein_api.v1.TextEncoderService",
    "denoiser": "klein_api.v1.DenoiserService",
    "vae-decoder": "klein_api.v1.VaeDecoderService",
    "orchestrator": "klein_api.v1.ImageService",
}
GPU, TLS, TOKENS, POLICY, SIGNING = "a GPU", "TLS", "tokens", "a content policy", "a signing key"
AUTOSCALER, ALERT = "kube-state-metrics", "an alert that fires"
"""Reasons for which a panel may have no data: the feature is off, or nothing is wrong."""

_BAD = f'sum(rate({REQUESTS}_count{{{IN}, outcome="failed"}}{RATE}))'
_VALID = f'sum(rate({REQUESTS}_count{{{IN}, outcome=~"succeeded|failed"}}{RATE}))'
_HITS = f'sum by (kind) (rate(klein_cache_requests_total{{{IN}, outcome="hit"}}{RATE}))'
_CACHE_RATIO = (f"{_HITS} / sum by (kind) (rate(klein_cache_requests_total{{{IN}}}{RATE}))", "{{kind}}")
_P95 = quantiles(REQUESTS, f'{IN}, outcome="succeeded"')[1][0]

OVERVIEW = Board(
    "klein-overview",
    "Klein overview",
    "Do clients get their images in time, and if not, which stage is the reason?",
    (
        number("Requests a second", "reqps", "All requests.", f"sum(rate({REQUESTS}_count{{{IN}}}{RATE}))"),
        number(
            "Availability", "percentunit", "Share of requests that do not fail.", f"1 - {_BAD} / {_VALID}"
        ),
        number("Duration, p95", "s", "95 % of successful requests are faster.", _P95),
        number(
            "Replicas that serve",
            "short",
            "By stage.",
            f"sum by (stage) (klein_serving{{{IN}}})",
            "{{stage}}",
        ),
        graph("Requests by outcome", "reqps", "How requests end.", rate(f"{REQUESTS}_count", "outcome")),
        graph(
            "Request duration",
            "s",
            "Successful requests, from arrival to answer.",
            *quantiles(REQUESTS, f'{IN}, outcome="succeeded"'),
        ),
        graph(
            "Time by stage",
            "s",
            "Mean duration of the calls of a request: queueing and transfer included.",
            mean("klein_stage_call_duration_seconds", "stage, operation"),
        ),
        graph(
            "Queue wait by stage",
            "s",
            "95 % of requests wait less for the device.",
            quantiles("klein_queue_wait_seconds", IN, "stage")[1],
        ),
        graph(
            "Requests in stages",
            "short",
            "Requests that wait, and requests that compute.",
            (f"sum by (stage) (klein_queue_depth{{{IN}}})", "{{stage}} waiting"),
            (f"sum by (stage) (klein_running_requests{{{IN}}})", "{{stage}} running"),
        ),
        graph(
            "Refusals by reason",
            "reqps",
            "Refused by the orchestrator.",
            rate("klein_request_rejected_total", "reason", f'{IN}, stage="orchestrator"'),
        ),
        graph(
            "Missed deadlines",
            "reqps",
            "By the stage where time ran out.",
            rate("klein_deadline_missed_total", "stage"),
        ),
        graph(
            "Abandoned work",
            "percentunit",
            "Device time of requests that nothing waits for, as a share of one device.",
            rate("klein_abandoned_work_seconds_total", "stage"),
        ),
        graph("Images", "ops", "Images by outcome.", rate("klein_images_total", "outcome")),
        graph("Cache hits", "percentunit", "Share of look-ups that the cache answers.", _CACHE_RATIO),
        graph(
            "Alerts",
            "short",
            "Alerts of the suite that fire now.",
            ('count by (alertname) (ALERTS{alertname=~"Klein.*", alertstate="firing"})', "{{alertname}}"),
            needs=ALERT,
        ),
    ),
)


def _process(stage: str) -> tuple[Panel, ...]:
    """Returns the panels that every process has."""
    own = f'{IN}, stage="{stage}"'
    calls = f'{IN}, grpc_service="{SERVICES[stage]}"'
    alive = f"on (namespace, instance) group_left () (klein_serving{{{own}}} >= bool 0)"
    return (
        number("Replicas that serve", "short", "Ready to take work.", f"sum(klein_serving{{{own}}})"),
        graph(
            "Calls by status",
            "reqps",
            "RPCs that ended.",
            rate("grpc_server_handled_total", "grpc_code", calls),
        ),
        graph(
            "Calls begun",
            "reqps",
            "RPCs that arrived.",
            rate("grpc_server_started_total", "grpc_method", calls),
        ),
        graph(
            "Call duration",
            "s",
            "Streams included.",
            *quantiles("grpc_server_handling_seconds", calls, "grpc_method"),
        ),
        graph("Refusals", "reqps", "By reason.", rate("klein_request_rejected_total", "reason", own)),
        graph("Missed deadlines", "reqps", "Here.", rate("klein_deadline_missed_total", "stage", own)),
        graph(
            "Load time",
            "s",
            "From the begin of the process until it takes work, by phase.",
            (f"klein_model_load_seconds{{{own}}}", "{{phase}} {{instance}}"),
        ),
        graph(
            "Memory of the process",
            "bytes",
            "Host memory.",
            (f"process_resident_memory_bytes{{{IN}}} * {alive}", "{{instance}}"),
        ),
        graph(
            "CPU of the process",
            "short",
            "Cores in use.",
            (f"rate(process_cpu_seconds_total{{{IN}}}{RATE}) * {alive}", "{{instance}}"),
        ),
        graph(
            "Certificate",
            "s",
            "Time until it expires.",
            (f"klein_certificate_expiry_timestamp_seconds{{{own}}} - time()", "{{kind}} {{instance}}"),
            rate("klein_certificate_reloads_total", "kind, outcome", own),
            needs=TLS,
        ),
    )


def _device(stage: str) -> tuple[Panel, ...]:
    """Returns the panels of a process with a device."""
    own = f'{IN}, stage="{stage}"'
    return (
        graph(
            "Requests",
            "short",
            "Waiting and running.",
            (f"sum(klein_queue_depth{{{own}}})", "waiting"),
            (f"sum(klein_running_requests{{{own}}})", "running"),
        ),
        graph(
            "Backlog",
            "s",
            "Device time that is still needed.",
            (f"klein_backlog_seconds{{{own}}}", "{{instance}}"),
        ),
        graph("Queue wait", "s", "Until the device is free.", *quantiles("klein_queue_wait_seconds", own)),
        graph(
            "Device time of a request",
            "s",
            "By operation.",
            *quantiles("klein_stage_duration_seconds", own, "operation"),
        ),
        graph(
            "Abandoned work",
            "percentunit",
            "Share of one device.",
            rate("klein_abandoned_work_seconds_total", "instance", own),
        ),
        graph(
            "Device memory",
            "bytes",
            "Used by tensors, and held by torch.",
            (f"klein_device_memory_bytes{{{own}}}", "{{kind}} {{instance}}"),
            needs=GPU,
        ),
        graph(
            "Replicas",
            "short",
            "Model, device, precision and version.",
            (
                f"count by (model, device, dtype, version) (klein_stage_info{{{own}}})",
                "{{model}} {{device}} {{version}}",
            ),
        ),
    )


def _batches(stage: str) -> tuple[Panel, ...]:
    """Returns the panels of a stage that computes works of one shape together."""
    own = f'{IN}, stage="{stage}"'
    return (
        graph(
            "Works in a batch",
            "short",
            "Mean; nothing where batching is off.",
            mean("klein_batch_works", "operation", own),
            needs=GPU,
        ),
    )


_STEPS = f'{IN}, stage="denoiser"'
_VAE_DECODER = (
    graph(
        "Large images",
        "short",
        "Pixels of large image files that wait or are read and written, and of large images on the device.",
        (
            f'sum by (stage) (klein_queue_large_pixels{{{IN}, stage=~"vae-decoder.*"}})',
            "{{stage}}",
        ),
    ),
    graph(
        "Bytes of images",
        "bytes",
        "Image files and pixels that requests hold while they wait.",
        (f"sum by (instance) (klein_held_bytes{{{IN}}})", "{{instance}}"),
    ),
)
_DENOISER = (
    graph("Step time", "s", "One packed step.", *quantiles("klein_denoise_step_seconds", _STEPS)),
    graph("Tokens in a step", "short", "Mean.", mean("klein_denoise_step_tokens", "instance", _STEPS)),
    graph("Requests in a step", "short", "Mean.", mean("klein_denoise_step_requests", "instance", _STEPS)),
    graph(
        "Occupancy of a step",
        "percentunit",
        "Tokens of the last step over the budget.",
        (f"klein_denoise_step_occupancy_ratio{{{_STEPS}}}", "{{instance}}"),
    ),
    graph(
        "Token budget",
        "short",
        "It falls when memory runs out.",
        (f"klein_denoise_step_token_budget{{{_STEPS}}}", "{{instance}}"),
    ),
    graph("Adapter loads", "ops", "Files read.", rate("klein_adapter_loads_total", "outcome")),
)
_CACHES = (
    graph("Cache look-ups", "ops", "By outcome.", rate("klein_cache_requests_total", "kind, outcome")),
    graph("Cache size", "bytes", "By kind.", (f"sum by (kind) (klein_cache_bytes{{{IN}}})", "{{kind}}")),
    graph("Cache evictions", "ops", "Entries that made room.", rate("klein_cache_evictions_total", "kind")),
)
_ORCHESTRATOR = (
    graph("Requests by model", "reqps", "And flow.", rate(f"{REQUESTS}_count", "model, flow")),
    graph("Pixels", "short", "Pixels a second that clients got.", rate("klein_pixels_total", "model, flow")),
    graph(
        "Transfer time",
        "s",
        "First to last frame.",
        *quantiles("klein_hop_seconds", IN, "source, destination"),
    ),
    graph("Transfers", "Bps", "Tensors and images.", rate("klein_hop_bytes_total", "source, destination")),
    graph(
        "Usage",
        "ops",
        "Requests, images and megapixels of each caller.",
        rate("klein_usage_requests_total", "caller"),
        rate("klein_usage_images_total", "caller"),
        rate("klein_usage_megapixels_total", "caller, direction"),
        needs=TOKENS,
    ),
    graph(
        "Requests in flight",
        "short",
        "Of each caller with a token.",
        (f"sum by (caller) (klein_usage_requests_in_flight{{{IN}}})", "{{caller}}"),
        needs=TOKENS,
    ),
    graph(
        "Content policy",
        "ops",
        "Decisions about requests and images.",
        rate("klein_content_policy_decisions_total", "point, decision"),
        needs=POLICY,
    ),
    graph(
        "Content policy time",
        "s",
        "From its call to its decision.",
        *quantiles("klein_content_policy_duration_seconds", IN, "point"),
        needs=POLICY,
    ),
    graph(
        "Signatures",
        "ops",
        "Images given to the signer.",
        rate("klein_c2pa_signatures_total", "outcome"),
        needs=SIGNING,
    ),
    graph(
        "Signing time",
        "s",
        "One image.",
        *quantiles("klein_c2pa_sign_duration_seconds", IN, "format"),
        needs=SIGNING,
    ),
    graph(
        "Usage log",
        "ops",
        "Lines written or lost, and those that wait.",
        rate("klein_usage_log_lines_total", "outcome"),
        (f"klein_usage_log_waiting_lines{{{IN}}}", "waiting"),
        needs=TOKENS,
    ),
    graph("Routing table loads", "ops", "On SIGHUP.", rate("klein_routing_table_loads_total", "outcome")),
    graph(
        "Tokens file",
        "short",
        "1 while the tokens in use are those of the file.",
        (f"klein_tokens_current{{{IN}}}", "current"),
        rate("klein_tokens_reloads_total", "outcome"),
        needs=TOKENS,
    ),
)
_BUSY = f"sum by (stage) (rate(klein_stage_duration_seconds_sum{{{IN}}}{RATE}))"
_REPLICAS = f"sum by (stage) (klein_serving{{{IN}}})"
_DEPLOYMENTS = f'{IN}, deployment=~"text-encoder|denoiser|vae-decoder|orchestrator"'

CAPACITY = Board(
    "klein-capacity",
    "Klein capacity",
    "Which stage needs more replicas, and which has too many?",
    (
        number(
            "Images a second",
            "ops",
            "That clients got.",
            f'sum(rate(klein_images_total{{{IN}, outcome="succeeded"}}{RATE}))',
        ),
        graph(
            "Busy devices",
            "percentunit",
            "Device time of requests over the replicas' time.",
            (f"{_BUSY} / {_REPLICAS}", "{{stage}}"),
        ),
        graph(
            "Backlog of a replica",
            "s",
            "Device time that is still needed, a replica.",
            (f"sum by (stage) (klein_backlog_seconds{{{IN}}}) / {_REPLICAS}", "{{stage}}"),
        ),
        graph(
            "Queue wait",
            "s",
            "95 % of requests wait less.",
            quantiles("klein_queue_wait_seconds", IN, "stage")[1],
        ),
        graph(
            "Device time of a request",
            "s",
            "Mean, by operation: the ratio of stages.",
            mean("klein_stage_duration_seconds", "stage, operation"),
        ),
        graph("Replicas that serve", "short", "By stage.", (_REPLICAS, "{{stage}}")),
        graph(
            "Replicas wanted",
            "short",
            "By the autoscaler.",
            (f"kube_deployment_spec_replicas{{{_DEPLOYMENTS}}}", "{{deployment}}"),
            needs=AUTOSCALER,
        ),
        graph(
            "Load time",
            "s",
            "What a new replica costs.",
            (f"avg by (stage, phase) (klein_model_load_seconds{{{IN}}})", "{{stage}} {{phase}}"),
        ),
        graph(
            "Occupancy of steps",
            "percentunit",
            "Of the denoiser's token budget.",
            (f"klein_denoise_step_occupancy_ratio{{{IN}}}", "{{instance}}"),
        ),
        graph("Pixels", "short", "Pixels a second.", rate("klein_pixels_total", "model")),
    ),
)
BOARDS = (
    OVERVIEW,
    *(
        Board(
            f"klein-{stage}",
            f"Klein {stage}",
            f"One stage in detail: {stage}.",
            (
                *_process(stage),
                *(_device(stage) if stage != "orchestrator" else _ORCHESTRATOR),
                *(_DENOISER if stage == "denoiser" else ()),
                *(_VAE_DECODER if stage == "vae-decoder" else ()),
                *(_batches(stage) if stage in ("text-encoder", "vae-decoder") else ()),
                *(_CACHES if stage in ("denoiser", "orchestrator") else ()),
            ),
        )
        for stage in SERVICES
    ),
    CAPACITY,
    GATEWAY_BOARD,
)
