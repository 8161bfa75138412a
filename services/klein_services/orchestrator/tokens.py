"""Bearer tokens of the public API: the file that lists their hashes, and the look-up of the token of a call.

The file has one table for each tenant:

    [tokens.acme]
    sha256 = "9f86d081…"              # or a list of two, while a token is replaced by another
    weight = 2.0                      # share of a busy stage, relative to others; 1 if absent
    requests_in_flight = 8            # no limit if absent
    megapixels_per_minute = 120.0     # of input and output together; no limit if absent
    models = ["klein-4b"]             # all if absent; the first one is this tenant's default

A token is 256 random bits, so its SHA-256 can neither be guessed nor looked up, and nothing is gained by a hash that
is slow on purpose: that protects passwords, which people choose, and would cost every request its time.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import re
import secrets
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from klein_services.runtime.caller import MAXIMUM_WEIGHT, MINIMUM_WEIGHT, Caller
from klein_services.runtime.settings import SettingsError, number_text

TOKEN_PREFIX = "klein_"
"""Begin of every token, by which scanners for secrets find one in a repository."""
MAXIMUM_FILE_BYTES = 1 << 20
MAXIMUM_TENANTS = 1000
"""Most tenants of a file; each is a label of metrics."""
MAXIMUM_HASHES = 2
"""Most tokens of a tenant at a time: the one in use and the one that replaces it."""
MAXIMUM_MODELS = 100
MAXIMUM_IN_FLIGHT = 100_000
MAXIMUM_MEGAPIXELS = 1e9
_RANDOM_BYTES = 32
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_HASH = re.compile(r"[0-9a-fA-F]{64}")
_KEYS = ("sha256", "weight", "requests_in_flight", "megapixels_per_minute", "models")


class TokensError(SettingsError):
    """The tokens file cannot be used; `problems` names every key that is wrong, and no value that may be secret."""

    def __init__(self, source: str, problems: tuple[str, ...]) -> None:
        self.problems = problems
        super().__init__(f"{source}: " + "; ".join(problems))


@dataclass(frozen=True, kw_only=True)
class Tenant(Caller):
    """A caller that has a token, and what the operator grants it."""

    requests_in_flight: int | None = None
    """Most requests at a time; `None` is no limit."""
    megapixels_per_minute: float | None = None
    """Most megapixels of input and output in a minute; `None` is no limit."""
    models: tuple[str, ...] | None = None
    """Models that it may name, the default one first; `None` means all."""


class Tokens:
    """The tenants of one tokens file."""

    def __init__(self, tenants: Mapping[bytes, Tenant]) -> None:
        self._tenants = dict(tenants)
        """By SHA-256 of the token."""

    @property
    def names(self) -> frozenset[str]:
        """Names of all tenants."""
        return frozenset(tenant.name for tenant in self._tenants.values())

    @property
    def models(self) -> frozenset[str]:
        """Models that any tenant's entry names."""
        return frozenset(model for tenant in self._tenants.values() for model in tenant.models or ())

    def tenant_of(self, token: str) -> Tenant | None:
        """Returns the tenant of a token, or `None`. Takes the same time for every token, also for the empty one."""
        presented = token_hash(token)
        found = None
        for known, tenant in self._tenants.items():
            # No early end: the time must not depend on the position, nor on how much of a hash is alike.
            if hmac.compare_digest(known, presented):
                found = tenant
        return found


def new_token() -> str:
    """Returns a new random token."""
    random = base64.urlsafe_b64encode(secrets.token_bytes(_RANDOM_BYTES))
    return TOKEN_PREFIX + random.decode("ascii").rstrip("=")


def token_hash(token: str) -> bytes:
    """Returns a token's SHA-256."""
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()


def tenant_table(tenant: Tenant, token: str) -> str:
    """Returns a tenant's table for the tokens file, with the hash of one token."""
    lines = [f'[tokens."{tenant.name}"]', f'sha256 = "{token_hash(token).hex()}"']
    if tenant.weight != 1:
        lines.append(f"weight = {number_text(tenant.weight)}")
    if tenant.requests_in_flight is not None:
        lines.append(f"requests_in_flight = {tenant.requests_in_flight}")
    if tenant.megapixels_per_minute is not None:
        lines.append(f"megapixels_per_minute = {number_text(tenant.megapixels_per_minute)}")
    if tenant.models is not None:
        # A list of strings in JSON is one in TOML, too.
        lines.append(f"models = {json.dumps(tenant.models)}")
    return "\n".join(lines) + "\n"


def read_tokens(path: Path) -> Tokens:
    """Reads a tokens file.

    Raises:
        TokensError: the file cannot be read, has no tenant, or keys are unknown or wrong; all of them are named.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MAXIMUM_FILE_BYTES + 1)
    except OSError as error:
        raise TokensError(str(path), (f"cannot be read: {error.strerror or error}",)) from None
    return parse_tokens(content, str(path))


def parse_tokens(content: bytes, source: str) -> Tokens:
    """Parses the content of a tokens file; `source` names it in errors.

    Raises:
        TokensError: as `read_tokens`.
    """
    if len(content) > MAXIMUM_FILE_BYTES:
        raise TokensError(source, (f"is larger than {MAXIMUM_FILE_BYTES} bytes, the most allowed",))
    try:
        document = tomllib.loads(content.decode("utf-8"))
    except UnicodeDecodeError:
        raise TokensError(source, ("is not UTF-8",)) from None
    except RecursionError:
        raise TokensError(source, ("is not TOML: its values are nested too deeply",)) from None
    except ValueError as error:
        raise TokensError(source, (f"is not TOML: {error}",)) from None
    problems = tuple(_document_problems(document))
    if problems:
        raise TokensError(source, problems)
    tenants: dict[bytes, Tenant] = {}
    for name, row in document["tokens"].items():
        models = row.get("models")
        tenant = Tenant(
            name=name,
            weight=float(row.get("weight", 1.0)),
            requests_in_flight=row.get("requests_in_flight"),
            megapixels_per_minute=row.get("megapixels_per_minute"),
            models=None if models is None else tuple(models),
        )
        tenants |= {bytes.fromhex(text): tenant for text in _hashes(row)}
    return Tokens(tenants)


def name_problem(name: str) -> str:
    """Returns what is wrong with a tenant's name; empty when nothing is."""
    if not _NAME.fullmatch(name):
        return "must be 1 to 64 letters, digits, '.', '_' or '-', and begin with a letter or digit"
    return f"must not begin with {TOKEN_PREFIX}, as tokens do" if name.startswith(TOKEN_PREFIX) else ""


def _shown(key: str) -> str:
    """Returns a key for messages, cut off where it may be a token that was put there by mistake."""
    return f"{TOKEN_PREFIX}…" if key.startswith(TOKEN_PREFIX) else key[:64]


def _document_problems(document: Mapping[str, Any]) -> Iterator[str]:
    for key in sorted(document.keys() - {"tokens"}):
        yield f"{_shown(key)} is unknown; only tables [tokens.NAME] are known"
    rows = document.get("tokens")
    # An empty file is what an editor or a copy leaves for a moment; it must not lock all tenants out.
    if not isinstance(rows, dict) or not rows:
        yield "there is no table [tokens.NAME]; `klein token new NAME` prints one"
        return
    if len(rows) > MAXIMUM_TENANTS:
        yield f"there are {len(rows)} tables; at most {MAXIMUM_TENANTS} are allowed"
        return
    owners: dict[str, str] = {}
    for name, row in rows.items():
        place = f"tokens.{_shown(name)}"
        if problem := name_problem(name):
            yield f"{place}: a name {problem}"
        if not isinstance(row, dict):
            yield f"{place} must be a table"
            continue
        yield from _row_problems(place, row)
        for text in filter(_HASH.fullmatch, map(str, _hashes(row))):
            owner = owners.setdefault(text.lower(), name)
            if owner != name:
                yield f"{place}.sha256 is a hash of {_shown(owner)}, too; every token belongs to one name"


def _hashes(row: Mapping[str, Any]) -> list[Any]:
    value = row.get("sha256")
    return value if isinstance(value, list) else [value]


def _row_problems(place: str, row: Mapping[str, Any]) -> Iterator[str]:
    for key in sorted(row.keys() - set(_KEYS)):
        yield f"{place}.{_shown(key)} is unknown; known are {', '.join(_KEYS)}"
    hashes = _hashes(row)
    if not 1 <= len(hashes) <= MAXIMUM_HASHES or not all(
        isinstance(text, str) and _HASH.fullmatch(text) for text in hashes
    ):
        # Without the value: it may be a token that was put here by mistake.
        yield f"{place}.sha256 must be one or two SHA-256 of a token, 64 hexadecimal digits each"
    weight = row.get("weight", 1.0)
    if not _is_number(weight) or not MINIMUM_WEIGHT <= weight <= MAXIMUM_WEIGHT:
        yield f"{place}.weight must be a number in [{MINIMUM_WEIGHT}, {MAXIMUM_WEIGHT:g}]"
    in_flight = row.get("requests_in_flight", 1)
    if type(in_flight) is not int or not 1 <= in_flight <= MAXIMUM_IN_FLIGHT:
        yield f"{place}.requests_in_flight must be an integer in [1, {MAXIMUM_IN_FLIGHT}]"
    megapixels = row.get("megapixels_per_minute", 1.0)
    if not _is_number(megapixels) or not 0 < megapixels <= MAXIMUM_MEGAPIXELS:
        yield f"{place}.megapixels_per_minute must be a number above 0, at most {MAXIMUM_MEGAPIXELS:g}"
    models = row.get("models", ["any"])
    if (
        not isinstance(models, list)
        or not 1 <= len(models) <= MAXIMUM_MODELS
        or not all(isinstance(model, str) and model for model in models)
        or len(set(models)) < len(models)
    ):
        yield f"{place}.models must be a list of 1 to {MAXIMUM_MODELS} different names of models"


def _is_number(value: object) -> bool:
    return type(value) in (int, float)
