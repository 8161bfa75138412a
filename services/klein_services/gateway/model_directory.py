"""Directory of models: the models that a key may use, by their own names and by those of other APIs."""

from __future__ import annotations

import hashlib
import time
from collections import OrderedDict
from collections.abc import Mapping
from http import HTTPStatus

from klein_client import AsyncClient, KleinError, Model, Status
from klein_services.gateway.call_errors import call_error
from klein_services.gateway.errors import ApiError

FRESH_SECONDS = 5.0
"""Time for which the models of a key are not asked for again."""
MAXIMUM_KEYS = 1000
"""Keys whose models are kept; the least recently used make room."""


class ModelDirectory:
    """Models of the orchestrator.

    Args:
        client: of the orchestrator.
        aliases: names of models by the names that other APIs have for them.
    """

    def __init__(self, client: AsyncClient, aliases: Mapping[str, str]) -> None:
        self._client = client
        self._aliases = aliases
        self._known: OrderedDict[bytes, tuple[float, Status]] = OrderedDict()

    async def model(self, key: str, name: str) -> Model:
        """Returns the model of a name or alias; an empty name means the default model.

        Raises:
            ApiError: the key is unknown, the orchestrator does not answer, or the key may use no such model.
        """
        status = await self._status(key)
        wanted = self._aliases.get(name, name)
        for model in status.models:
            if model.name == wanted or (not wanted and model.is_default):
                return model
        names = {model.name for model in status.models}
        known = sorted(names | {alias for alias, target in self._aliases.items() if target in names})
        raise ApiError(
            HTTPStatus.NOT_FOUND,
            "unknown_model",
            f"There is no model {name[:64]!r}; there are {', '.join(known)}.",
        )

    async def check_key(self, key: str) -> None:
        """Checks that the orchestrator knows a key.

        Raises:
            ApiError: it does not, or does not answer.
        """
        await self._status(key)

    async def _status(self, key: str) -> Status:
        # Not the key itself: a dump of memory should show as few as possible.
        digest = hashlib.sha256(key.encode()).digest()
        known = self._known.get(digest)
        if known is not None and time.monotonic() - known[0] < FRESH_SECONDS:
            self._known.move_to_end(digest)
            return known[1]
        try:
            status = await self._client.status(token=key)
        except KleinError as error:
            raise call_error(error) from error
        self._known[digest] = (time.monotonic(), status)
        self._known.move_to_end(digest)
        while len(self._known) > MAXIMUM_KEYS:
            self._known.popitem(last=False)
        return status
