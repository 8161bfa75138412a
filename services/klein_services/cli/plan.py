"""`klein plan`: the memory that a model needs, what fits a device, and the commands that start it.

Reads names, configurations and headers; no weights, no torch.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from klein_core.checkpoint import key_mapping
from klein_core.checkpoint.config import read_transformer_config, read_variant
from klein_core.checkpoint.files import Checkpoint, ModelFiles
from klein_core.errors import CheckpointError
from klein_core.memory.plan import (
    DENOISER,
    STAGES,
    TEXT_ENCODER,
    MemoryPlan,
    PlannedModel,
    StageMemory,
    Workload,
    make_plan,
)
from klein_core.memory.precision import PRECISIONS
from klein_core.model_registry import variants_of_shape
from klein_core.params import DEFAULT_LIMITS, size_violations
from klein_services.cli.errors import CliError
from klein_services.cli.exit_codes import FAILED, MISUSED
from klein_services.cli.hub.catalog import choose, is_known
from klein_services.cli.model_store import PICO, model_path, pulled_folder
from klein_services.cli.output import memory_size
from klein_services.cli.ports import DEFAULT_PORT, LOOPBACK
from klein_services.runtime.stage_settings import model_name

_PRECISIONS = {"F32": "fp32", "F16": "bf16", "BF16": "bf16", "F8_E4M3": "fp8", "U8": "nvfp4", "I8": "int8"}
"""Dtype of most of a file's bytes → precision; fp16 takes as much memory as bf16."""
_UNITS = {"b": 1} | {
    prefix + suffix: base**power
    for power, prefix in enumerate("kmgt", start=1)
    for suffix, base in (("", 1000), ("b", 1000), ("i", 1024), ("ib", 1024))
}
_MEMORY = re.compile(r"(\d+(?:\.\d+)?)\s*([a-z]*)", re.IGNORECASE)
_LARGEST_GIB = 1024
"""Largest number without a unit: larger ones were meant in another unit than GiB."""
_SIZE = re.compile(r"(\d{1,6})x(\d{1,6})")
_LARGEST_COUNT = 64
_PORTS = {stage: DEFAULT_PORT + offset for offset, stage in enumerate(STAGES, start=1)}


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """Options of the command line."""

    model: str
    device_memory: str | None = None
    """`None` takes the memory of this machine's first GPU."""
    sizes: str = "1024x1024"
    references: int = 0
    batch: int = 1
    precisions: tuple[str, ...] = ()
    as_json: bool = False


def run_plan(options: PlanOptions, console: Console) -> int:
    """Prints the plan; returns 0 when all stages fit, on one device or on one each.

    Raises:
        CliError: an option cannot be used, there is no such model, or no GPU and no --device-memory.
    """
    memory = options.device_memory
    device_bytes = detected_device_bytes() if memory is None else memory_bytes(memory)
    sizes = tuple(_size(entry.strip()) for entry in options.sizes.split(","))
    _check_count("--references", options.references, 0)
    _check_count("--batch", options.batch, 1)
    unknown = [name for name in options.precisions if name not in PRECISIONS]
    if unknown:
        raise CliError(f"--precision {unknown[0]} is not one of {', '.join(PRECISIONS)}.", exit_code=MISUSED)
    model = planned_model(options.model)
    workload = Workload(sizes, options.references, options.batch)
    plan = make_plan(model, workload, device_bytes, options.precisions)
    if options.as_json:
        console.print_json(json.dumps(_as_json(model, plan, device_bytes)))
    else:
        _print(model, plan, device_bytes, console)
    return 0 if plan.on_one_device or all(plan.on_own_devices.values()) else FAILED


def memory_bytes(text: str) -> int:
    """Parses 12GiB, 24GB, 512M, or 24, which are GiB.

    Raises:
        CliError: `text` is none of these.
    """
    match = _MEMORY.fullmatch(text.strip())
    amount, unit = (float(match[1]), match[2].lower()) if match else (0.0, "")
    if not unit and amount > _LARGEST_GIB:
        raise CliError(
            f"--device-memory {text} has no unit, and a number without one is in GiB, at most {_LARGEST_GIB}.",
            "Write it as 12GiB or 24GB.",
            MISUSED,
        )
    byte_count = int(amount * _UNITS.get(unit, 1 << 30 if not unit else 0))
    if byte_count < 1:
        raise CliError(
            f"--device-memory {text} is no amount of memory.", "Write it as 12GiB or 24GB.", MISUSED
        )
    return byte_count


def detected_device_bytes() -> int:
    """Returns the memory of this machine's first GPU, from nvidia-smi: importing torch takes seconds.

    Raises:
        CliError: there is no GPU that nvidia-smi lists.
    """
    command = shutil.which("nvidia-smi")
    if command is not None:
        query = [command, "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
        answer = subprocess.run(query, capture_output=True, text=True, check=False)
        first = next(iter(answer.stdout.split()), "")
        if answer.returncode == 0 and first.isdigit():
            return int(first) << 20
    raise CliError(
        "No NVIDIA GPU was found on this machine.",
        "Add the memory of the GPU that you plan for: --device-memory 24GiB.",
        MISUSED,
    )


def _size(entry: str) -> tuple[int, int]:
    match = _SIZE.fullmatch(entry)
    if match is None:
        raise CliError(f"--sizes has {entry!r}.", "Write sizes as 1024x1024,1536x1024.", MISUSED)
    width, height = int(match[1]), int(match[2])
    problems = [f"{each.field} {each.description}" for each in size_violations(width, height, DEFAULT_LIMITS)]
    if problems:
        raise CliError(f"--sizes has {entry}: {'; '.join(problems)}.", exit_code=MISUSED)
    return width, height


def _check_count(flag: str, value: int, minimum: int) -> None:
    if not minimum <= value <= _LARGEST_COUNT:
        raise CliError(f"{flag} is {value}; must be in [{minimum}, {_LARGEST_COUNT}].", exit_code=MISUSED)


def planned_model(model: str) -> PlannedModel:
    """Returns the shapes of a model on disk, or of a published one whether it was pulled or not.

    Raises:
        CliError: there is no such model, or its files are not of a klein model.
    """
    if model != PICO and is_known(model) and not Path(model).exists():
        choice = choose(model)
        row = choice.variant
        if row is None:
            raise TypeError(f"{choice.name} is no published model")
        stored = next((name for name, file in row.quantized.items() if file == choice.transformer), "bf16")
        return PlannedModel(
            name=choice.name,
            text_encoder=row.text_encoder,
            transformer=row.transformer,
            vae=row.vae if choice.vae is None else choice.vae.vae,
            is_distilled=row.is_distilled,
            uses_reference_cache=row.uses_reference_cache,
            transformer_stored=stored,
            published=tuple(row.quantized) if stored == "bf16" else (),
        )
    try:
        path = model_path(model)
        return _in_folder(model, path) if path.is_dir() else _bare_transformer(path)
    except CheckpointError as error:
        # The message may begin with a path, so it stays as it is.
        raise CliError(
            f"--model cannot be planned: {error}.", "`klein inspect` shows what it is.", MISUSED
        ) from error


def _in_folder(name: str, folder: Path) -> PlannedModel:
    files = ModelFiles.of(folder)
    variant = read_variant(files)
    network = _stored_precision(files.open(key_mapping.TRANSFORMER))
    return PlannedModel(
        name=name,
        text_encoder=variant.text_encoder,
        transformer=variant.transformer,
        vae=variant.vae,
        is_distilled=variant.is_distilled,
        uses_reference_cache=variant.uses_reference_cache,
        plain=network if network in ("fp32", "bf16") else "bf16",
        text_stored=_stored_precision(files.open(key_mapping.TEXT_ENCODER)),
        transformer_stored=network,
    )


def _bare_transformer(path: Path) -> PlannedModel:
    """Returns the shapes of a transformer's file, with the other parts of the published model of that size.

    Raises:
        CheckpointError: it is no transformer's file, or its shape is not a published one.
    """
    files = ModelFiles.of(path)
    config, network = read_transformer_config(files), _stored_precision(files.open(key_mapping.TRANSFORMER))
    rows = variants_of_shape(config)
    if not rows:
        raise CheckpointError(f"{path} has the shape of no published model, so its other parts are not known")
    return PlannedModel(
        name=rows[0].name,
        transformer_file=str(path),
        text_encoder=rows[0].text_encoder,
        transformer=config,
        vae=rows[0].vae,
        plain=network if network in ("fp32", "bf16") else "bf16",
        transformer_stored=network,
    )


def _stored_precision(checkpoint: Checkpoint) -> str:
    """Returns the precision of most of a checkpoint's bytes.

    Raises:
        CheckpointError: a header cannot be read, or the dtype is not one of klein's weights.
    """
    counts: Counter[str] = Counter()
    for name in checkpoint.files:
        entry = checkpoint.entry(name)
        counts[entry.dtype] += entry.byte_count
    dtype = counts.most_common(1)[0][0] if counts else "none"
    if dtype not in _PRECISIONS:
        raise CheckpointError(
            f"{checkpoint.path} has weights of dtype {dtype}; must be one of {', '.join(_PRECISIONS)}"
        )
    return _PRECISIONS[dtype]


def commands(model: PlannedModel, ways: Sequence[StageMemory], *, own_devices: bool = False) -> list[str]:
    """Returns the commands that download what is missing and start all four processes.

    Args:
        model: the model.
        ways: a way for each stage.
        own_devices: whether each stage has a device to itself.
    """
    is_one_command = not own_devices and not any(way.is_on_cpu for way in ways)
    groups = [ways] if is_one_command else [[way] for way in ways]
    flags = [_flags(model, group) for group in groups]
    published = [
        way.precision
        for group, given in zip(groups, flags, strict=True)
        for way in group
        if _needs_published(model, way, given)
    ]
    # One name for all stages: a request cannot use stages of two models.
    name = choose(model.name, published[0]).name if published else model.name
    result = []
    if name != PICO and is_known(name) and not Path(name).exists() and pulled_folder(name) is None:
        result.append(" ".join(["klein pull", model.name, *(f"--precision {each}" for each in published)]))
    quoted, file = shlex.quote(name), shlex.quote(model.transformer_file)
    if is_one_command:
        transformer = [f"--transformer {file}"] * bool(model.transformer_file)
        # `klein up` has no flag for tiles; its processes inherit the variable.
        tiling = ["KLEIN_TILING=on"] * any(way.is_tiled for way in ways)
        start = [*tiling, "klein up --model", quoted, *transformer, "--device cuda", *flags[0]]
        return [*result, " ".join(start)]
    for index, (way, given) in enumerate(zip(ways, flags, strict=True)):
        device = "cpu" if way.is_on_cpu else f"cuda:{index}" if own_devices else "cuda"
        weights = [f"--weights-path {file}"] * bool(way.stage == DENOISER and model.transformer_file)
        tiling = ["--tiling on"] * way.is_tiled
        words = [f"klein serve {way.stage} --model", quoted, *weights, f"--device {device}", *given, *tiling]
        result.append(" ".join([*words, f"--port {_PORTS[way.stage]}"]))
    targets = (f"--{stage}-target {LOOPBACK}:{_PORTS[stage]}" for stage in STAGES)
    served = shlex.quote(model_name(name))
    orchestrator = ["klein serve orchestrator --model-name", served, f"--port {DEFAULT_PORT}", *targets]
    return [*result, " ".join(orchestrator)]


def _flags(model: PlannedModel, ways: Sequence[StageMemory]) -> list[str]:
    quantized = {way.precision for way in ways if way.stage == TEXT_ENCODER} - {model.text_stored}
    quantized |= {
        way.precision for way in ways if way.stage == DENOISER and not model.has_file(way.precision)
    }
    flags = [f"--quantization {name}" for name in sorted(quantized)]
    flags += ["--offload blocks"] * any(way.is_offloaded for way in ways)
    return flags


def _needs_published(model: PlannedModel, way: StageMemory, flags: Sequence[str]) -> bool:
    """Whether the transformer comes from a published file of this precision, and is not quantized at load."""
    is_published = way.stage == DENOISER and way.precision in model.published
    return is_published and f"--quantization {way.precision}" not in flags


def _answers(model: PlannedModel, plan: MemoryPlan) -> tuple[list[str], list[str]]:
    """Returns the commands for one device, and those for one device a stage where that keeps stages off the CPU."""
    if plan.on_one_device is None:
        return [], []
    own = [way for way in plan.on_own_devices.values() if way is not None]
    has_use = not plan.is_all_on_device and len(own) == len(STAGES)
    return commands(model, plan.on_one_device), commands(model, own, own_devices=True) if has_use else []


def _as_json(model: PlannedModel, plan: MemoryPlan, device_bytes: int) -> dict[str, object]:
    def fields(way: StageMemory | None) -> dict[str, object] | None:
        return None if way is None else asdict(way) | {"device_bytes": way.device_bytes}

    one_device, own_devices = _answers(model, plan)
    return {
        "model": model.name,
        "device_bytes": device_bytes,
        "needs": [fields(way) for way in plan.ways],
        "together": None if plan.on_one_device is None else [fields(way) for way in plan.on_one_device],
        "apart": {stage: fields(way) for stage, way in plan.on_own_devices.items()},
        "commands": one_device,
        "commands_apart": own_devices,
    }


def _print(model: PlannedModel, plan: MemoryPlan, device_bytes: int, console: Console) -> None:
    table = Table("Stage", "Weights as", "Weights", "Activations", "In all", "Fits")
    for column in table.columns:
        column.no_wrap = True
    for column in table.columns[2:5]:
        column.justify = "right"
    for way in plan.ways:
        fits = "yes" if way.device_bytes <= device_bytes else "no"
        numbers = (way.weight_bytes, way.activation_bytes, way.device_bytes)
        table.add_row(way.stage, way.name, *map(memory_size, numbers), fits)
    console.print(table)

    def write(*lines: str) -> None:
        for line in lines:
            console.print(line, highlight=False, soft_wrap=True, markup=False)

    one_device, own_devices = _answers(model, plan)
    write(*_verdict(plan, device_bytes), *(f"    {command}" for command in one_device))
    if own_devices:
        ways = ", ".join(f"{stage} {way.name}" for stage, way in plan.on_own_devices.items() if way)
        write(f"With {len(STAGES)} devices of {memory_size(device_bytes)}, one for each stage: {ways}.")
        write(*(f"    {command}" for command in own_devices))


def _verdict(plan: MemoryPlan, device_bytes: int) -> list[str]:
    memory = memory_size(device_bytes)
    if plan.on_one_device is None:
        lacking = [stage for stage, way in plan.on_own_devices.items() if way is None]
        fitting = [f"{stage} {way.name}" for stage, way in plan.on_own_devices.items() if way is not None]
        alone = f"; alone fit {', '.join(fitting)}" if fitting else ""
        return [f"{' and '.join(lacking)} fit no device of {memory} in any way{alone}."]
    total = memory_size(sum(way.device_bytes for way in plan.on_one_device))
    ways = ", ".join(f"{way.stage} {way.name}" for way in plan.on_one_device)
    host = sum(way.host_bytes for way in plan.on_one_device)
    kept = [f"The machine's own memory takes {memory_size(host)} besides."] * bool(host)
    if plan.is_all_on_device:
        return [f"On one device of {memory} all stages fit in {total}: {ways}.", *kept]
    return [
        f"On one device of {memory} not all stages fit. {total} take {ways}; run each in a terminal:",
        *kept,
    ]
