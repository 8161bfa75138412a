"""The description of a model: pico's agrees with its training, and a file that is wrong is refused by key."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from klein_core.checkpoint.files import ModelFiles
from klein_core.errors import CheckpointError
from klein_core.model_description import FILE_NAME, ModelDescription, read_description
from klein_core.pico import WEIGHTS
from training.pico.words import subject_words
from training.pico.world import COLORS, PLACES, SHAPES, SIZES

GOOD = {
    "description": "Draws cats.",
    "default_size_px": 512,
    "pixel_count": 512 * 512,
    "subject_words": ["cat"],
}


def written(folder: Path, **changes: object) -> Path:
    values = {key: value for key, value in (GOOD | changes).items() if value is not ...}
    (folder / FILE_NAME).write_text(json.dumps(values))
    return folder


def test_picos_description_names_its_world_and_every_word_for_a_shape():
    described = read_description(WEIGHTS)
    assert described is not None
    assert (described.default_size_px, described.pixel_count) == (128, 256 * 256)
    assert described.subject_words == subject_words()
    for word in (*SHAPES, *COLORS, *PLACES, *SIZES):
        assert word in described.description


def test_picos_words_for_shapes_are_those_of_its_captions():
    words = subject_words()
    assert words[:6] == SHAPES
    assert {"donut", "disk", "round shape", "stars", "boxes", "annuluses"} <= set(words)
    # Contained in others.
    assert "love heart" not in words
    assert len(set(words)) == len(words)


def test_a_description_is_read(tmp_path: Path):
    assert read_description(written(tmp_path)) == ModelDescription("Draws cats.", 512, 512 * 512, ("cat",))
    assert read_description(written(tmp_path, subject_words=...)).subject_words == ()


def test_a_model_without_the_file_has_no_description(tmp_path: Path):
    assert read_description(tmp_path) is None
    assert read_description(tmp_path / "model.safetensors") is None
    assert read_description(ModelFiles(transformer=tmp_path)) is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"description": ...}, "missing: description"),
        ({"pixel_count": ...}, "missing: pixel_count"),
        ({"size": 3}, "unknown: size"),
        ({"description": "  "}, "description must be one paragraph"),
        ({"description": "two\nlines"}, "description must be one paragraph"),
        ({"description": "x" * 2001}, "description has 2001 characters; at most 2000"),
        ({"default_size_px": 100}, "default_size_px must be a multiple of 16, at least 64"),
        ({"default_size_px": True}, "default_size_px must be a multiple of 16"),
        ({"default_size_px": 528}, "default_size_px is 528, and its square is over pixel_count, 262144"),
        ({"pixel_count": 0}, r"pixel_count must be an integer in \[4096, 4194304\]"),
        ({"pixel_count": 1e6}, "pixel_count must be an integer"),
        ({"subject_words": "cat"}, "subject_words must be a list"),
        ({"subject_words": ["x"] * 501}, "at most 500"),
        ({"subject_words": ["cat", 3]}, "subject_words must be printable texts"),
        ({"subject_words": ["!"]}, "with a letter or digit"),
        ({"subject_words": ["x" * 65]}, "of 1 to 64 characters"),
    ],
)
def test_a_wrong_key_is_named_with_its_file(tmp_path: Path, changes, words):
    with pytest.raises(CheckpointError, match=words) as caught:
        read_description(written(tmp_path, **changes))
    assert str(tmp_path / FILE_NAME) in str(caught.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"{", "cannot be read as JSON"),
        (b"[" * 30_000, "cannot be read as JSON"),
        (b"\xff", "cannot be read as JSON"),
        (b"[]", "must hold a JSON object"),
        (b" " * 70_000, "is larger than 65536 bytes"),
    ],
)
def test_a_hostile_file_is_refused(tmp_path: Path, content: bytes, words: str):
    (tmp_path / FILE_NAME).write_bytes(content)
    with pytest.raises(CheckpointError, match=words):
        read_description(tmp_path)


def test_a_link_that_leaves_the_folder_is_refused(tmp_path: Path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / FILE_NAME).symlink_to(written(tmp_path) / FILE_NAME)
    with pytest.raises(CheckpointError, match="leaves"):
        read_description(folder)
