"""Authentication of the public API: calls that need a token, and the tokens file, read again when it changes."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

from klein_services.orchestrator import external_scaler
from klein_services.orchestrator.tokens import Tenant, Tokens, TokensError, read_tokens
from klein_services.runtime.errors import PermissionDenied, Unauthenticated
from klein_services.runtime.metrics import TOKENS_CURRENT, TOKENS_RELOADS

RELOAD_SECONDS = 1.0
"""Time between two looks at the tokens file."""
AUTHORIZATION_KEY = "authorization"
"""Metadata key of the token, as `Bearer TOKEN`."""
OPEN_SERVICES = frozenset({"grpc.health.v1.Health", external_scaler.SERVICE_NAME})
"""Services that need no token: probes have none, and KEDA cannot send one."""
CLOSED_SERVICES = frozenset({"grpc.channelz.v1.Channelz"})
"""Services that no token opens: they show the connections of all tenants."""
_SCHEME = "bearer "
_log = logging.getLogger("klein.tokens")


def bearer_token(metadata: Sequence[tuple[str, str | bytes]]) -> str:
    """Returns the token of a call; empty when there is none, or more than one header that could hold it."""
    values = [value for key, value in metadata if key == AUTHORIZATION_KEY]
    if len(values) != 1 or not isinstance(values[0], str) or not values[0].lower().startswith(_SCHEME):
        return ""
    return values[0][len(_SCHEME) :].strip()


class Authentication:
    """Guard of the public API by the tokens of a file.

    A file that cannot be used is logged and counted, and the last good one holds: a slip of an editor must not lock
    all tenants out.

    Args:
        path: the tokens file.
        on_change: called in the event loop with the tokens that have become valid, also with the first ones.

    Raises:
        TokensError: the file cannot be used.
    """

    def __init__(self, path: Path, on_change: Callable[[Tokens], None] = lambda tokens: None) -> None:
        self.tokens = Tokens({})
        """The tokens that are valid now."""
        self._path = path
        self._on_change = on_change
        self._seen = _signature(path)
        self._accept(read_tokens(path))
        self._watch: asyncio.Task[None] | None = None

    def caller_of(self, path: str, metadata: Sequence[tuple[str, str | bytes]]) -> Tenant | None:
        """Returns the tenant whose token a call has; `None` for calls that need none.

        Raises:
            Unauthenticated: there is no token, or an unknown one.
            PermissionDenied: the method is closed to tenants.
        """
        service = path.removeprefix("/").rpartition("/")[0]
        if service in OPEN_SERVICES:
            return None
        tenant = self.tokens.tenant_of(bearer_token(metadata))
        if tenant is None:
            raise Unauthenticated
        if service in CLOSED_SERVICES:
            raise PermissionDenied("METHOD_NOT_ALLOWED", f"{service} is closed on a server with tokens")
        return tenant

    def start(self) -> None:
        """Begins to watch the file. Needs a running event loop."""
        self._watch = asyncio.create_task(self._reload_on_change())

    async def close(self) -> None:
        """Ends the watch."""
        if self._watch is not None:
            self._watch.cancel()
            await asyncio.gather(self._watch, return_exceptions=True)

    async def _reload_on_change(self) -> None:
        while True:
            await asyncio.sleep(RELOAD_SECONDS)
            # In a thread, because a file system may hang.
            signature = await asyncio.to_thread(_signature, self._path)
            if signature == self._seen:
                continue
            self._seen = signature
            try:
                tokens = await asyncio.to_thread(read_tokens, self._path)
            except TokensError as error:
                TOKENS_RELOADS.labels("failed").inc()
                TOKENS_CURRENT.set(0)
                _log.error("the tokens stay as they were: %s", error)
            else:
                TOKENS_RELOADS.labels("loaded").inc()
                self._accept(tokens)
                _log.info("tokens read", extra={"tenants": len(tokens.names)})

    def _accept(self, tokens: Tokens) -> None:
        self.tokens = tokens
        TOKENS_CURRENT.set(1)
        for outcome in ("loaded", "failed"):
            TOKENS_RELOADS.labels(outcome)
        self._on_change(tokens)


def _signature(path: Path) -> tuple[int, ...]:
    """Returns what changes when a file is replaced or written; empty while there is none."""
    try:
        status = path.stat()
    except OSError:
        return ()
    return (status.st_ino, status.st_mtime_ns, status.st_ctime_ns, status.st_size)
