"""Settings: precedence, refusals that name what is wrong, and the table of --check-config."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path

import pytest

from klein_core.checkpoint.files import ModelFiles
from klein_core.pico import WEIGHTS
from klein_services.denoiser.settings import DenoiserSettings
from klein_services.orchestrator.settings import OrchestratorSettings
from klein_services.runtime.settings import (
    ServerSettings,
    SettingsError,
    load_settings,
    setting,
    variable_name,
)
from klein_services.runtime.settings_report import describe, misspelled
from klein_services.runtime.stage_settings import StageSettings
from klein_services.text_encoder.settings import TextEncoderSettings
from klein_services.vae_decoder.settings import VaeDecoderSettings


@dataclass(frozen=True, kw_only=True)
class Sample(ServerSettings):
    is_fast: bool = setting(False, help="Whether it is fast")
    ratio: float = setting(0.5, help="A ratio", minimum=0, maximum=1)


def test_an_override_wins_over_the_environment_which_wins_over_the_default():
    environment = {"KLEIN_PORT": "1", "KLEIN_RATIO": "0.25", "KLEIN_LOG_LEVEL": ""}
    loaded = load_settings(Sample, environment, {"port": "2", "ratio": None})
    assert (loaded.settings.port, loaded.settings.ratio, loaded.settings.log_level) == (2, 0.25, "info")
    sources = [loaded.sources[name] for name in ("port", "ratio", "log_level")]
    assert sources == ["--port", "KLEIN_RATIO", "default"]


@pytest.mark.parametrize(
    ("name", "value", "parts"),
    [
        ("PORT", "many", ["KLEIN_PORT", "'many'", "whole number"]),
        ("PORT", "65536", ["KLEIN_PORT", "65536", "at most 65535"]),
        ("PORT", "-1", ["KLEIN_PORT", "-1", "at least 0"]),
        ("PORT", "1.5", ["KLEIN_PORT", "1.5", "whole number"]),
        ("RATIO", "nan", ["KLEIN_RATIO", "nan", "at most 1"]),
        ("IS_FAST", "maybe", ["KLEIN_IS_FAST", "maybe", "true or false"]),
        ("LOG_LEVEL", "loud", ["KLEIN_LOG_LEVEL", "loud", "debug, info, warning, error"]),
    ],
)
def test_a_bad_value_names_the_variable_the_value_and_the_limit(name, value, parts):
    with pytest.raises(SettingsError) as raised:
        load_settings(Sample, {f"KLEIN_{name}": value})
    assert all(part in str(raised.value) for part in parts)


def test_a_bad_flag_is_named_as_a_flag():
    with pytest.raises(SettingsError, match="--queue-limit is '0'; it must be at least 1"):
        load_settings(Sample, {}, {"queue_limit": "0"})


def test_a_service_link_of_kubernetes_is_told_from_a_setting():
    with pytest.raises(SettingsError, match="enableServiceLinks"):
        load_settings(Sample, {"KLEIN_PORT": "tcp://10.0.0.7:50051"})


def test_a_misspelled_variable_is_named_with_the_one_that_is_read():
    environment = {
        "KLEIN_QUEUE_LIMT": "8",
        "KLEIN_RATIO": "1",
        "KLEIN_ROUTING_TABLE": "x",
        "QUEUE_LIMIT": "8",
    }
    [sentence] = misspelled(Sample, environment)
    assert sentence.startswith("KLEIN_QUEUE_LIMT is no setting")
    assert "KLEIN_QUEUE_LIMIT is one" in sentence


def test_no_stage_takes_another_stages_setting_for_a_misspelled_one():
    classes = (TextEncoderSettings, DenoiserSettings, VaeDecoderSettings, OrchestratorSettings)
    everything = {variable_name(field.name): "1" for each in classes for field in fields(each)}
    assert [misspelled(each, everything) for each in classes] == [[], [], [], []]


def test_an_override_that_is_no_setting_is_refused():
    with pytest.raises(SettingsError, match="prot"):
        load_settings(Sample, {}, {"prot": 1})


@pytest.mark.parametrize("text", ["1", "true", "YES", "on"])
def test_booleans_are_read_from_words(text):
    assert load_settings(Sample, {"KLEIN_IS_FAST": text}).settings.is_fast is True


def test_the_table_has_every_setting_with_its_value_source_and_help():
    table = describe(load_settings(Sample, {"KLEIN_RATIO": "0.125"})).splitlines()
    line = next(line for line in table if line.startswith("KLEIN_RATIO"))
    assert "0.125" in line
    assert line.count("KLEIN_RATIO") == 2
    assert "A ratio (at least 0 and at most 1)" in line
    assert len(table) == len(fields(Sample))


def test_the_table_writes_large_numbers_out():
    table = describe(load_settings(OrchestratorSettings, {"KLEIN_MAXIMUM_REQUEST_SECONDS": "12345.5"}))
    for number in ("20971520", "67108864", "268435456", "12345.5", "86400"):
        assert f" {number}" in table
    assert "e+" not in table


def test_the_model_is_named_after_its_folder_unless_it_is_named():
    assert StageSettings().model_name == "pico"
    assert StageSettings(model_path="/models/klein-4b/").model_name == "klein-4b"
    assert StageSettings(model_path="/models/klein-4b", model_name="mine").model_name == "mine"
    assert StageSettings(model_path="/models/klein-4.5b.safetensors").model_name == "klein-4.5b"
    assert StageSettings(weights_path="/models/mine.safetensors").model_name == "mine"


def test_a_part_of_its_own_is_no_part_of_the_embedded_model():
    alone = StageSettings(weights_path="t.safetensors", variant="klein-4b").model_files("transformer")
    assert alone == ModelFiles(transformer=Path("t.safetensors"), variant="klein-4b")
    both = StageSettings(model_path="model", weights_path="v.safetensors").model_files("vae")
    assert both == ModelFiles(model=Path("model"), vae=Path("v.safetensors"))
    assert StageSettings().model_files("vae") == ModelFiles(model=WEIGHTS)
    settings = TextEncoderSettings(weights_path="q.safetensors", tokenizer_path="words")
    assert settings.model_files("text_encoder").tokenizer_folder == Path("words")


def test_stages_have_ports_of_their_own():
    assert (TextEncoderSettings().port, VaeDecoderSettings().port) == (50051, 50053)


@contextmanager
def as_nobody() -> Iterator[int]:
    """Yields the uid of a user who owns no file, when the tests run as root; else their own uid."""
    uid = os.geteuid()
    if uid == 0:
        os.seteuid(65534)
    try:
        yield os.geteuid()
    finally:
        os.seteuid(uid)


@pytest.mark.parametrize("below", ["", "transformer"], ids=["itself", "its parent"])
def test_a_model_that_may_not_be_read_is_refused_with_the_uid(below: str):
    with tempfile.TemporaryDirectory() as private:
        os.chmod(private, 0)
        place = str(Path(private, below))
        try:
            with as_nobody() as uid:
                problems = list(StageSettings(model_path=place).problems())
        finally:
            os.chmod(private, 0o700)
    assert problems == [
        f"KLEIN_MODEL_PATH is {place!r}; uid {uid} may not read it: change its owner or mode, or run as another user"
    ]


def test_a_model_file_that_may_not_be_read_is_refused():
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        weights = Path(folder, "model.safetensors")
        weights.touch(mode=0)
        with as_nobody():
            (problem,) = StageSettings(weights_path=str(weights)).problems()
    assert problem.startswith(f"KLEIN_WEIGHTS_PATH is '{weights}'; uid ")
