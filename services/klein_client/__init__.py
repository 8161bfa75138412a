"""Client of the suite: typed, synchronous and asynchronous, without torch."""

from klein_client.async_client import AsyncClient, AsyncEventStream
from klein_client.client import Client, EventStream
from klein_client.endpoint import Tls
from klein_client.errors import (
    Cancelled,
    DeadlineExceeded,
    FailedPrecondition,
    InternalError,
    InvalidRequest,
    KleinError,
    NotFound,
    Overloaded,
    PermissionDenied,
    Unauthenticated,
    Unavailable,
    UnusableClient,
    Violation,
    WrongServer,
)
from klein_client.models import Adapter, Limits, Model, Stage, Status
from klein_client.request import ImageOptions
from klein_client.results import Event, Generation, Image, Preview, Queued, Step, Summary, Timing
from klein_client.sources import ImageSource

__all__ = [
    "Adapter",
    "AsyncClient",
    "AsyncEventStream",
    "Cancelled",
    "Client",
    "DeadlineExceeded",
    "Event",
    "EventStream",
    "FailedPrecondition",
    "Generation",
    "Image",
    "ImageOptions",
    "ImageSource",
    "InternalError",
    "InvalidRequest",
    "KleinError",
    "Limits",
    "Model",
    "NotFound",
    "Overloaded",
    "PermissionDenied",
    "Preview",
    "Queued",
    "Stage",
    "Status",
    "Step",
    "Summary",
    "Timing",
    "Tls",
    "Unauthenticated",
    "Unavailable",
    "UnusableClient",
    "Violation",
    "WrongServer",
]
