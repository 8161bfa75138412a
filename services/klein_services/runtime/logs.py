"""Formats of log lines, JSON or console, and the request id that both carry."""

from __future__ import annotations

import json
import logging
import math
import secrets
import sys
import time
from collections.abc import Sequence
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any

from klein_services.runtime import tracing

REQUEST_ID_KEY = "x-request-id"
"""Metadata key of a request's id, in both directions."""
MAX_REQUEST_ID_CHARACTERS = 128

RARE_WARNING_SECONDS = 60.0
"""Least time between two lines of the same `RareWarning`."""

request_id: ContextVar[str] = ContextVar("request_id", default="")
"""Id of the request that is being handled; empty outside of requests."""

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


def take_request_id(metadata: Sequence[tuple[str, str | bytes]]) -> str:
    """Returns the client's request id, or a new one if it has none, an empty or a too long one."""
    for key, value in metadata:
        if key == REQUEST_ID_KEY and isinstance(value, str) and 0 < len(value) <= MAX_REQUEST_ID_CHARACTERS:
            return value
    return secrets.token_hex(16)


def request_metadata() -> tuple[tuple[str, str], ...]:
    """Returns the metadata that makes calls to other servers part of the current request and its trace."""
    current = request_id.get()
    return (*(((REQUEST_ID_KEY, current),) if current else ()), *tracing.headers())


def configure(level: str, form: str) -> None:
    """Writes all log lines to standard error, in `json` or `console` form."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if form == "json" else ConsoleFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.captureWarnings(True)


class RareWarning:
    """A warning that is logged at most once a minute, so that its cause cannot fill the disk.

    Args:
        logger: writes the lines.
        message: their text; the number of occurrences since the last line is the field `count`.
    """

    def __init__(self, logger: logging.Logger, message: str) -> None:
        self._logger = logger
        self._message = message
        self._count = 0
        self._quiet_until = -math.inf

    def occurred(self, **fields: object) -> None:
        """Logs the line with these fields, or only counts when there was one in the last minute."""
        self._count += 1
        now = time.monotonic()
        if now >= self._quiet_until:
            self._quiet_until = now + RARE_WARNING_SECONDS
            count, self._count = self._count, 0
            self._logger.warning("%s", self._message, extra={"count": count, **fields})


class JsonFormatter(logging.Formatter):
    """One JSON object per line: time, level, logger, message, request_id, trace_id, span_id, extra fields."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= _identifiers() | _extra(record)
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str, ensure_ascii=False)


class ConsoleFormatter(logging.Formatter):
    """One readable line: date and time, level, message, then request_id, trace_id, span_id and the extra fields."""

    def format(self, record: logging.LogRecord) -> str:
        clock = datetime.fromtimestamp(record.created).isoformat(" ", timespec="milliseconds")
        fields = _identifiers() | _extra(record)
        extra = "".join(f" {key}={value}" for key, value in fields.items())
        text = f"{clock} {record.levelname:<7} {record.getMessage()}{extra}"
        return f"{text}\n{self.formatException(record.exc_info)}" if record.exc_info else text


def _identifiers() -> dict[str, str]:
    """Returns the ids of the current request, its trace and its span, those that there are."""
    trace, span = tracing.identifiers()
    values = {"request_id": request_id.get(), "trace_id": trace, "span_id": span}
    return {name: value for name, value in values.items() if value}


def _extra(record: logging.LogRecord) -> dict[str, Any]:
    return {key: value for key, value in vars(record).items() if key not in _STANDARD}
