"""`klein pull` as its own process against a hub on this machine."""

from __future__ import annotations

import json
import random
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import safetensors.torch

from klein_core.model_registry import PUBLISHED_MODELS, SMALL_DECODER
from klein_core.pipeline import Pipeline
from klein_services.cli.model_store import model_files, require_model
from klein_services.cli.ports import ReservedPort
from klein_services.cli.process import inherited_environment
from tests.services.fakes.hub_server import Hub, Repository, serving
from tests.tiny.checkpoint import save_tiny_checkpoint
from tests.tiny.layouts import bfl_transformer
from tests.tiny.quantized import write_float8
from tests.tiny.vae import tiny_vae

NAME = "klein-4b"
MAIN = PUBLISHED_MODELS[NAME].repository
TRANSFORMER = "transformer/diffusion_pytorch_model.safetensors"
NOISE = {
    "README.md": b"# a card",
    ".gitattributes": b"*.safetensors filter=lfs",
    "teaser.jpg": b"a picture",
    "flux-2-klein-4b.safetensors": b"the transformer again",
    "transformer/diffusion_pytorch_model.fp16.safetensors": b"and again",
    "transformer/diffusion_pytorch_model.bin": b"and as a pickle",
    "text_encoder/generation_config.json": b"{}",
    "onnx/model.onnx": b"another format",
}
"""Files of repositories that this suite does not need."""
CHUNK = 10 * 2**20
"""Bytes that huggingface_hub gathers before it writes them."""


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def official_float8(diffusers: bytes) -> bytes:
    """The same transformer as the official fp8 files have it: BFL's names, the blocks' linears in fp8."""
    tensors = {}
    for name, tensor in bfl_transformer(safetensors.torch.load(diffusers)).items():
        is_quantized = "_blocks." in name and tensor.ndim == 2
        stored = write_float8(tensor).tensors if is_quantized else {"weight": tensor}
        stem, _, kind = name.rpartition(".")
        tensors |= {
            f"{stem}.{kind if suffix == 'weight' else suffix}": value for suffix, value in stored.items()
        }
    return safetensors.torch.save(tensors)


@pytest.fixture(scope="session")
def tiny_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """A whole model whose text encoder ends in layers that nobody needs, in shards of their own."""
    folder = tmp_path_factory.mktemp("published")
    save_tiny_checkpoint(folder, text_encoder={"num_hidden_layers": 8})
    from tests.tiny.text_encoder import tiny_qwen3

    for path in (folder / "text_encoder").glob("*.safetensors"):
        path.unlink()
    tiny_qwen3(num_hidden_layers=8).save_pretrained(folder / "text_encoder", max_shard_size="200KB")
    return files_of(folder)


@pytest.fixture
def hub(tiny_files: dict[str, bytes]) -> Hub:
    hub = Hub()
    hub.repositories[MAIN] = Repository({**tiny_files, **NOISE, "LICENSE.md": b"Apache"})
    return hub


@pytest.fixture
def large(hub: Hub) -> bytes:
    """Content of the transformer's file: more bytes than are written at once."""
    content = random.Random(0).randbytes(CHUNK + 2**20)
    hub.repositories[MAIN].files[TRANSFORMER] = content
    return content


@dataclass
class Result:
    exit_code: int
    out: str
    err: str

    @property
    def said(self) -> str:
        return self.out + self.err


@pytest.fixture
def environment(hub: Hub, tmp_path: Path) -> Iterator[dict[str, str]]:
    with serving(hub) as endpoint:
        own = {
            "HF_ENDPOINT": endpoint,
            "HF_HOME": str(tmp_path / "hf"),
            "HF_TOKEN": "",
            "HF_HUB_OFFLINE": "",
            "KLEIN_MODELS_FOLDER": str(tmp_path / "models"),
            "NO_PROXY": "127.0.0.1,localhost",
            "KLEIN_TRACEBACK": "",
        }
        yield inherited_environment() | own


@pytest.fixture
def start(environment: dict[str, str]) -> Callable[..., subprocess.Popen[str]]:
    def start(*arguments: object, largest_file: int = 0, **changes: str) -> subprocess.Popen[str]:
        def prepare() -> None:
            # A suite that was started in the background ignores SIGINT, and would pass that on.
            signal.signal(signal.SIGINT, signal.default_int_handler)
            if largest_file:
                resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))

        return subprocess.Popen(
            [sys.executable, "-m", "klein_services.cli.main", "pull", *map(str, arguments)],
            env=environment | changes,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=prepare,
        )

    return start


@pytest.fixture
def pull(start: Callable[..., subprocess.Popen[str]]) -> Callable[..., Result]:
    def pull(*arguments: object, **changes: str) -> Result:
        process = start(*arguments, **changes)
        out, err = process.communicate(timeout=240)
        return Result(process.returncode, out, err)

    return pull


@pytest.fixture
def models(tmp_path: Path) -> Path:
    return tmp_path / "models"


def test_a_known_model_is_pulled_with_only_what_is_needed_and_loads(
    pull, hub, models, tiny_files, monkeypatch
):
    result = pull(NAME)
    assert result.exit_code == 0, result.said
    assert "Apache License 2.0" in result.out
    assert f"klein up --model {NAME}\n" in result.out
    weight_map = json.loads(tiny_files["text_encoder/model.safetensors.index.json"])["weight_map"]
    unneeded = {
        f"text_encoder/{shard}"
        for shard in set(weight_map.values())
        if not any(
            file == shard
            and tensor.startswith(("model.embed", "model.layers.0", "model.layers.1", "model.layers.2"))
            for tensor, file in weight_map.items()
        )
    }
    assert unneeded
    needed = (set(tiny_files) - unneeded - {"text_encoder/generation_config.json"}) | {"LICENSE.md"}
    assert sorted(hub.fetched) == sorted(f"{MAIN}/{name}" for name in needed)
    pulled = files_of(models / NAME)
    receipt = json.loads(pulled.pop("klein-pull.json"))
    assert receipt["model"] == NAME
    assert set(receipt["files"]) == set(pulled) == needed
    assert all(pulled[name] == hub.repositories[MAIN].files[name] for name in needed)
    assert [path.name for path in models.iterdir()] == [NAME]
    assert Pipeline.from_folder(models / NAME).is_distilled
    monkeypatch.setenv("KLEIN_MODELS_FOLDER", str(models))
    assert require_model(model_files(NAME, {})) == NAME

    hub.requests.clear()
    again = pull(NAME)
    assert (again.exit_code, hub.requests) == (0, [])
    assert f"klein up --model {NAME}\n" in again.out


def test_interrupted_it_leaves_nothing_that_looks_whole_and_keeps_whole_files(
    start, pull, hub, models, large
):
    hub.stall_at[TRANSFORMER] = CHUNK + 5000
    process = start(NAME)
    assert hub.stalled.wait(120)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "run the same command again" in err
    assert not (models / NAME).exists()
    assert not list(models.rglob("*.incomplete"))

    first = list(hub.fetched)
    hub.stall_at.clear()
    hub.requests.clear()
    assert pull(NAME).exit_code == 0
    assert set(hub.fetched) & set(first) == {f"{MAIN}/{TRANSFORMER}"}
    assert (models / NAME / TRANSFORMER).read_bytes() == large
    assert not list((models / NAME).rglob(".cache"))


def test_a_connection_that_breaks_is_taken_up_again_and_the_token_stays_with_the_hub(
    pull, hub, environment, models, large
):
    hub.cut_at[TRANSFORMER] = CHUNK + 7000
    hub.content_host = environment["HF_ENDPOINT"].replace("127.0.0.1", "localhost")
    result = pull(NAME, HF_TOKEN="hf_secret")
    assert result.exit_code == 0, result.said
    elsewhere = [request for request in hub.requests if request.path.startswith("/content/")]
    assert [request.range for request in elsewhere if request.path.endswith(TRANSFORMER)] == [
        None,
        f"bytes={CHUNK}-",
    ]
    assert {request.authorization for request in elsewhere} == {None}
    here = [r for r in hub.requests if MAIN in r.path and r not in elsewhere]
    assert [r for r in here if r.authorization != "Bearer hf_secret"] == []
    assert (models / NAME / TRANSFORMER).read_bytes() == large


def test_non_commercial_and_gated_models_need_consent_and_a_token(pull, hub, models, tiny_files):
    gated = PUBLISHED_MODELS["klein-9b"].repository
    hub.repositories[gated] = Repository(dict(tiny_files), gated=True)
    hub.allowed_tokens = {"hf_accepted"}
    refused = pull("klein-9b")
    assert refused.exit_code == 2
    assert "FLUX Non-Commercial License, not for commercial use" in refused.out
    assert "--accept-license" in refused.err
    assert hub.requests == []

    anonymous = pull("klein-9b", "--accept-license")
    assert anonymous.exit_code == 1
    assert f"{gated} is gated" in anonymous.err
    assert "HF_TOKEN" in anonymous.err

    another = pull("klein-9b", "--accept-license", HF_TOKEN="hf_another")
    assert another.exit_code == 1
    assert "Your token may not read" in another.err
    assert gated in another.err
    assert not (models / "klein-9b").exists()

    assert pull("klein-9b", "--accept-license", HF_TOKEN="hf_accepted").exit_code == 0
    assert (models / "klein-9b" / TRANSFORMER).is_file()


def test_quantized_weights_and_the_small_decoder_take_their_places_in_the_model(
    pull, hub, models, tiny_files, tmp_path
):
    quantized = PUBLISHED_MODELS[NAME].quantized["fp8"]
    weights = official_float8(tiny_files[TRANSFORMER])
    hub.repositories[quantized.repository] = Repository({quantized.name: weights, "README.md": b""})
    tiny_vae(seed=3, decoder_block_out_channels=(32, 32, 32, 64)).save_pretrained(tmp_path / "vae")
    small = files_of(tmp_path / "vae")
    extra = {"full_encoder_small_decoder.safetensors": b"the same once more"}
    hub.repositories[SMALL_DECODER.repository] = Repository({**small, **extra})
    result = pull(NAME, "--precision", "fp8", "--small-decoder")
    assert result.exit_code == 0, result.said
    assert "klein up --model klein-4b-fp8-small-decoder" in result.out
    folder = models / "klein-4b-fp8-small-decoder"
    assert [path.name for path in (folder / "transformer").iterdir() if path.suffix == ".safetensors"] == [
        quantized.name
    ]
    assert (folder / "transformer/config.json").read_bytes() == tiny_files["transformer/config.json"]
    assert files_of(folder / "vae") == small
    fetched = set(hub.fetched)
    assert f"{MAIN}/{TRANSFORMER}" not in fetched
    assert not any(path.startswith(f"{MAIN}/vae/") for path in fetched)
    assert f"{SMALL_DECODER.repository}/full_encoder_small_decoder.safetensors" not in fetched
    loaded = Pipeline.from_folder(folder)
    assert loaded.vae_decoder.autoencoder.config.decoder_block_out_channels == (32, 32, 32, 64)


def test_too_little_space_is_told_before_anything_large_is_fetched(pull, hub, models):
    hub.repositories[MAIN].listed_sizes[TRANSFORMER] = 5 * 10**18
    result = pull(NAME)
    assert result.exit_code == 1
    assert "free; 5,000,000 TB are to come" in result.err
    assert not any(path.endswith(".safetensors") for path in hub.fetched)
    assert not (models / NAME).exists()


def test_a_disk_that_fills_up_ends_it_and_keeps_the_rest(start, pull, hub, models, large):
    process = start(NAME, largest_file=CHUNK)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "No space is left" in err
    assert "run the same command again" in err
    assert not (models / NAME).exists()
    assert pull(NAME).exit_code == 0
    assert len(hub.fetched) == len(set(hub.fetched)) + 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda files: files.pop("model_index.json"), "model_index.json is missing"),
        (lambda files: files.pop(TRANSFORMER), "has only pickle files"),
        (
            lambda files: files.update({"vae/config.json": b'{"_class_name": "AutoencoderKL"}'}),
            "only AutoencoderKLFlux2 is supported",
        ),
        (
            lambda files: files.update(
                {
                    "text_encoder/model.safetensors.index.json": b'{"weight_map": {"a": "../../../a.safetensors"}}'
                }
            ),
            "is missing",
        ),
    ],
    ids=["weights only", "pickles", "another autoencoder", "an index that leads outside"],
)
def test_what_would_not_load_is_refused_before_anything_large_is_fetched(pull, hub, models, change, words):
    files = hub.repositories[MAIN].files
    del files["transformer/diffusion_pytorch_model.fp16.safetensors"]
    change(files)
    hub.repositories["someone/a-model"] = Repository(files)
    result = pull("someone/a-model")
    assert result.exit_code == 1
    assert words in result.err.replace("\n", " ")
    assert "someone/a-model" in result.err
    assert not any(path.endswith(".safetensors") for path in hub.fetched)
    assert not (models / "someone--a-model").exists()


def test_terms_are_read_from_the_card_and_from_where_the_shape_comes_from(pull, hub, models):
    repository = hub.repositories["someone/tuned"] = Repository(dict(hub.repositories[MAIN].files))
    repository.card = {"license": "other", "license_name": "cc-by-nc-4.0"}
    refused = pull("someone/tuned")
    assert (refused.exit_code, hub.fetched) == (2, [])
    assert "cc-by-nc-4.0, not for commercial use" in refused.out

    repository.card = {"license": "mit"}
    row = PUBLISHED_MODELS["klein-9b"]
    shapes = {
        "text_encoder/config.json": {**row.text_encoder.qwen3, "text_encoder_out_layers": [9, 18, 27]},
        "transformer/config.json": {
            "num_layers": 8,
            "num_single_layers": 24,
            "num_attention_heads": 32,
            "joint_attention_dim": 12288,
        },
        "vae/config.json": {},
    }
    repository.files |= {name: json.dumps(shape).encode() for name, shape in shapes.items()}
    descended = pull("someone/tuned")
    assert descended.exit_code == 2
    assert "mit" in descended.out
    assert "FLUX Non-Commercial License" in descended.out
    assert not any(path.endswith(".safetensors") for path in hub.fetched)


def test_content_that_is_not_what_was_listed_is_deleted(pull, hub, models, tiny_files):
    for name in ("vae/config.json", TRANSFORMER):
        hub.corrupt = {name}
        result = pull(NAME)
        assert result.exit_code == 1
        assert f"{name} of {MAIN} is not what its repository lists" in result.err
        assert not (models / NAME).exists()
    hub.corrupt.clear()
    assert pull(NAME).exit_code == 0
    assert (models / NAME / TRANSFORMER).read_bytes() == tiny_files[TRANSFORMER]


def test_a_hub_that_does_not_help_is_told_in_a_sentence(pull, hub, models, tmp_path):
    missing = pull("nobody/nothing")
    assert missing.exit_code == 1
    assert "nobody/nothing does not exist at http://127.0.0.1" in missing.err
    with ReservedPort() as reserved:
        unreachable = pull(NAME, HF_ENDPOINT=f"http://127.0.0.1:{reserved.port}")
    assert "cannot be reached" in unreachable.err
    assert "HF_ENDPOINT" in unreachable.err
    assert "HF_HUB_OFFLINE is set" in pull(NAME, HF_HUB_OFFLINE="1").err
    hub.status = 503
    assert "answered 503" in pull(NAME).err
    assert not models.exists()


def test_what_another_program_downloaded_is_not_downloaded_again(pull, hub, environment, models, tiny_files):
    script = f"from huggingface_hub import hf_hub_download as get; get({MAIN!r}, {TRANSFORMER!r})"
    subprocess.run([sys.executable, "-c", script], env=environment, check=True, capture_output=True)
    hub.requests.clear()
    assert pull(NAME).exit_code == 0
    assert f"{MAIN}/{TRANSFORMER}" not in hub.fetched
    copied = models / NAME / TRANSFORMER
    assert not copied.is_symlink()
    assert copied.read_bytes() == tiny_files[TRANSFORMER]


def test_a_folder_that_klein_did_not_pull_is_left_alone(pull, hub, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "letter.txt").write_text("dear")
    result = pull(NAME, "--to", other)
    assert result.exit_code == 2
    assert "was not pulled by klein" in result.err
    assert files_of(other) == {"letter.txt": b"dear"}
    empty = tmp_path / "empty"
    empty.mkdir()
    taken = pull(NAME, "--to", empty)
    assert taken.exit_code == 0, taken.said
    assert f"klein up --model {empty}\n" in taken.out
    assert (empty / "model_index.json").is_file()
