"""Quotas of tenants: exact edges, delays that are right, and what requests that end in different ways are charged."""

import asyncio

import grpc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import REGISTRY

from klein_api.v1 import image_service_pb2 as api
from klein_core.errors import InvalidInput
from klein_core.vae_decoder.image_io import MODEL_PIXEL_COUNT
from klein_services.orchestrator.quotas import IN_FLIGHT_RETRY_SECONDS, Quotas
from klein_services.orchestrator.request import REFERENCE_PIXEL_COUNT
from klein_services.orchestrator.tokens import Tenant
from klein_services.runtime.errors import QueueFull, QuotaExceeded
from tests.services.fakes.fake_tensors import reference_file
from tests.services.fakes.orchestrator_suite import FakeSuite
from tests.services.fakes.runtime_toy import until
from tests.services.fakes.tenants import TOKEN, bearer, make, refused, tokens_toml

IMAGE = 64 * 64 / 1e6
"""Megapixels of an image of the fake suite's default size."""


class Clock:
    """Seconds that a test moves on."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def quotas_of(suite):
    return suite.orchestrator.generator.quotas


def shown_in_flight(name):
    """The metric of a tenant's requests in flight; `None` when it has no series."""
    return REGISTRY.get_sample_value("klein_usage_requests_in_flight", {"caller": name})


def left(suite):
    """Megapixels in acme's bucket."""
    return quotas_of(suite)._accounts["acme"].megapixels


def charge_or_refusal(quotas, tenant, megapixels):
    try:
        return quotas.charge(tenant, megapixels)
    except QuotaExceeded as refusal:
        return refusal


def stopped_clock(suite):
    """Gives a running suite quotas whose clock only the test moves."""
    clock = Clock()
    suite.orchestrator.generator.quotas = Quotas(clock)
    return clock


@settings(max_examples=200, deadline=None)
@given(
    rate=st.floats(0.01, 1000),
    requests=st.lists(
        st.tuples(st.floats(0, 90), st.floats(0.0001, 1.2), st.floats(0, 1)), min_size=1, max_size=60
    ),
)
def test_no_minute_has_more_than_the_quota_and_a_full_bucket(rate, requests):
    """Requests are (seconds since the last, share of the quota asked for, share of that used)."""
    clock = Clock()
    quotas, tenant = Quotas(clock), Tenant(name="acme", megapixels_per_minute=rate)
    kept: list[tuple[float, float]] = []
    for pause, asked_share, used_share in requests:
        clock.now += pause
        asked = asked_share * rate
        charge = charge_or_refusal(quotas, tenant, asked)
        if isinstance(charge, QuotaExceeded):
            assert (charge.retry_after_seconds is None) == (asked > rate)
            continue
        charge.settle(asked * used_share)
        charge.settle(0)
        kept.append((clock.now, asked * used_share))
    for begin, _ in kept:
        within = sum(used for moment, used in kept if begin <= moment < begin + 60)
        assert within <= 2 * rate * (1 + 1e-9)


@settings(max_examples=200, deadline=None)
@given(
    rate=st.floats(0.001, 1e6),
    taken=st.lists(st.floats(0, 1), max_size=5),
    asked_share=st.floats(0.0001, 1),
    early=st.floats(0.01, 0.95),
)
def test_a_client_that_waits_as_asked_is_accepted_and_one_that_comes_much_earlier_is_not(
    rate, taken, asked_share, early
):
    clock = Clock()
    quotas, tenant = Quotas(clock), Tenant(name="acme", megapixels_per_minute=rate)
    for share in taken:
        charge_or_refusal(quotas, tenant, share * rate)
    refusal = charge_or_refusal(quotas, tenant, asked_share * rate)
    if isinstance(refusal, QuotaExceeded):
        wait = refusal.retry_after_seconds
        assert 0 < wait <= 60.01
        if wait > 1:
            clock.now += wait * early
            with pytest.raises(QuotaExceeded):
                quotas.charge(tenant, asked_share * rate)
            clock.now -= wait * early
        # A client reads nanoseconds, cut off.
        clock.now += int(wait * 1e9) / 1e9
        quotas.charge(tenant, asked_share * rate)


def test_a_request_that_takes_the_last_megapixel_passes_and_the_next_waits_for_its_own():
    clock = Clock()
    quotas, tenant = Quotas(clock), Tenant(name="acme", megapixels_per_minute=6.0)
    for _ in range(3):
        quotas.charge(tenant, 2.0)
    with pytest.raises(
        QuotaExceeded, match=r"may take 1 megapixels.*; 0 are left of the 6 a minute"
    ) as raised:
        quotas.charge(tenant, 1.0)
    assert raised.value.retry_after_seconds == pytest.approx(10, abs=0.01)
    other = Tenant(name="other", megapixels_per_minute=6.0)
    quotas.charge(other, 6.0)


def test_a_request_above_the_quota_can_never_pass():
    quotas, tenant = Quotas(Clock()), Tenant(name="acme", megapixels_per_minute=2.0)
    with pytest.raises(
        QuotaExceeded, match=r"may take 2.1 megapixels.*; this token allows 2 a minute$"
    ) as raised:
        quotas.charge(tenant, 2.1)
    assert raised.value.retry_after_seconds is None
    quotas.charge(tenant, 2.0)


def test_a_quota_that_changes_holds_for_the_next_request():
    clock = Clock()
    quotas = Quotas(clock)
    quotas.charge(Tenant(name="acme", megapixels_per_minute=100.0), 10.0)
    with pytest.raises(QuotaExceeded):
        quotas.charge(Tenant(name="acme", megapixels_per_minute=5.0), 6.0)
    quotas.charge(Tenant(name="acme", megapixels_per_minute=5.0), 5.0)


def test_tenants_that_are_gone_are_forgotten_once_idle():
    quotas = Quotas(Clock())
    gone, stays = Tenant(name="gone", requests_in_flight=1), Tenant(name="stays", requests_in_flight=1)
    with quotas.place(gone), quotas.place(stays):
        quotas.forget_all_but({"stays"})
        for tenant in (gone, stays):
            with pytest.raises(QuotaExceeded), quotas.place(tenant):
                pass
        assert (shown_in_flight("gone"), shown_in_flight("stays")) == (1, 1)
    quotas.forget_all_but({"stays"})
    assert quotas._accounts.keys() == {"stays"}
    assert (shown_in_flight("gone"), shown_in_flight("stays")) == (None, 0)


def test_a_reference_counts_at_most_what_the_vae_decoder_makes_of_it():
    assert REFERENCE_PIXEL_COUNT == MODEL_PIXEL_COUNT


async def test_as_many_requests_as_allowed_are_in_flight_and_each_that_ends_gives_its_place_back(tmp_path):
    suite = FakeSuite(settings={"tokens_file": tokens_toml(tmp_path, requests_in_flight=2)})
    async with suite.running():
        gate = suite.denoiser.step_gate = asyncio.Event()
        running = [asyncio.create_task(make(suite, seed=seed)) for seed in range(2)]
        await until(lambda: len(suite.denoiser.specs) == 2)
        assert shown_in_flight("acme") == 2
        details = await refused(suite)
        assert details.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert (details.reason, details.metadata) == ("QUOTA_EXCEEDED", (("quota", "requests_in_flight"),))
        assert details.retry_after_seconds == IN_FLIGHT_RETRY_SECONDS
        assert details.message.startswith("2 requests of this token are in flight; at most 2 may be")
        stream = suite.images.StreamGenerateImage(api.StreamGenerateImageRequest(), metadata=bearer(TOKEN))
        with pytest.raises(grpc.aio.AioRpcError):
            await stream.read()
        # Looking at the models is no request for images.
        await suite.images.ListModels(api.ListModelsRequest(), metadata=bearer(TOKEN))
        running[0].cancel()
        await asyncio.gather(running[0], return_exceptions=True)
        await until(lambda: quotas_of(suite)._accounts["acme"].in_flight == 1)
        third = asyncio.create_task(make(suite, seed=3))
        await until(lambda: len(suite.denoiser.specs) == 3)
        assert (await refused(suite)).reason == "QUOTA_EXCEEDED"
        gate.set()
        assert (await running[1]).images
        assert (await third).images
        assert (await refused(suite, step_count=-1)).code is grpc.StatusCode.INVALID_ARGUMENT
        assert quotas_of(suite)._accounts["acme"].in_flight == 0


async def test_success_is_charged_by_what_was_made_and_refusals_and_faults_are_not(tmp_path):
    suite = FakeSuite(settings={"tokens_file": tokens_toml(tmp_path, megapixels_per_minute=10.0)})
    async with suite.running():
        stopped_clock(suite)
        await make(suite, image_count=2)
        assert left(suite) == pytest.approx(10 - 2 * IMAGE)
        # It may take 1.05 megapixels of input and 4.2 of output, and takes as many as the vae-decoder makes of it.
        await make(suite, references=[reference_file(96, 64)])
        assert left(suite) == pytest.approx(10 - 2 * IMAGE - 2 * 96 * 64 / 1e6)
        await make(suite, references=[reference_file(96, 64)], width_px=64, height_px=64)
        expected = 10 - 3 * IMAGE - 3 * 96 * 64 / 1e6
        assert left(suite) == pytest.approx(expected)
        await refused(suite, step_count=-1)
        await refused(suite, model="nothing")
        for error, code in (
            (QueueFull(3), grpc.StatusCode.RESOURCE_EXHAUSTED),
            (ValueError("broken"), grpc.StatusCode.INTERNAL),
            (InvalidInput.of("prompt", "is no good"), grpc.StatusCode.INVALID_ARGUMENT),
        ):
            suite.denoiser.error = error
            assert (await refused(suite)).code is code
        assert left(suite) == pytest.approx(expected)


async def test_a_request_that_its_client_cancels_is_charged_by_what_was_begun(tmp_path):
    suite = FakeSuite(settings={"tokens_file": tokens_toml(tmp_path, megapixels_per_minute=10.0)})
    async with suite.running():
        stopped_clock(suite)
        suite.denoiser.step_gate = asyncio.Event()
        for spec, charged in (
            ({"image_count": 2}, 2 * IMAGE),
            ({"references": [reference_file(96, 64)]}, 2 * 96 * 64 / 1e6),
        ):
            before = left(suite) if suite.denoiser.specs else 10.0
            suite.denoiser.first_frame.clear()
            running = asyncio.create_task(make(suite, **spec))
            await until(suite.denoiser.first_frame.is_set)
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
            await until(lambda: quotas_of(suite)._accounts["acme"].in_flight == 0)
            assert left(suite) == pytest.approx(before - charged)


async def test_the_quota_refuses_before_any_stage_is_asked_and_obeying_the_delay_is_enough(tmp_path):
    suite = FakeSuite(settings={"tokens_file": tokens_toml(tmp_path, megapixels_per_minute=2 * IMAGE)})
    async with suite.running():
        clock = stopped_clock(suite)
        await make(suite)
        await make(suite)
        calls = suite.text_encoder.calls
        details = await refused(suite, prompt="another")
        assert (details.reason, details.metadata) == (
            "QUOTA_EXCEEDED",
            (("quota", "megapixels_per_minute"),),
        )
        assert details.retry_after_seconds == pytest.approx(30, abs=0.01)
        assert suite.text_encoder.calls == calls
        clock.now += details.retry_after_seconds
        assert (await make(suite, prompt="another")).images
        details = await refused(suite, width_px=1024, height_px=2048)
        assert (details.reason, details.retry_after_seconds) == ("QUOTA_EXCEEDED", None)
