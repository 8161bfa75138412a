"""Identity of the client that a request comes from: a context variable, and the metadata that carries it to stages.

The server at the edge decides who calls: by a token's name, else by the address of the peer. Behind it, the stages
believe the metadata that the edge sends.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from urllib.parse import unquote

CALLER_KEY = "klein-caller"
"""Metadata key of a caller's name, from the orchestrator to the stages."""
WEIGHT_KEY = "klein-weight"
"""Metadata key of a caller's weight."""
MINIMUM_WEIGHT = 0.01
MAXIMUM_WEIGHT = 1000.0
_NAME = re.compile(r"[!-~]{1,128}")
_WEIGHT = re.compile(r"\d{1,4}(\.\d{1,6})?")
_PEER = re.compile(r"(?:ipv4|ipv6):(?P<host>.+):\d+")


@dataclass(frozen=True, kw_only=True)
class Caller:
    """A client, as schedulers, quotas and logs distinguish it from others."""

    name: str
    """Name of its token, else the address that it calls from, without the port."""
    weight: float = 1.0
    """Its share of a busy stage, relative to others'."""


NO_CALLER = Caller(name="")
caller: ContextVar[Caller] = ContextVar("caller", default=NO_CALLER)
"""Caller of the request that is being handled; without a name outside of requests."""


def peer_host(peer: str) -> str:
    """Returns the address in a gRPC peer such as `ipv4:10.0.0.7:41234`, without the port; `unix` for local sockets."""
    match = _PEER.fullmatch(unquote(peer))
    return match["host"].strip("[]") if match else peer.partition(":")[0]


def caller_at(peer: str) -> Caller:
    """Returns the caller of a connection without any other identity."""
    return Caller(name=peer_host(peer))


def forwarded_caller(metadata: Sequence[tuple[str, str | bytes]], peer: str) -> Caller:
    """Returns the caller that another server of the suite names, else the one at `peer`.

    Only for servers that clients do not reach: anyone can send this metadata.
    """
    values = {key: value for key, value in metadata if key in (CALLER_KEY, WEIGHT_KEY)}
    name, weight = values.get(CALLER_KEY), values.get(WEIGHT_KEY)
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        return caller_at(peer)
    if not isinstance(weight, str) or not _WEIGHT.fullmatch(weight):
        return Caller(name=name)
    return Caller(name=name, weight=min(max(float(weight), MINIMUM_WEIGHT), MAXIMUM_WEIGHT))


def caller_metadata() -> tuple[tuple[str, str], ...]:
    """Returns the metadata by which stages see the current request's caller; empty outside of requests."""
    current = caller.get()
    if not current.name:
        return ()
    return ((CALLER_KEY, current.name), (WEIGHT_KEY, f"{current.weight:.6f}"))
