"""Real denoiser server with a tiny random transformer, and a client that records every response."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import shutil
import threading
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from klein_api.v1 import denoiser_service_pb2 as api
from klein_api.v1.denoiser_service_pb2_grpc import DenoiserServiceStub
from klein_core.checkpoint.config import read_pipeline_index
from klein_core.checkpoint.key_maps import checkpoint_names
from klein_core.denoiser.adapters.adapter import ScaledAdapter
from klein_core.denoiser.adapters.key_mapping import layer_targets
from klein_core.denoiser.adapters.reader import read_adapter
from klein_core.denoiser.inpainting import Inpainting
from klein_core.denoiser.reference_cache import ReferenceCache
from klein_core.denoiser.sampler import Trajectory, initial_noise, packed_step
from klein_core.denoiser.transformer import FlowTransformer
from klein_core.pico import WEIGHTS as PICO_WEIGHTS
from klein_core.variants import TransformerConfig
from klein_services.denoiser import application
from klein_services.denoiser.application import DenoiserApplication
from klein_services.denoiser.request_state import Step
from klein_services.denoiser.settings import DenoiserSettings
from klein_services.runtime.frames import FrameReader
from klein_services.runtime.server import running_server
from klein_services.runtime.tensors import frames_tensor, tensor_frames

CONFIG = TransformerConfig(
    num_layers=2,
    num_single_layers=3,
    num_attention_heads=2,
    attention_head_dim=16,
    joint_attention_dim=24,
    in_channels=16,
    axes_dims_rope=(4, 4, 4, 4),
)
EMBEDDING_CHANNELS, LATENT_CHANNELS = CONFIG.joint_attention_dim, CONFIG.in_channels
WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
TEXT_TOKENS = 7


def tiny_transformer(config: TransformerConfig = CONFIG, seed: int = 0) -> FlowTransformer:
    """Returns a random network whose weights are spread widely enough for errors to show."""
    transformer = FlowTransformer(config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for parameter in transformer.parameters():
        if parameter.ndim == 1:
            parameter.copy_(torch.rand(parameter.shape, generator=generator) + 0.5)
        else:
            spread = min(0.3, 2 / parameter.shape[-1] ** 0.5)
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * spread)
    return transformer


MODEL_INDEX = {
    "_class_name": "Flux2KleinPipeline",
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "Qwen3ForCausalLM"],
    "tokenizer": ["transformers", "Qwen2Tokenizer"],
    "transformer": ["diffusers", "Flux2Transformer2DModel"],
    "vae": ["diffusers", "AutoencoderKLFlux2"],
}


def save_transformer(folder: Path, transformer: FlowTransformer) -> None:
    """Writes a network as diffusers does, fused projections taken apart."""
    folder.mkdir()
    fused = checkpoint_names(transformer.config)
    tensors = {}
    for name, tensor in transformer.state_dict().items():
        names = fused.get(name, (name,))
        tensors.update(zip(names, (part.contiguous() for part in tensor.chunk(len(names))), strict=True))
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / WEIGHTS_FILE)
    (folder / "config.json").write_text(json.dumps(dataclasses.asdict(transformer.config)))


def save_checkpoint(folder: Path, *, distilled: bool, reference_cache: bool = False) -> Path:
    """Writes as much of a checkpoint as a denoiser reads."""
    save_transformer(folder / "transformer", tiny_transformer())
    index = MODEL_INDEX | {"is_distilled": distilled}
    if reference_cache:
        index["_class_name"] = "Flux2KleinKVPipeline"
    (folder / "model_index.json").write_text(json.dumps(index))
    shutil.copytree(PICO_WEIGHTS / "scheduler", folder / "scheduler")
    (folder / "text_encoder").mkdir()
    (folder / "text_encoder" / "config.json").write_text(json.dumps({"max_sequence_length": TEXT_TOKENS}))
    return folder


@contextmanager
def one_thread() -> Iterator[None]:
    """Lets torch use one thread, here as in the server: rounding may depend on how many there are."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@asynccontextmanager
async def running_denoiser(folder: Path, **changes: Any) -> AsyncIterator[grpc.aio.Channel]:
    """Serves a checkpoint on a free port and yields a channel to it."""
    defaults: dict[str, Any] = {
        "port": 0, "metrics_port": 0, "drain_delay_seconds": 0, "grace_seconds": 20, "warmup_sizes": "",
        "model_path": str(folder), "model_name": "tiny", "device": "cpu", "threads": 1,
    }  # fmt: skip
    settings = DenoiserSettings(**{**defaults, **changes})
    channel: grpc.aio.Channel | None = None
    server = running_server(DenoiserApplication(settings), settings=settings)
    try:
        with one_thread():
            async with server as address:
                channel = grpc.aio.insecure_channel(address)
                yield channel
    finally:
        # After the server's drain, which calls on this channel may take part in.
        if channel is not None:
            await channel.close(grace=10)


async def eventually(is_so: Callable[[], bool]) -> None:
    """Waits until a condition holds, for as long as a busy machine may need."""
    async with asyncio.timeout(60):
        while True:
            if is_so():
                return
            await asyncio.sleep(0.01)


class Gate:
    """Gate between the engine and the transformer: counts steps and can hold them back."""

    def __init__(self) -> None:
        self.steps: list[list[Trajectory]] = []
        self.arrived = 0
        self._open = threading.Event()
        self._open.set()
        self._allowed = threading.Semaphore(0)
        self.before: Callable[[Sequence[Trajectory]], None] = lambda trajectories: None

    def hold(self) -> None:
        """Holds back all steps except those that `allow` lets pass."""
        self._open.clear()

    def allow(self, count: int = 1) -> None:
        self._allowed.release(count)

    def release(self) -> None:
        self._open.set()
        self._allowed.release(1000)

    async def reached(self, count: int) -> None:
        """Waits until so many steps have passed."""
        await eventually(lambda: len(self.steps) >= count)

    async def blocked(self, count: int) -> None:
        """Waits until so many steps have passed and the next one stands before the gate."""
        await eventually(lambda: len(self.steps) == count and self.arrived == count + 1)

    def wrap(self, step: Step) -> Step:
        def gated(trajectories: Sequence[Trajectory]) -> None:
            self.arrived += 1
            if not self._open.is_set() and not self._allowed.acquire(timeout=60):
                raise TimeoutError("a test forgot to open the gate")
            self.steps.append(list(trajectories))
            self.before(trajectories)
            step(trajectories)

        return gated


@contextmanager
def gated_steps(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    """Puts a gate into every denoiser that is loaded from here on, and opens it at the end."""
    gate, step_of = Gate(), application.step_of
    monkeypatch.setattr(application, "step_of", lambda transformer: gate.wrap(step_of(transformer)))
    yield gate
    gate.release()


def spec(**fields: Any) -> api.DenoiseSpec:
    return api.DenoiseSpec(**{"width_px": 64, "height_px": 64, "seeds": [1], **fields})


def random_tensor(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def prompt(seed: int = 0, tokens: int = TEXT_TOKENS) -> Tensor:
    return random_tensor(tokens, EMBEDDING_CHANNELS, seed=seed)


def image(rows: int, columns: int, seed: int = 0) -> Tensor:
    return random_tensor(rows, columns, LATENT_CHANNELS, seed=seed)


@dataclass
class Tensors:
    """Tensors of a request."""

    prompt_embedding: Tensor = field(default_factory=prompt)
    negative_prompt_embedding: Tensor | None = None
    references: tuple[Tensor, ...] = ()
    resume: tuple[Tensor, ...] = ()
    initial_latents: Tensor | None = None
    mask: Tensor | None = None

    def parts(self) -> Iterator[api.DenoiseLatentsRequest]:
        for frame in tensor_frames(self.prompt_embedding):
            yield api.DenoiseLatentsRequest(prompt_embedding=frame)
        for name in ("negative_prompt_embedding", "initial_latents", "mask"):
            tensor = getattr(self, name)
            for frame in () if tensor is None else tensor_frames(tensor):
                yield api.DenoiseLatentsRequest(**{name: frame})
        for name, tensors in (("reference_latents", self.references), ("resume_latents", self.resume)):
            for index, tensor in enumerate(tensors):
                for frame in tensor_frames(tensor):
                    part = api.IndexedTensorFrame(index=index, frame=frame)
                    yield api.DenoiseLatentsRequest(**{name: part})

    @property
    def all_references(self) -> tuple[Tensor, ...]:
        """The references, the initial image first."""
        return self.references if self.initial_latents is None else (self.initial_latents, *self.references)


def request(wish: api.DenoiseSpec, tensors: Tensors | None = None) -> list[api.DenoiseLatentsRequest]:
    return [api.DenoiseLatentsRequest(spec=wish), *(tensors or Tensors()).parts()]


@dataclass
class Heard:
    """All responses of a call, by kind."""

    kinds: list[str] = field(default_factory=list)
    queued: list[api.DenoiseQueued] = field(default_factory=list)
    started: api.DenoiseStarted | None = None
    steps: list[int] = field(default_factory=list)
    previews: list[Tensor] = field(default_factory=list)
    checkpoints: list[tuple[int, int, Tensor]] = field(default_factory=list)
    latents: list[Tensor] = field(default_factory=list)
    summary: api.DenoiseSummary | None = None
    reader: FrameReader | None = None

    def take(self, response: api.DenoiseLatentsResponse) -> str:
        kind = response.WhichOneof("event")
        self.kinds.append(kind)
        match kind:
            case "queued":
                self.queued.append(response.queued)
            case "started":
                self.started = response.started
            case "step":
                self.steps.append(response.step.step)
            case "summary":
                self.summary = response.summary
            case _:
                self._take_frame(kind, getattr(response, kind))
        return kind

    def _take_frame(self, kind: str, part: api.IndexedTensorFrame) -> None:
        self.reader = self.reader or FrameReader(kind, limit_bytes=1 << 24)
        self.reader.add(part.frame)
        if not self.reader.finished:
            return
        tensor, self.reader = frames_tensor(self.reader), None
        if kind == "preview":
            self.previews.append(tensor)
        elif kind == "checkpoint":
            self.checkpoints.append((self.steps[-1], part.index, tensor))
        else:
            assert part.index == len(self.latents)
            self.latents.append(tensor)


async def denoise(
    channel: grpc.aio.Channel,
    parts: Iterable[api.DenoiseLatentsRequest],
    seconds: float | None = 30,
    heard: Heard | None = None,
) -> Heard:
    """Makes one call and returns all of its responses."""
    heard = heard or Heard()
    call = DenoiserServiceStub(channel).DenoiseLatents(iter(list(parts)), timeout=seconds)
    async for response in call:
        heard.take(response)
    return heard


def alone(
    folder: Path,
    wish: api.DenoiseSpec,
    tensors: Tensors,
    steps: int,
    scale: float = 1.0,
    adapters_folder: Path | None = None,
) -> list[Tensor]:
    """Denoises in this process, each image in separate steps."""
    return [states[-1] for states, _ in histories(folder, wish, tensors, steps, scale, adapters_folder)]


def histories(
    folder: Path,
    wish: api.DenoiseSpec,
    tensors: Tensors,
    steps: int,
    scale: float = 1.0,
    adapters_folder: Path | None = None,
) -> list[tuple[list[Tensor], list[Tensor]]]:
    """Denoises in this process; returns latents and previews after each step, for each seed."""
    with one_thread():
        transformer = FlowTransformer.from_folder(folder)
        is_cached = read_pipeline_index(folder).uses_reference_cache and tensors.all_references
        adapters = _adapters(transformer, wish, adapters_folder)
        cache = transformer.reference_cache(tensors.all_references, adapters) if is_cached else None
        return [
            _history(transformer, wish, tensors, seed, steps, scale, cache, adapters) for seed in wish.seeds
        ]


def _adapters(
    transformer: FlowTransformer, wish: api.DenoiseSpec, folder: Path | None
) -> tuple[ScaledAdapter, ...]:
    if folder is None:
        return ()
    layers = layer_targets(transformer)
    return tuple(
        ScaledAdapter(
            read_adapter(folder / f"{each.name}.safetensors", layers, device="cpu", dtype=transformer.dtype),
            each.scale if each.HasField("scale") else 1.0,
        )
        for each in wish.adapters
    )


def _history(
    transformer: FlowTransformer,
    wish: api.DenoiseSpec,
    tensors: Tensors,
    seed: int,
    steps: int,
    scale: float,
    cache: ReferenceCache | None,
    adapters: tuple[ScaledAdapter, ...],
) -> tuple[list[Tensor], list[Tensor]]:
    conditioning: dict[str, Any] = {
        "step_count": steps,
        "prompt_embedding": tensors.prompt_embedding,
        "negative_prompt_embedding": tensors.negative_prompt_embedding,
        "guidance_scale": scale,
        "references": () if cache else tensors.all_references,
        "reference_cache": cache,
        "adapters": adapters,
    }
    dtype = tensors.prompt_embedding.dtype
    noise = initial_noise(seed, wish.height_px // 16, wish.width_px // 16, LATENT_CHANNELS, dtype)
    if tensors.initial_latents is None or tensors.mask is None:
        trajectory = Trajectory(latents=noise, **conditioning)
    else:
        inpainting = Inpainting(tensors.initial_latents, tensors.mask.to(dtype), noise)
        trajectory = Trajectory.from_image(inpainting=inpainting, strength=wish.strength, **conditioning)
    states, previews = [], []
    while not trajectory.finished:
        packed_step(transformer, [trajectory])
        states.append(trajectory.latents)
        previews.append(trajectory.preview())
    return states, previews
