"""What names mean to `klein pull` and `klein up`, without any hub."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from klein_core.model_registry import PUBLISHED_MODELS, SMALL_DECODER
from klein_services.cli.app import app
from klein_services.cli.errors import CliError
from klein_services.cli.hub.catalog import choose
from klein_services.cli.hub.download import ModelDownload
from klein_services.cli.hub.selection import weight_source
from klein_services.cli.model_store import (
    RECEIPT,
    default_folder,
    find_model,
    models_folder,
    pulled_folder,
)
from klein_services.cli.output import file_size


@pytest.mark.parametrize("row", PUBLISHED_MODELS.values(), ids=lambda row: row.name)
def test_each_row_is_found_by_its_name_its_repositories_and_its_folders_name(row):
    for identifier in (row.name, row.name.upper(), row.repository, row.repository.lower()):
        assert choose(identifier).repositories == (row.repository,)
    for precision, file in row.quantized.items():
        choice = choose(row.name, precision)
        assert choice.repositories == (row.repository, file.repository)
        for identifier in (f"{row.name}-{precision}", file.repository):
            assert choose(identifier) == choose(identifier, precision) == choice
    with_decoder = choose(row.name, small_decoder=True)
    assert with_decoder.repositories == (row.repository, SMALL_DECODER.repository)
    assert choose(with_decoder.name) == with_decoder


def test_any_other_repository_is_taken_as_it_is():
    choice = choose("someone/My.Model_2")
    assert (choice.repositories, choice.name, choice.variant) == (
        ("someone/My.Model_2",),
        "someone--My.Model_2",
        None,
    )


@pytest.mark.parametrize(
    ("identifier", "precision", "words"),
    [
        ("klein4b", None, "Did you mean klein-4b"),
        ("", None, "not a known model"),
        ("a/b/c", None, "not a known model"),
        ("../b", None, "not a known model"),
        ("-/b", None, "not a known model"),
        ("klein-9b-kv", "nvfp4", "not published as nvfp4"),
        ("klein-4b-fp8", "nvfp4", "is fp8, not nvfp4"),
        ("someone/model", "fp8", "--precision fp8 is for known models"),
        ("small-decoder", None, "--small-decoder"),
        (SMALL_DECODER.repository, None, "--small-decoder"),
    ],
)
def test_what_names_no_model_is_refused(identifier, precision, words):
    with pytest.raises(CliError) as caught:
        choose(identifier, precision)
    assert words in str(caught.value)
    assert caught.value.exit_code == 2


def test_an_unknown_name_lists_the_known():
    with pytest.raises(CliError) as caught:
        choose("flux")
    assert all(name in caught.value.hint for name in PUBLISHED_MODELS)


def test_the_help_that_a_hint_points_to_lists_the_known_names():
    with pytest.raises(CliError, match="klein pull --help"):
        find_model("./nowhere")
    shown = CliRunner().invoke(app, ["pull", "--help"]).output
    assert all(name in shown for name in PUBLISHED_MODELS)


def test_models_have_one_place_that_can_be_chosen(monkeypatch, tmp_path):
    assert models_folder({"KLEIN_MODELS_FOLDER": "/a"}) == Path("/a")
    assert models_folder({"XDG_DATA_HOME": "/data"}) == Path("/data/klein/models")
    assert models_folder({}) == Path.home() / ".local/share/klein/models"
    monkeypatch.setenv("KLEIN_MODELS_FOLDER", str(tmp_path))
    assert default_folder(choose("klein-4b", "fp8")) == tmp_path / "klein-4b-fp8"


def test_only_a_whole_model_is_found_by_its_name(monkeypatch, tmp_path):
    monkeypatch.setenv("KLEIN_MODELS_FOLDER", str(tmp_path))
    assert pulled_folder("klein-4b") is None
    folder = tmp_path / "klein-4b"
    folder.mkdir()
    (folder / "model_index.json").write_text("{}")
    assert pulled_folder("klein-4b") is None
    with pytest.raises(CliError, match="klein pull klein-4b"):
        find_model("klein-4b")
    (folder / RECEIPT).write_text(json.dumps({"model": "klein-4b"}))
    assert pulled_folder("klein-4b") == find_model("Klein-4B") == folder
    assert find_model(PUBLISHED_MODELS["klein-4b"].repository) == folder


def test_a_place_on_disk_goes_before_a_name_and_a_missing_path_is_no_repository(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "klein-4b").mkdir()
    (tmp_path / "klein-base-4b").write_bytes(b"one file")
    assert find_model("klein-4b") == Path("klein-4b")
    assert find_model("klein-base-4b") == Path("klein-base-4b")
    with pytest.raises(CliError, match=r"no folder or file \./klein-9b"):
        find_model("./klein-9b")
    with pytest.raises(CliError, match="someone/model is no folder here and was not pulled"):
        find_model("someone/model")


def test_one_set_of_weights_is_picked_by_the_loaders_rule():
    names = ["vae/a.safetensors", "vae/model.safetensors", "vae/deeper/b.safetensors", "c.safetensors"]
    assert weight_source("o/r", names, "vae") == "vae/model.safetensors"
    assert weight_source("o/r", names, "") == "c.safetensors"
    shards = [f"vae/model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    assert weight_source("o/r", [*shards, "vae/model.safetensors.index.json"], "vae").endswith("index.json")
    with pytest.raises(CliError, match=r"several sets of weights: vae/a\.safetensors, vae/b\.safetensors"):
        weight_source("o/r", ["vae/a.safetensors", "vae/b.safetensors"], "vae")
    with pytest.raises(CliError, match=r"no .*safetensors"):
        weight_source("o/r", shards, "vae")


def test_two_pulls_of_a_model_do_not_write_at_once(tmp_path):
    with ModelDownload(tmp_path / "model"):
        with pytest.raises(CliError, match="Another `klein pull`"):
            ModelDownload(tmp_path / "model").__enter__()
    with ModelDownload(tmp_path / "model"):
        pass


def test_a_mounted_volume_is_not_a_place_for_a_model():
    with pytest.raises(CliError, match="mounted"):
        ModelDownload(Path("/proc")).__enter__()


def test_bytes_are_told_as_people_read_them():
    assert [file_size(count) for count in (0, 999, 7_751_089_152, 18.2e9)] == [
        "0 bytes",
        "999 bytes",
        "7.75 GB",
        "18.2 GB",
    ]
