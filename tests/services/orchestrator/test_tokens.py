"""Bearer tokens of the public API: their file, who is refused how, models, reload, rotation, and their secrecy."""

import asyncio
import io
import logging
import os
import tomllib

import grpc
import pytest
from grpc_channelz.v1 import channelz_pb2, channelz_pb2_grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from prometheus_client import REGISTRY

from klein_api.v1 import image_service_pb2 as api
from klein_services.orchestrator import authentication
from klein_services.orchestrator.settings import OrchestratorSettings
from klein_services.orchestrator.tokens import (
    MAXIMUM_TENANTS,
    Tenant,
    TokensError,
    new_token,
    parse_tokens,
    tenant_table,
    token_hash,
)
from klein_services.runtime import interceptors, logs
from klein_services.runtime.logs import ConsoleFormatter, JsonFormatter
from klein_services.runtime.settings import load_settings
from tests.services.fakes.fake_stages import MODEL
from tests.services.fakes.orchestrator_suite import FakeSuite
from tests.services.fakes.runtime_toy import failure, until
from tests.services.fakes.tenants import TOKEN, bearer, make, refused

ACME, OTHER = TOKEN, new_token()
FILE = tenant_table(Tenant(name="acme"), ACME)


@pytest.fixture
def tokens_file(tmp_path, monkeypatch):
    monkeypatch.setattr(authentication, "RELOAD_SECONDS", 0.02)
    path = tmp_path / "tokens.toml"
    path.write_text(FILE)
    return path


@pytest.fixture
async def suite(tokens_file):
    async with FakeSuite(settings={"tokens_file": str(tokens_file)}).running() as running:
        yield running


def problems_of(text):
    with pytest.raises(TokensError) as raised:
        parse_tokens(text.encode(), "tokens.toml")
    return raised.value.problems


def metric(name, **labels):
    return REGISTRY.get_sample_value(name, labels) or 0.0


async def test_every_stage_gets_the_callers_name_and_weight_and_never_the_token(tokens_file, caplog):
    caplog.set_level(logging.INFO)
    tokens_file.write_text(tenant_table(Tenant(name="acme", weight=2.5), ACME))
    async with FakeSuite(settings={"tokens_file": str(tokens_file)}).running() as suite:
        response = await make(suite, (*bearer(ACME), ("klein-caller", "other"), ("klein-weight", "9")))
        assert len(response.images) == 1
        for stage in suite.stages:
            (metadata,) = stage.metadata
            assert (metadata["klein-caller"], metadata["klein-weight"]) == ("acme", "2.500000")
            assert "authorization" not in metadata
    callers = {r.method.rpartition("/")[2]: r.caller for r in caplog.records if r.name == "klein.access"}
    assert callers.keys() >= {"GenerateImage", "EncodePrompt", "DenoiseLatents", "DecodeLatents"}
    assert set(callers.values()) == {"acme"}


@pytest.mark.parametrize(
    "metadata",
    [
        (),
        bearer(OTHER),
        bearer(ACME[:-1]),
        bearer(""),
        bearer(ACME, "Basic"),
        (("authorization", ACME),),
        (*bearer(ACME), *bearer(ACME)),
        (("authorization", ""),),
        (("x-authorization", f"Bearer {ACME}"),),
        bearer("x" * 4000),
        (("klein-caller", "acme"), ("klein-weight", "1")),
    ],
)
async def test_every_call_without_a_known_token_has_the_same_answer(suite, metadata):
    details = await refused(suite, metadata)
    assert details.code is grpc.StatusCode.UNAUTHENTICATED
    assert (details.reason, details.metadata, details.violations) == ("UNAUTHENTICATED", (), ())
    assert details.message == "this server needs a valid token in the metadata 'authorization: Bearer TOKEN'"


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER"])
async def test_the_scheme_is_read_in_any_case(suite, scheme):
    assert (await make(suite, bearer(ACME, scheme))).images


async def test_all_methods_but_health_need_a_token_and_channelz_is_closed(suite):
    stubs = {
        "stream": suite.images.StreamGenerateImage(api.StreamGenerateImageRequest()).read(),
        "models": suite.images.ListModels(api.ListModelsRequest()),
    }
    for call in stubs.values():
        assert (await failure(call)).code() is grpc.StatusCode.UNAUTHENTICATED
    reflection = reflection_pb2_grpc.ServerReflectionStub(suite.channel)
    question = reflection_pb2.ServerReflectionRequest(list_services="")
    refusal = await failure(reflection.ServerReflectionInfo(iter([question])).read())
    assert refusal.code() is grpc.StatusCode.UNAUTHENTICATED
    answer = await reflection.ServerReflectionInfo(iter([question]), metadata=bearer(ACME)).read()
    assert answer.list_services_response.service
    channelz = channelz_pb2_grpc.ChannelzStub(suite.channel)
    for metadata, code in (
        ((), grpc.StatusCode.UNAUTHENTICATED),
        (bearer(ACME), grpc.StatusCode.PERMISSION_DENIED),
    ):
        error = await failure(channelz.GetServers(channelz_pb2.GetServersRequest(), metadata=metadata))
        assert error.code() is code
    health = health_pb2_grpc.HealthStub(suite.channel)
    assert (await health.Check(health_pb2.HealthCheckRequest())).status


async def test_the_message_of_a_refused_call_is_not_received(tokens_file):
    settings = {"tokens_file": str(tokens_file), "maximum_reference_bytes": 1024}
    async with FakeSuite(settings=settings).running() as suite:
        too_large = {"references": [bytes(8 << 20)]}
        details = await refused(suite, bearer(ACME), **too_large)
        assert "larger than max" in details.message
        # The same message without a token: nothing of it is read, so its length is not noticed.
        assert (await refused(suite, (), **too_large)).code is grpc.StatusCode.UNAUTHENTICATED
        call = suite.images.StreamGenerateImage(
            api.StreamGenerateImageRequest(spec=api.ImageSpec(**too_large))
        )
        assert (await failure(call.read())).code() is grpc.StatusCode.UNAUTHENTICATED


async def test_refusals_are_counted_and_one_line_of_the_log(suite, caplog, monkeypatch):
    caplog.set_level(logging.INFO)
    warning = logs.RareWarning(logging.getLogger("klein.access"), "refused")
    monkeypatch.setattr(interceptors, "_unauthenticated", warning)
    labels = {"stage": "orchestrator", "reason": "unauthenticated"}
    before = metric("klein_request_rejected_total", **labels)
    for _ in range(20):
        await refused(suite, ())
    assert metric("klein_request_rejected_total", **labels) == before + 20
    assert [r.getMessage() for r in caplog.records if r.name == "klein.access"] == ["refused"]


async def test_a_tenant_sees_and_uses_only_its_models(tokens_file):
    token, locked = new_token(), new_token()
    tokens_file.write_text(
        FILE
        + tenant_table(Tenant(name="small", models=("later", MODEL)), token)
        + tenant_table(Tenant(name="locked", models=("later",)), locked)
    )
    async with FakeSuite(settings={"tokens_file": str(tokens_file)}).running() as suite:
        listed = await suite.images.ListModels(api.ListModelsRequest(), metadata=bearer(token))
        assert ([model.name for model in listed.models], listed.default_model) == ([MODEL], MODEL)
        assert (await make(suite, bearer(token))).summary.model == MODEL
        # A model that is routed and one that is not have the same answer.
        listed = await suite.images.ListModels(api.ListModelsRequest(), metadata=bearer(locked))
        assert (list(listed.models), listed.default_model) == ([], "later")
        for name in (MODEL, "nothing"):
            details = await refused(suite, bearer(locked), model=name)
            assert details.code is grpc.StatusCode.PERMISSION_DENIED
            assert details.reason == "MODEL_NOT_ALLOWED"
            assert details.message == f"model: this token does not allow {name!r}; it allows later"
        # Allowed and not routed, or no model at all: nothing of other tenants' models is named.
        for name in ("later", ""):
            details = await refused(suite, bearer(locked), model=name)
            assert details.code is grpc.StatusCode.NOT_FOUND
            assert MODEL not in details.message
        details = await refused(suite, bearer(ACME), model="nothing")
        assert details.code is grpc.StatusCode.NOT_FOUND


async def test_a_changed_file_is_read_and_a_broken_one_keeps_the_last(suite, tokens_file, caplog):
    rotated = new_token()
    failed = metric("klein_tokens_reloads_total", outcome="failed")
    both = FILE.replace(
        f'"{token_hash(ACME).hex()}"', f'["{token_hash(ACME).hex()}", "{token_hash(rotated).hex()}"]'
    )
    tokens_file.write_text(both)
    await until(lambda: suite.orchestrator.guard.tokens.tenant_of(rotated))
    assert (await make(suite, bearer(ACME))).images
    assert (await make(suite, bearer(rotated))).images
    tokens_file.write_text(f"{both}\nweight = '{rotated}'\n[")
    await until(lambda: metric("klein_tokens_reloads_total", outcome="failed") == failed + 1)
    assert metric("klein_tokens_current") == 0
    assert "the tokens stay as they were" in caplog.text
    assert rotated not in caplog.text
    assert (await make(suite, bearer(rotated))).images
    tokens_file.unlink()
    await until(lambda: metric("klein_tokens_reloads_total", outcome="failed") == failed + 2)
    assert (await make(suite, bearer(rotated))).images
    replacement = tokens_file.with_suffix(".new")
    replacement.write_text(tenant_table(Tenant(name="acme"), rotated))
    os.replace(replacement, tokens_file)
    await until(lambda: suite.orchestrator.guard.tokens.tenant_of(ACME) is None)
    assert metric("klein_tokens_current") == 1
    assert (await refused(suite, bearer(ACME))).code is grpc.StatusCode.UNAUTHENTICATED
    assert (await make(suite, bearer(rotated))).images


async def test_a_running_request_outlives_the_revocation_of_its_token(suite, tokens_file):
    gate = suite.denoiser.step_gate = asyncio.Event()
    running = asyncio.create_task(make(suite, bearer(ACME)))
    await until(lambda: suite.denoiser.calls)
    tokens_file.write_text(tenant_table(Tenant(name="other"), OTHER))
    await until(lambda: suite.orchestrator.guard.tokens.tenant_of(OTHER))
    gate.set()
    assert (await running).images


async def test_no_log_line_at_any_level_has_a_token(suite, tokens_file):
    written = io.StringIO()
    handlers = [logging.StreamHandler(written) for _ in range(2)]
    root, level = logging.getLogger(), logging.getLogger().level
    for handler, formatter in zip(handlers, (JsonFormatter(), ConsoleFormatter()), strict=True):
        handler.setFormatter(formatter)
        root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    try:
        await make(suite, bearer(ACME))
        await refused(suite, bearer(OTHER))
        await refused(suite, bearer(ACME), model="nothing")
        await refused(suite, bearer(ACME), step_count=-1)
        suite.text_encoder.error = ValueError("broken")
        await refused(suite, bearer(ACME), negative_prompt="x", seed=1)
        tokens_file.write_text(f'[tokens.{ACME}]\nsha256 = "{ACME}"\nweight = "{ACME}"\n"{OTHER}" = 1\n')
        await until(lambda: "the tokens stay as they were" in written.getvalue())
    finally:
        root.setLevel(level)
        for handler in handlers:
            root.removeHandler(handler)
    text = written.getvalue()
    assert "caller" in text
    assert "acme" in text
    for token in (ACME, OTHER):
        assert token not in text
        assert token_hash(token).hex() not in text


async def test_without_a_tokens_file_callers_are_their_addresses(caplog):
    caplog.set_level(logging.INFO)
    async with FakeSuite().running() as suite:
        await make(suite, (("klein-caller", "acme"), *bearer(ACME)))
        await until(lambda: any(r.name == "klein.access" for r in caplog.records))
    callers = {r.method.rpartition("/")[2]: r.caller for r in caplog.records if r.name == "klein.access"}
    assert callers["GenerateImage"] == "127.0.0.1"
    assert set(callers.values()) == {"127.0.0.1"}


def test_a_new_token_is_found_by_its_hash_and_its_table_reads_back_whole():
    tenant = Tenant(
        name="a.b-c_1",
        weight=0.25,
        requests_in_flight=3,
        megapixels_per_minute=1.5,
        models=("klein 4b", 'o"dd\\', "é"),
    )
    token = new_token()
    tokens = parse_tokens(tenant_table(tenant, token).encode(), "tokens.toml")
    assert tokens.tenant_of(token) == tenant
    assert tokens.tenant_of(new_token()) is None
    assert tokens.tenant_of("") is None
    assert len(token) == len("klein_") + 43
    assert token not in tenant_table(tenant, token)


def test_every_problem_of_a_file_is_named_and_no_value_is():
    secret = "klein_this-is-secret"
    text = f"""
        other = 1
        [tokens.acme]
        sha256 = "{secret}"
        weight = 0
        requests_in_flight = true
        megapixels_per_minute = nan
        models = []
        quota = "{secret}"
        [tokens."-bad name"]
        sha256 = ["{"0" * 64}", "{"1" * 64}", "{"2" * 64}"]
        weight = "{secret}"
        [tokens.twice]
        sha256 = "{"A" * 64}"
        models = ["x", "x"]
        [tokens.again]
        sha256 = "{"a" * 64}"
    """
    found = "\n".join(problems_of(text))
    for part in (
        "other is unknown",
        "tokens.acme.sha256 must be",
        "tokens.acme.weight must be",
        "tokens.acme.requests_in_flight must be",
        "tokens.acme.megapixels_per_minute must be",
        "tokens.acme.models must be",
        "tokens.acme.quota is unknown",
        "tokens.-bad name: a name must be",
        "tokens.-bad name.sha256 must be",
        "tokens.-bad name.weight must be",
        "tokens.twice.models must be",
        "tokens.again.sha256 is a hash of twice, too",
    ):
        assert part in found
    assert secret not in found


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "there is no table"),
        ("tokens = 3", "there is no table"),
        ("[tokens]\nacme = 3", "tokens.acme must be a table"),
        ("[tokens", "is not TOML"),
        ("x = " + "[" * 100_000, "nested too deeply"),
        ("x = " + "9" * 5000, "is not TOML"),
        ("#" * (1 << 20) + "#", "larger than 1048576 bytes"),
        ("\n".join(f"[tokens.a{i}]" for i in range(MAXIMUM_TENANTS + 1)), "at most 1000 are allowed"),
    ],
)
def test_a_file_of_another_kind_is_refused_with_the_reason(text, problem):
    assert problem in problems_of(text)[0]


def test_as_many_tenants_as_allowed_are_read():
    rows = [tenant_table(Tenant(name=f"t{i}"), str(i)) for i in range(MAXIMUM_TENANTS)]
    tokens = parse_tokens("\n".join(rows).encode(), "tokens.toml")
    assert len(tokens.names) == MAXIMUM_TENANTS
    assert tokens.tenant_of("999").name == "t999"


def test_a_file_that_is_missing_or_not_text_stops_the_start(tmp_path):
    settings = load_settings(
        OrchestratorSettings, {"KLEIN_TOKENS_FILE": str(tmp_path / "none.toml")}
    ).settings
    (problem,) = settings.problems()
    assert problem.startswith("KLEIN_TOKENS_FILE: ")
    assert "none.toml: cannot be read: No such file" in problem
    with pytest.raises(TokensError, match="is not UTF-8"):
        parse_tokens(b"\xff\xfe", "tokens.toml")


def test_the_table_that_is_printed_is_plain_toml():
    document = tomllib.loads(tenant_table(Tenant(name="acme"), ACME))
    assert document == {"tokens": {"acme": {"sha256": token_hash(ACME).hex()}}}
