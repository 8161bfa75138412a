"""Routing tables: what a good one gives, and every problem of a bad one at once."""

from __future__ import annotations

import pytest

from klein_services.orchestrator.__main__ import main
from klein_services.orchestrator.routing import RoutingError, read_routing_table, single_route_table
from klein_services.orchestrator.settings import OrchestratorSettings
from klein_services.runtime.errors import UnknownModel
from klein_services.runtime.settings import load_settings

GOOD = """
default_model = "klein-4b"

[models.klein-4b]
text_encoder = "dns:///text-encoder:50051"
denoiser = "dns:///denoiser-4b:50052"
vae_decoder = "dns:///vae-decoder:50053"

[models.klein-base-4b]
text_encoder = "dns:///text-encoder:50051"
text_encoder_model = "klein-4b"
denoiser = "dns:///denoiser-base-4b:50052"
vae_decoder = "dns:///vae-decoder:50053"
vae_decoder_model = "klein-4b"
default_size_px = 512
maximum_pixel_count = 1048576
"""

BAD = """
default_model = "nobody"
modles = 1

[models.a]
text_encoder = 50051
denoiser = ""
vae_decoder_model = 7
default_size_px = 100
maximum_pixel_count = true

[models.b]
text_encoder = "t:1"
denoiser = "d:1"
vae_decoder = "v:1"
denoiser_modle = "x"
default_size_px = 1024
maximum_pixel_count = 65536
"""


def table(tmp_path, text):
    path = tmp_path / "routing.toml"
    path.write_text(text)
    return read_routing_table(path)


def test_a_good_table(tmp_path):
    routes = table(tmp_path, GOOD)
    assert routes.default_model == "klein-4b"
    assert routes.route("") is routes.routes["klein-4b"]
    base = routes.route("klein-base-4b")
    assert base.text_encoder == routes.route("klein-4b").text_encoder
    assert [address.model for address in base.stages] == ["klein-4b", "klein-base-4b", "klein-4b"]
    assert (base.default_size_px, base.maximum_pixel_count) == (512, 1048576)
    with pytest.raises(UnknownModel, match="klein-9b"):
        routes.route("klein-9b")


def test_a_table_of_one_model_needs_no_default(tmp_path):
    text = '[models.only]\ntext_encoder = "t:1"\ndenoiser = "d:1"\nvae_decoder = "v:1"\n'
    assert table(tmp_path, text).default_model == "only"


def test_every_problem_is_named_at_once(tmp_path):
    with pytest.raises(RoutingError) as caught:
        table(tmp_path, BAD)
    keys = [problem.split(" ")[0] for problem in caught.value.problems]
    assert keys == [
        "modles",
        "models.a.text_encoder",
        "models.a.denoiser",
        "models.a.vae_decoder",
        "models.a.vae_decoder_model",
        "models.a.default_size_px",
        "models.a.maximum_pixel_count",
        "models.b.denoiser_modle",
        "models.b.default_size_px",
        "default_model",
    ]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "models is missing"),
        ("models = 3", "models is missing"),
        ("models.a = 3", "models.a must be a table"),
        ("not toml", "is not TOML"),
    ],
)
def test_a_table_that_is_none(tmp_path, text, words):
    with pytest.raises(RoutingError, match=words):
        table(tmp_path, text)


def test_several_models_need_a_default(tmp_path):
    text = GOOD.replace('default_model = "klein-4b"', "")
    with pytest.raises(RoutingError, match="default_model is missing; choose one of klein-4b, klein-base-4b"):
        table(tmp_path, text)


def test_settings_make_a_table_of_one_model():
    environment = {
        "KLEIN_MODEL_NAME": "klein-4b",
        "KLEIN_DENOISER_TARGET": "d:9",
        "KLEIN_DEFAULT_SIZE_PX": "512",
    }
    route = load_settings(OrchestratorSettings, environment).settings.table().route("")
    assert (route.name, route.denoiser.target, route.default_size_px) == ("klein-4b", "d:9", 512)
    assert {address.model for address in route.stages} == {"klein-4b"}
    with pytest.raises(RoutingError, match="default_size_px is 100"):
        single_route_table("m", "t:1", "d:1", "v:1", 100, 4194304)


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"KLEIN_ROUTING_TABLE": "/nowhere/r.toml"}, "KLEIN_ROUTING_TABLE: /nowhere/r.toml: cannot be read"),
        ({"KLEIN_PORT": "many"}, "KLEIN_PORT"),
        ({"KLEIN_MAXIMUM_REFERENCE_COUNT": "11"}, "KLEIN_MAXIMUM_REFERENCE_COUNT"),
    ],
)
def test_a_bad_setting_stops_the_start_with_one_sentence(environment, words, capsys):
    assert main(environment, {}) == 2
    error = capsys.readouterr().err
    assert words in error
    assert "Traceback" not in error
