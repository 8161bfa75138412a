"""DenoiserApplication: loads the model, warms it up, and serves it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import grpc
import torch
from torch import Tensor

from klein_api.v1 import denoiser_service_pb2_grpc, stage_service_pb2
from klein_core.checkpoint.config import read_sampling
from klein_core.checkpoint.files import ModelFiles
from klein_core.checkpoint.key_mapping import TEXT_ENCODER, TRANSFORMER
from klein_core.checkpoint.weights import weights_digest
from klein_core.denoiser.adapters.adapter import ScaledAdapter
from klein_core.denoiser.offload import offload_blocks
from klein_core.denoiser.reference_cache import ReferenceCache, bytes_per_token
from klein_core.denoiser.sampler import Trajectory, packed_step
from klein_core.denoiser.transformer import FlowTransformer
from klein_core.model_description import read_description
from klein_core.variants import TextEncoderConfig, default_guidance_scale, default_step_count, read_json
from klein_services.denoiser.adapters import AdapterRegistry
from klein_services.denoiser.engine import Engine
from klein_services.denoiser.estimates import StepTimes
from klein_services.denoiser.reference_kv_cache import ReferenceCaches
from klein_services.denoiser.request import DenoiseLimits, ServedModel
from klein_services.denoiser.request_planner import RequestPlanner
from klein_services.denoiser.request_state import CacheReferences, Step
from klein_services.denoiser.scheduled_request import OPERATION, STAGE
from klein_services.denoiser.scheduler import Load, Scheduler, SchedulerConfig
from klein_services.denoiser.servicer import SERVICE_NAME, Denoiser, DenoiserServicer
from klein_services.denoiser.settings import OFFLOAD_BLOCKS, DenoiserSettings
from klein_services.denoiser.warmup import (
    BUDGET_SIDE_PX,
    compile_steps,
    expected_to_fit,
    measure_budget,
    release_memory,
    synchronize,
    warm_up,
)
from klein_services.runtime import metrics, stage
from klein_services.runtime.load_phases import READ_WEIGHTS, WARM_UP, phase
from klein_services.runtime.settings import SettingsError
from klein_services.runtime.stage import Service
from klein_services.runtime.tensors import (
    dtype_name,
    report_memory,
    resolve_device,
    resolve_dtype,
    set_threads,
)
from klein_services.runtime.worker import Worker

PROBE_SIDE_PX = 1024
"""Size of the probe request, whose waiting time DescribeStage reports."""


class DenoiserApplication(Service):
    """Serves the flow transformer of one checkpoint."""

    name = STAGE
    service_names = (SERVICE_NAME,)
    open_service_names = (stage.STAGE_SERVICE,)
    operations = (OPERATION,)

    def __init__(self, settings: DenoiserSettings) -> None:
        self._settings = settings
        self._denoiser: Denoiser | None = None
        self._preparation = Worker(f"{STAGE}-preparation", settings.queue_limit)
        self._servicer = DenoiserServicer()
        metrics.initialize_steps(STAGE)
        self._stage = stage.DescribeStageServicer(
            stage=STAGE, model=settings.model_name, load=self._stage_load, complete=self._describe_adapters
        )

    def register(self, server: grpc.aio.Server) -> None:
        denoiser_service_pb2_grpc.add_DenoiserServiceServicer_to_server(self._servicer, server)
        self._stage.register(server)

    async def load(self) -> None:
        described = await asyncio.to_thread(read_description, self._settings.model_files(TRANSFORMER))
        loaded = await self._preparation.run(lambda: load_denoiser(self._settings, self._preparation))
        denoiser = loaded.value

        def start_engine() -> None:
            with phase(WARM_UP):
                denoiser.engine.start()

        await self._preparation.run(start_engine)
        self._denoiser = self._servicer.denoiser = denoiser
        model = denoiser.model
        facts = stage_service_pb2.DenoiserFacts(
            distilled=model.is_distilled,
            default_step_count=default_step_count(model.is_distilled),
            default_guidance_scale=default_guidance_scale(model.is_distilled),
            embedding_channels=model.embedding_channels,
            latent_channels=model.latent_channels,
            adapter_count=denoiser.limits.adapter_count,
        )
        if described is not None:
            facts.default_size_px, facts.pixel_count = described.default_size_px, described.pixel_count
            facts.description = described.description
            facts.subject_words.extend(described.subject_words)
        self._stage.loaded(
            device=str(denoiser.planner.device),
            dtype=dtype_name(model.dtype),
            weights_digest=model.weights_digest,
            facts=facts,
        )

    async def drain(self) -> None:
        self._stage.draining()

    async def close(self) -> None:
        if self._denoiser is not None:
            await asyncio.to_thread(self._denoiser.engine.close)
            self._denoiser.adapters.close()
        self._preparation.close()

    def utilization(self) -> float | None:
        """Returns admitted requests over the number of probe requests that fit into one step."""
        load = self._load()
        return 0.0 if load is None else (load.queued_count + load.running_count) / load.capacity

    def _load(self) -> Load | None:
        """Returns how busy the engine is; `None` before the model is loaded."""
        if self._denoiser is None:
            return None
        return self._denoiser.engine.load(self._denoiser.planner.probe(PROBE_SIDE_PX))

    def _stage_load(self) -> stage_service_pb2.StageLoad:
        stage_load = stage_service_pb2.StageLoad(queue_limit=self._settings.queue_limit)
        load = self._load()
        if load is not None:
            stage_load.queued_count, stage_load.running_count = load.queued_count, load.running_count
            if load.estimated_wait_seconds is not None:
                stage_load.estimated_wait.CopyFrom(stage.duration(load.estimated_wait_seconds))
        return stage_load

    async def _describe_adapters(self, description: stage_service_pb2.DescribeStageResponse) -> None:
        """Adds the adapters in the folder now: the folder may change while the stage serves."""
        if self._denoiser is not None:
            description.denoiser.adapters.extend(await self._denoiser.adapters.descriptions())


def load_denoiser(settings: DenoiserSettings, preparation: Worker) -> Denoiser:
    """Loads the checkpoint. Slow: call it off the event loop.

    Raises:
        CheckpointError: the checkpoint cannot be loaded.
        SettingsError: the device does not exist, or a setting does not fit it.
    """
    set_threads(settings.threads)
    device = resolve_device(settings.device)
    sizes_px = settings.sizes_px(on_gpu=device.type == "cuda")
    files = settings.model_files(TRANSFORMER)
    sampling = read_sampling(files)
    report_memory(STAGE, device)
    with phase(READ_WEIGHTS):
        transformer = load_transformer(settings, files, device)
    token_bytes = bytes_per_token(transformer.config, transformer.dtype)
    model = ServedModel(
        name=settings.model_name,
        is_distilled=sampling.is_distilled,
        embedding_channels=transformer.config.joint_attention_dim,
        latent_channels=transformer.config.in_channels,
        dtype=transformer.dtype,
        weights_digest=weights_digest(transformer),
        cached_token_bytes=token_bytes if sampling.uses_reference_cache else 0,
        schedule=sampling.schedule,
    )
    planner = RequestPlanner(model=model, device=device, text_tokens=prompt_length(files))
    step, cache_references = step_of(transformer), cache_of(transformer)
    adapters = AdapterRegistry.of(settings, transformer)
    fits = expected_to_fit(transformer, planner.text_tokens)
    return assemble(settings, planner, step, sizes_px, preparation, adapters, cache_references, fits)


def load_transformer(settings: DenoiserSettings, files: ModelFiles, device: torch.device) -> FlowTransformer:
    """Loads the transformer onto the device, or with KLEIN_OFFLOAD=blocks into host memory.

    Raises:
        CheckpointError: the checkpoint cannot be loaded.
        SettingsError: blocks cannot be offloaded from this device.
    """
    offloads = settings.offload == OFFLOAD_BLOCKS
    if offloads and device.type != "cuda":
        raise SettingsError(
            f"KLEIN_OFFLOAD is {settings.offload!r}, which is for CUDA devices; on {device} the weights are in "
            "host memory already"
        )
    transformer = FlowTransformer.from_folder(
        files,
        device="cpu" if offloads else device,
        dtype=resolve_dtype(settings.dtype),
        quantization=settings.quantization,
    )
    if offloads:
        offload_blocks(transformer, device)
    if settings.compiles(on_gpu=device.type == "cuda"):
        transformer.compile_blocks()
    return transformer


def prompt_length(files: ModelFiles) -> int:
    """Returns the text encoder's sequence length; klein's default if the checkpoint does not state it."""
    folder = files.model
    path = folder / TEXT_ENCODER / "config.json" if folder else None
    default = TextEncoderConfig.sequence_length
    return int(read_json(path).get("max_sequence_length", default)) if path and path.exists() else default


def step_of(transformer: FlowTransformer) -> Step:
    """Returns the function by which the engine steps trajectories."""

    def step(trajectories: Sequence[Trajectory]) -> None:
        with torch.inference_mode():
            packed_step(transformer, trajectories)
            synchronize(transformer.device)

    return step


def cache_of(transformer: FlowTransformer) -> CacheReferences:
    """Returns the function by which the engine computes the cache of references."""

    def cache(references: Sequence[Tensor], adapters: tuple[ScaledAdapter, ...]) -> ReferenceCache:
        with torch.inference_mode():
            computed = transformer.reference_cache(references, adapters)
            synchronize(transformer.device)
        return computed

    return cache


def assemble(
    settings: DenoiserSettings,
    planner: RequestPlanner,
    step: Step,
    sizes_px: Sequence[tuple[int, int]],
    preparation: Worker,
    adapters: AdapterRegistry,
    cache_references: CacheReferences | None = None,
    fits: Callable[[int], bool] = lambda count: True,
) -> Denoiser:
    """Builds a denoiser around `step`; its engine warms up with images of `sizes_px`, (width, height) each.

    `fits` is as for `measure_budget`.
    """
    times, on_gpu = StepTimes(), planner.device.type == "cuda"
    packs, compiles = settings.packs(on_gpu), settings.compiles(on_gpu)
    config = SchedulerConfig(
        queue_limit=settings.queue_limit,
        # Without packing one image at a time, so that results do not depend on other requests.
        token_budget=settings.token_budget if packs else 0,
        step_image_limit=settings.step_image_limit,
        memory_limit_bytes=settings.memory_limit_mib * 1024**2,
        aging_seconds=settings.ageing_seconds,
        starving_share=settings.aged_share,
        silent_seconds=settings.silent_seconds,
    )
    caches = ReferenceCaches[ReferenceCache](settings.reference_cache_mib * 1024**2)
    scheduler = Scheduler(config, times, caches)

    def warm_up_steps() -> None:
        warm_up(step, planner.sample, planner.sample_tokens, sizes_px, times)
        if compiles:
            compile_steps(step, planner.sample, packs=packs)
        if packs and not settings.token_budget:
            tokens = planner.sample_tokens(BUDGET_SIDE_PX, BUDGET_SIDE_PX)
            limit = settings.step_image_limit
            scheduler.budget.measured(measure_budget(step, planner.sample, tokens, limit, times, fits))
        release_memory(planner.device)

    return Denoiser(
        engine=Engine(scheduler, step, cache_references, warm_up=warm_up_steps),
        model=planner.model,
        planner=planner,
        limits=DenoiseLimits(
            image_count=settings.image_limit,
            reference_count=settings.reference_limit,
            reference_tokens=settings.reference_token_limit,
            text_tokens=settings.text_token_limit,
            adapter_count=settings.adapter_limit,
        ),
        receive_timeout_seconds=settings.receive_timeout_seconds,
        adapters=adapters,
        preparation=preparation,
    )
