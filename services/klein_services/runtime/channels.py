"""Channels to the servers of the suite, with their options and service config."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from importlib import resources
from typing import Any

import grpc

from klein_services.runtime.pem import Credentials
from klein_services.runtime.tls import channel_credentials

STAGE_MESSAGE_BYTES = 4 << 20
"""Most bytes of a message between the orchestrator and a stage."""
IMAGE_MESSAGE_BYTES = 256 << 20
"""Most bytes of a message of the public API, which carries encoded images."""
HTTP2_FRAME_BYTES = 1 << 20
"""Most bytes of an HTTP/2 frame; the default, 16 KiB, makes tensors take some 5 % longer."""
DNS_INTERVAL_MILLISECONDS = 1_000
"""Least time between two resolutions of a name. gRPC resolves again only when a connection to a replica ends."""
KEEPALIVE_MILLISECONDS = 2_000
"""Time without data after which the orchestrator pings a replica, and then time for the answer; servers allow it."""


def open_channel(
    target: str,
    *,
    message_bytes: int = STAGE_MESSAGE_BYTES,
    health_service: str = "",
    credentials: Credentials | None = None,
    server_name: str = "",
    options: Sequence[tuple[str, Any]] = (),
) -> grpc.aio.Channel:
    """Opens a channel, which connects on its first call. Needs a running event loop.

    Args:
        target: a gRPC target: `host:port`, or `dns:///host:port` to balance over all of a name's addresses.
        message_bytes: largest message, both ways.
        health_service: full name of the service whose health decides which replicas get calls. Not for
            channels that must reach a replica that loads or drains, such as those for DescribeStage.
        credentials: certificate, key and authorities for TLS; `None` connects in plaintext.
        server_name: name that the server's certificate must have; empty means the target's host.
        options: further channel options, which override those set here.
    """
    defaults: list[tuple[str, Any]] = [
        ("grpc.service_config", service_config(health_service)),
        ("grpc.service_config_disable_resolution", 1),
        ("grpc.enable_retries", 1),
        # A proxy that the environment names is for connections out of the network, not inside it.
        ("grpc.enable_http_proxy", 0),
        ("grpc.max_receive_message_length", message_bytes),
        ("grpc.max_send_message_length", message_bytes),
        ("grpc.http2.max_frame_size", HTTP2_FRAME_BYTES),
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.dns_min_time_between_resolutions_ms", DNS_INTERVAL_MILLISECONDS),
    ]
    if server_name:
        defaults.append(("grpc.ssl_target_name_override", server_name))
    # gRPC takes the first of two options of a name.
    every = list(dict([*defaults, *options]).items())
    if credentials is None:
        return grpc.aio.insecure_channel(target, options=every)
    return grpc.aio.secure_channel(target, channel_credentials(credentials), options=every)


@cache
def service_config(health_service: str = "") -> str:
    """Returns the service config of klein_api as JSON, with health checking if a service is named."""
    text = resources.files("klein_api.v1").joinpath("service_config.json").read_text(encoding="utf-8")
    config: dict[str, Any] = json.loads(text)
    if health_service:
        config["healthCheckConfig"] = {"serviceName": health_service}
    return json.dumps(config)


def host_for_url(host: str) -> str:
    """Returns a host with the brackets that an IPv6 address needs in front of a port, unless it has them already."""
    return f"[{host}]" if ":" in host and not host.startswith("[") else host
