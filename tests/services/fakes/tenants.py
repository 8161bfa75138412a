"""Tokens files and calls of tenants, for tests of a real orchestrator before fake stages."""

from __future__ import annotations

from klein_api.v1 import image_service_pb2 as api
from klein_services.orchestrator.tokens import Tenant, new_token, tenant_table
from klein_services.runtime.status import explain
from tests.services.fakes.runtime_toy import failure

TOKEN = new_token()


def bearer(token, scheme="Bearer"):
    """Returns the metadata that carries a token."""
    return (("authorization", f"{scheme} {token}"),)


def tokens_toml(folder, **limits):
    """Writes a file of one tenant, acme, whose token is `TOKEN`; returns its path as a setting."""
    path = folder / "tokens.toml"
    path.write_text(tenant_table(Tenant(name="acme", **limits), TOKEN))
    return str(path)


async def make(suite, metadata=None, **spec):
    """Makes images through the unary method, by default for acme."""
    request = api.GenerateImageRequest(spec=api.ImageSpec(**({"prompt": "a star"} | spec)))
    metadata = bearer(TOKEN) if metadata is None else metadata
    return await suite.images.GenerateImage(request, metadata=metadata)


async def refused(suite, metadata=None, **spec):
    """Returns the status details of a request that must fail."""
    return explain(await failure(make(suite, metadata, **spec)))
