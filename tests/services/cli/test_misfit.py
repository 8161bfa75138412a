"""`klein up` when all of its processes serve but do not fit each other."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import cast

import pytest

from klein_services.cli.errors import CliError
from klein_services.cli.suite import Suite
from klein_services.cli.up import about_model
from tests.services.fakes.fake_stages import MODEL, FakeVaeDecoder
from tests.services.fakes.orchestrator_suite import FakeSuite


def suite_at(target: str) -> Suite:
    return cast(Suite, SimpleNamespace(target=target, model_name=MODEL, health_ports={}))


async def test_stages_that_do_not_fit_each_other_are_an_error_of_one_sentence():
    async with FakeSuite(vae_decoder=FakeVaeDecoder(latent_channels=8)).running() as suite:
        with pytest.raises(
            CliError, match=r"fake cannot be used: .* makes latents of 4 channels; .* takes 8\. "
        ):
            await asyncio.to_thread(about_model, suite_at(suite.address))


async def test_a_stage_that_does_not_serve_at_the_moment_is_not_an_error():
    async with FakeSuite(vae_decoder=FakeVaeDecoder(serving=False)).running() as suite:
        assert (await asyncio.to_thread(about_model, suite_at(suite.address))).startswith(MODEL)
