"""Models of a suite: their limits, defaults and adapters, and the state of their stages."""

from __future__ import annotations

from dataclasses import dataclass

from klein_api.v1 import image_service_pb2 as api
from klein_api.v1 import stage_service_pb2 as stage_api


@dataclass(frozen=True)
class Limits:
    """Limits of requests for a model."""

    reference_count: int
    reference_bytes: int
    """Bytes of one reference's file."""
    pixel_count: int
    """Pixels of one image."""
    image_count: int
    step_count: int
    default_size_px: int
    """Width and height of a request that gives none and has no reference."""
    adapter_count: int


@dataclass(frozen=True)
class Adapter:
    """An adapter that requests may name."""

    name: str
    kind: str
    """LoRA, LoKr or LoHa; empty when it has a problem."""
    rank: int
    layer_count: int
    size_bytes: int
    problem: str
    """Why it cannot be used, in one sentence; empty when it can."""
    notes: tuple[str, ...]
    """Entries of its file that are ignored although other software obeys them, one sentence each."""


@dataclass(frozen=True)
class Stage:
    """A stage that serves a model."""

    target: str
    """Its gRPC target."""
    name: str
    """`text-encoder`, `denoiser` or `vae-decoder`; empty when it does not answer."""
    is_reachable: bool
    is_loaded: bool
    is_serving: bool
    """Whether it takes requests: its model is loaded, and it does not drain."""
    problem: str
    """Why it cannot be used, in one sentence; empty when it can."""
    device: str
    dtype: str
    version: str
    queued_count: int
    running_count: int
    queue_limit: int
    estimated_wait_seconds: float | None
    """Estimated time until a request that arrives now would start; `None` when unknown."""


@dataclass(frozen=True)
class Model:
    """A model that requests can name. Defaults, limits and adapters are meaningful when its denoiser serves."""

    name: str
    is_default: bool
    """Whether requests that name no model get this one."""
    is_serving: bool
    """Whether all of its stages serve."""
    is_distilled: bool
    """Whether it takes neither guidance nor a negative prompt."""
    default_step_count: int
    default_guidance_scale: float
    description: str
    """Its abilities in one paragraph; may be empty."""
    subject_words: tuple[str, ...]
    """Words of which a prompt must contain at least one to be understood; empty when any prompt is."""
    limits: Limits
    adapters: tuple[Adapter, ...]
    stages: tuple[Stage, ...]
    """Its stages, in the order of a request's life."""


@dataclass(frozen=True)
class Status:
    """State of a suite: all models with their stages."""

    models: tuple[Model, ...]
    default_model: str
    """The model of a request that names none."""

    @property
    def is_serving(self) -> bool:
        """Returns whether every stage of every model serves."""
        return bool(self.models) and all(model.is_serving for model in self.models)

    @property
    def problems(self) -> tuple[str, ...]:
        """Returns a line for each problem; stages that do not fit each other share one."""
        lines = (
            f"{model.name}: {stage.problem}"
            for model in self.models
            for stage in model.stages
            if stage.problem
        )
        return tuple(dict.fromkeys(lines))


def read_status(answer: api.ListModelsResponse) -> Status:
    """Returns the answer of `ListModels` as the client's own types."""
    models = tuple(_read_model(model, answer.default_model) for model in answer.models)
    return Status(models, answer.default_model)


def _read_model(model: api.RoutedModel, default_model: str) -> Model:
    limits = model.limits
    facts = next(
        (stage.description.denoiser for stage in model.stages if stage.description.HasField("denoiser")),
        stage_api.DenoiserFacts(),
    )
    return Model(
        name=model.name,
        is_default=model.name == default_model,
        is_serving=model.serving,
        is_distilled=model.distilled,
        default_step_count=model.default_step_count,
        default_guidance_scale=model.default_guidance_scale,
        description=model.description,
        subject_words=tuple(facts.subject_words),
        limits=Limits(
            limits.reference_count,
            limits.reference_bytes,
            limits.pixel_count,
            limits.image_count,
            limits.step_count,
            limits.default_size_px,
            limits.adapter_count,
        ),
        adapters=tuple(
            Adapter(
                adapter.name,
                adapter.kind,
                adapter.rank,
                adapter.layer_count,
                adapter.size_bytes,
                adapter.problem,
                tuple(adapter.notes),
            )
            for adapter in model.adapters
        ),
        stages=tuple(map(_read_stage, model.stages)),
    )


def _read_stage(stage: api.RoutedStage) -> Stage:
    description = stage.description
    load = description.load
    wait = load.estimated_wait.ToTimedelta().total_seconds() if load.HasField("estimated_wait") else None
    return Stage(
        target=stage.target,
        name=description.stage,
        is_reachable=stage.HasField("description"),
        is_loaded=description.WhichOneof("facts") is not None,
        is_serving=description.serving,
        problem=stage.problem,
        device=description.device,
        dtype=description.dtype,
        version=description.version,
        queued_count=load.queued_count,
        running_count=load.running_count,
        queue_limit=load.queue_limit,
        estimated_wait_seconds=wait,
    )
