"""Nodes of ComfyUI: the contract that ComfyUI reads from them, and its executor's calls, at a real suite."""

from __future__ import annotations

import inspect
import subprocess
import sys
from collections.abc import Iterator
from types import ModuleType

import numpy as np
import pytest
import torch

from klein_client import Client, InvalidRequest, NotFound
from klein_client.comfyui import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS
from klein_core.pico import WEIGHTS
from klein_core.pipeline import Pipeline
from klein_services.cli.suite import Suite, SuiteOptions
from tests.e2e.running_suite import READY_SECONDS
from tests.services.fakes.denoiser_server import one_thread

PROMPT = "a large red heart on a yellow background"
WIDGETS = {"STRING": str, "INT": int}
SOCKETS = {"CONDITIONING", "LATENT", "IMAGE"}


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Suite]:
    options = SuiteOptions(device="cpu", threads=1, log_folder=tmp_path_factory.mktemp("logs"))
    with one_thread(), Suite(options) as running:
        running.wait_until_ready(timeout_seconds=READY_SECONDS)
        yield running


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    return Pipeline.from_folder(WEIGHTS)


def inputs(node: type) -> dict[str, tuple]:
    types = node.INPUT_TYPES()
    return types["required"] | types.get("optional", {})


def executed(name: str, **values):
    """Runs a node as ComfyUI does: an instance, widgets' defaults, and the method that FUNCTION names."""
    node = NODE_CLASS_MAPPINGS[name]
    defaults = {key: kind[1]["default"] for key, kind in inputs(node).items() if "default" in (*kind, {})[1]}
    results = getattr(node(), node.FUNCTION)(**(defaults | values))
    assert isinstance(results, tuple)
    assert len(results) == len(node.RETURN_TYPES)
    return results[0]


@pytest.mark.parametrize("name", NODE_CLASS_MAPPINGS)
def test_a_node_keeps_comfyuis_contract(name: str) -> None:
    node = NODE_CLASS_MAPPINGS[name]
    types = node.INPUT_TYPES()
    assert inspect.ismethod(node.INPUT_TYPES)
    assert set(types) <= {"required", "optional", "hidden"}
    parameters = inspect.signature(getattr(node, node.FUNCTION)).parameters
    assert [*parameters][1:] == [*inputs(node)]
    for key, (kind, *options) in inputs(node).items():
        assert kind in SOCKETS | WIDGETS.keys()
        if kind in WIDGETS and "default" in options[0]:
            assert isinstance(options[0]["default"], WIDGETS[kind])
        assert (parameters[key].default is inspect.Parameter.empty) == (key in types["required"])
    assert isinstance(node.RETURN_TYPES, tuple)
    assert set(node.RETURN_TYPES) <= SOCKETS
    assert len(node.RETURN_NAMES) == len(node.RETURN_TYPES)
    assert node.CATEGORY
    assert NODE_DISPLAY_NAME_MAPPINGS.keys() == NODE_CLASS_MAPPINGS.keys()


def test_importing_the_nodes_needs_neither_torch_nor_comfyui() -> None:
    code = "import sys, klein_client.comfyui; sys.exit('torch' in sys.modules or 'comfy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_prompt_becomes_conditioning(suite: Suite, pipeline: Pipeline) -> None:
    target = f"127.0.0.1:{suite.ports['text-encoder']}"
    [[embedding, extras]] = executed("KleinRemoteTextEncode", prompt=PROMPT, target=target)
    assert torch.equal(embedding, pipeline.text_encoder.encode([PROMPT])[0].embedding[None])
    assert extras == {"pooled_output": None}
    with pytest.raises(InvalidRequest, match="prompt"):
        executed("KleinRemoteTextEncode", prompt="x" * 40_000, target=target)


def test_latents_become_images(suite: Suite, pipeline: Pipeline) -> None:
    target = f"127.0.0.1:{suite.ports['vae-decoder']}"
    channels = pipeline.vae_decoder.config.packed_channels
    samples = torch.randn(2, channels, 4, 6, generator=torch.Generator().manual_seed(1))
    images = executed("KleinRemoteVAEDecode", samples={"samples": samples}, target=target)
    assert images.shape == (2, 64, 96, 3)
    assert images.dtype == torch.float32
    for image, latents in zip(images, samples, strict=True):
        expected = pipeline.vae_decoder.decode(latents.permute(1, 2, 0).contiguous())
        assert torch.equal((image * 255).round().to(torch.uint8), expected)
    with pytest.raises(InvalidRequest, match="latents"):
        executed("KleinRemoteVAEDecode", samples={"samples": samples[:, :4]}, target=target)


def test_whole_requests_are_the_suites(suite: Suite) -> None:
    with Client(suite.target) as client:
        made = client.generate(PROMPT, seed=7, count=2, format="raw")
        images = executed("KleinGenerate", prompt=PROMPT, target=suite.target, seed=7, count=2)
        assert images.shape == (2, 128, 128, 3)
        assert (images * 255).round().to(torch.uint8).numpy().tobytes() == b"".join(
            each.data for each in made
        )
        heart = client.generate(PROMPT, seed=7).image
        edited = client.generate("make the heart blue", references=heart, seed=3, format="raw")
    found = executed(
        "KleinGenerate",
        prompt="make the heart blue",
        target=suite.target,
        seed=3,
        references=torch.from_numpy(np.asarray(heart.pil()) / np.float32(255))[None],
    )
    assert (found * 255).round().to(torch.uint8).numpy().tobytes() == edited.image.data
    with pytest.raises(InvalidRequest, match="131072 pixels"):
        executed("KleinGenerate", prompt=PROMPT, target=suite.target, width=64, height=2048)
    with pytest.raises(NotFound, match="other"):
        executed("KleinGenerate", prompt=PROMPT, target=suite.target, model="other")


class Bar:
    """ComfyUI's progress bar: it takes the whole, and steps with previews."""

    made: list[Bar]

    def __init__(self, total: int) -> None:
        self.total = total
        self.updates: list[tuple] = []
        Bar.made.append(self)

    def update_absolute(self, value: int, total: int | None = None, preview: tuple | None = None) -> None:
        self.updates.append((value, total, preview))


class Interrupted(Exception):
    """Stands for ComfyUI's exception of a cancelled run."""


@pytest.fixture
def comfyui(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The two modules of ComfyUI that nodes may use; ComfyUI itself is no package that can be installed."""
    package, utils, management = map(ModuleType, ("comfy", "comfy.utils", "comfy.model_management"))
    Bar.made = []
    utils.ProgressBar = Bar
    management.throw_exception_if_processing_interrupted = lambda: None
    for module in (package, utils, management):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return management


def test_previews_and_steps_reach_comfyuis_page(suite: Suite, comfyui: ModuleType) -> None:
    executed("KleinGenerate", prompt=PROMPT, target=suite.target, seed=1)
    [bar] = Bar.made
    assert [(value, total) for value, total, _ in bar.updates] == [(step, 4) for step in (1, 2, 3, 4)]
    shown = [preview for *_, preview in bar.updates if preview]
    assert shown
    for form, picture, side in shown:
        assert (form, picture.size, side) == ("JPEG", (128, 128), 512)


def test_an_interruption_ends_the_request(suite: Suite, comfyui: ModuleType) -> None:
    def interrupt() -> None:
        if Bar.made and len(Bar.made[0].updates) == 2:
            raise Interrupted

    comfyui.throw_exception_if_processing_interrupted = interrupt
    with pytest.raises(Interrupted):
        executed("KleinGenerate", prompt=PROMPT, target=suite.target)
    assert len(Bar.made[0].updates) == 2
