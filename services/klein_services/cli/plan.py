"""What `klein plan` is asked about, from a name, a folder or a file: by configurations and headers, no weights."""

from __future__ import annotations

import json
import re
import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from klein_core.checkpoint import key_mapping
from klein_core.checkpoint.config import read_transformer_config, read_variant
from klein_core.checkpoint.files import Checkpoint, ModelFiles
from klein_core.errors import CheckpointError, Violation
from klein_core.memory.plan import (
    DENOISER,
    STAGES,
    TEXT_ENCODER,
    Need,
    Plan,
    PlannedModel,
    Workload,
    make_plan,
)
from klein_core.memory.precision import PRECISIONS
from klein_core.model_registry import variants_of_shape
from klein_core.params import DEFAULT_LIMITS, size_violations
from klein_services.cli.errors import CliError, with_period
from klein_services.cli.exit_codes import FAILED, MISUSED
from klein_services.cli.hub.catalog import Choice, choose, is_known
from klein_services.cli.model_store import PICO, find_place
from klein_services.cli.output import memory_size

_PRECISIONS = {"F32": "fp32", "F16": "bf16", "BF16": "bf16", "F8_E4M3": "fp8", "U8": "nvfp4", "I8": "int8"}
"""Dtype of most of a file's bytes → precision; two bytes are two bytes."""


def planned_model(model: str) -> PlannedModel:
    """Finds a model's shapes: of one on disk, or of a published one whether it was pulled or not.

    Raises:
        CliError: there is no such model, or its files are not a klein model's.
    """
    if model != PICO and is_known(model) and not Path(model).exists():
        return _published(choose(model))
    try:
        place = find_place(model)
        return _in_folder(model, place) if place.is_dir() else _bare_transformer(model, place)
    except CheckpointError as error:
        raise CliError(with_period(str(error)), "`klein inspect` tells what a file is.", MISUSED) from error


def _published(choice: Choice) -> PlannedModel:
    row = choice.variant
    if row is None:
        raise TypeError(f"{choice.name} is no row of the table")
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


def _bare_transformer(name: str, path: Path) -> PlannedModel:
    """Takes the other parts from the published model of that size, of which there is one kind each.

    Raises:
        CheckpointError: it is no transformer's file, or of no published size.
    """
    files = ModelFiles.of(path)
    config, network = read_transformer_config(files), _stored_precision(files.open(key_mapping.TRANSFORMER))
    rows = variants_of_shape(config)
    if not rows:
        raise CheckpointError(f"{path} has the shape of no published model, so its other parts are not known")
    return PlannedModel(
        name=name,
        text_encoder=rows[0].text_encoder,
        transformer=config,
        vae=rows[0].vae,
        plain=network if network in ("fp32", "bf16") else "bf16",
        transformer_stored=network,
    )


def _stored_precision(checkpoint: Checkpoint) -> str:
    """Returns the precision of most of a checkpoint's bytes.

    Raises:
        CheckpointError: a header cannot be read, or the dtype is no weights'.
    """
    counts: Counter[str] = Counter()
    for name in checkpoint.files:
        entry = checkpoint.entry(name)
        counts[entry.dtype] += entry.byte_count
    dtype = counts.most_common(1)[0][0] if counts else "none"
    if dtype not in _PRECISIONS:
        raise CheckpointError(f"{checkpoint.path} has weights of dtype {dtype}, which are not klein's")
    return _PRECISIONS[dtype]


_UNITS = {
    "": 1,
    "k": 10**3,
    "m": 10**6,
    "g": 10**9,
    "t": 10**12,
    "ki": 1 << 10,
    "mi": 1 << 20,
    "gi": 1 << 30,
    "ti": 1 << 40,
}
_MEMORY = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]i?)?b?", re.IGNORECASE)
_SIZE = re.compile(r"(\d{1,6})x(\d{1,6})")
_LARGEST_COUNT = 64


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """What the command line said."""

    model: str
    device_memory: str
    sizes: str = "1024x1024"
    references: int = 0
    batch: int = 1
    precisions: tuple[str, ...] = ()
    as_json: bool = False


def run_plan(options: PlanOptions, console: Console) -> int:
    """Prints the plan; returns 0 when all stages fit, together or apart.

    Raises:
        CliError: an option cannot be used, or there is no such model.
    """
    device_bytes = memory_bytes(options.device_memory)
    workload = Workload(_sizes(options.sizes), _count("--references", options.references, 0), options.batch)
    _count("--batch", options.batch, 1)
    unknown = [name for name in options.precisions if name not in PRECISIONS]
    if unknown:
        raise CliError(f"--precision {unknown[0]} is not one of {', '.join(PRECISIONS)}.", exit_code=MISUSED)
    model = planned_model(options.model)
    plan = make_plan(model, workload, device_bytes, options.precisions)
    if options.as_json:
        console.print_json(json.dumps(_as_json(model, plan, device_bytes)))
    else:
        _show(model, plan, device_bytes, console)
    return 0 if plan.together or all(plan.apart.values()) else FAILED


def memory_bytes(text: str) -> int:
    """Reads 12GiB, 24GB, 512M or a number of bytes.

    Raises:
        CliError: it is none of these.
    """
    match = _MEMORY.fullmatch(text.strip())
    amount = float(match[1]) * _UNITS[(match[2] or "").lower()] if match else 0
    if amount < 1:
        raise CliError(
            f"--device-memory {text} is no amount of memory.", "Write it as 12GiB or 24GB.", MISUSED
        )
    return int(amount)


def _sizes(text: str) -> tuple[tuple[int, int], ...]:
    return tuple(_size(entry.strip()) for entry in text.split(","))


def _size(entry: str) -> tuple[int, int]:
    match = _SIZE.fullmatch(entry)
    if match is None:
        raise CliError(f"--sizes has {entry!r}.", "Write sizes as 1024x1024,1536x1024.", MISUSED)
    width, height = int(match[1]), int(match[2])
    violations: list[Violation] = list(size_violations(width, height, DEFAULT_LIMITS))
    if violations:
        told = "; ".join(f"{each.field} {each.description}" for each in violations)
        raise CliError(f"--sizes has {entry}: {told}.", exit_code=MISUSED)
    return width, height


def _count(flag: str, value: int, minimum: int) -> int:
    if not minimum <= value <= _LARGEST_COUNT:
        raise CliError(f"{flag} is {value}; must be in [{minimum}, {_LARGEST_COUNT}].", exit_code=MISUSED)
    return value


def _commands(model: PlannedModel, groups: Sequence[Sequence[Need]]) -> list[str]:
    """Returns what starts stages: a command for each group, all of them with one model's name.

    Args:
        model: what was asked about.
        groups: stages that start together; a group of one is a stage of its own.
    """
    published = [
        need.precision for group in groups for need in group if _is_pulled(model, need, _flags(model, group))
    ]
    # Stages of two pulled folders would name two models, and no request could use both.
    name = shlex.quote("-".join([model.name, *published]))
    pulls = [f"klein pull {model.name} --precision {precision}" for precision in published]
    return pulls + [
        " ".join([_what_starts(group), "--model", name, "--device cuda", *_flags(model, group)])
        for group in groups
    ]


def _what_starts(group: Sequence[Need]) -> str:
    return "klein up" if len(group) > 1 else f"klein serve {group[0].stage}"


def _flags(model: PlannedModel, needs: Sequence[Need]) -> list[str]:
    quantized = {need.precision for need in needs if need.stage == TEXT_ENCODER} - {model.text_stored}
    quantized |= {
        need.precision for need in needs if need.stage == DENOISER and not model.has_file(need.precision)
    }
    flags = [f"--quantization {name}" for name in sorted(quantized)]
    return flags + ["--offload blocks"] * any(need.is_offloaded for need in needs)


def _is_pulled(model: PlannedModel, need: Need, flags: Sequence[str]) -> bool:
    """Whether its precision is that of a published file of its own, as only transformers have."""
    is_published = need.stage == DENOISER and need.precision in model.published
    return is_published and f"--quantization {need.precision}" not in flags


def _as_json(model: PlannedModel, plan: Plan, device_bytes: int) -> dict[str, object]:
    def told(need: Need | None) -> dict[str, object] | None:
        return None if need is None else asdict(need) | {"device_bytes": need.device_bytes}

    return {
        "model": model.name,
        "device_bytes": device_bytes,
        "needs": [told(need) for need in plan.needs],
        "together": None if plan.together is None else [told(need) for need in plan.together],
        "apart": {stage: told(plan.apart[stage]) for stage in STAGES},
        "commands": _suggested(model, plan),
    }


def _suggested(model: PlannedModel, plan: Plan) -> list[str]:
    if plan.together is not None:
        return _commands(model, [plan.together])
    return _commands(model, [[need] for need in plan.apart.values() if need is not None])


def _show(model: PlannedModel, plan: Plan, device_bytes: int, console: Console) -> None:
    table = Table("Stage", "Weights as", "Weights", "Working", "In all", "Fits")
    for column in table.columns:
        column.no_wrap = True
    for column in table.columns[2:5]:
        column.justify = "right"
    for need in plan.needs:
        fits = "yes" if need.device_bytes <= device_bytes else "no"
        numbers = (need.weight_bytes, need.activation_bytes, need.device_bytes)
        table.add_row(need.stage, need.name, *map(memory_size, numbers), fits)
    console.print(table)
    console.print(_verdict(plan, device_bytes), highlight=False, soft_wrap=True)
    for command in _suggested(model, plan):
        console.print(f"    {command}", highlight=False, soft_wrap=True)


def _verdict(plan: Plan, device_bytes: int) -> str:
    memory = memory_size(device_bytes)
    if plan.together is not None:
        total = memory_size(sum(need.device_bytes for need in plan.together))
        ways = ", ".join(f"{need.stage} {need.name}" for need in plan.together)
        host = sum(need.host_bytes for need in plan.together)
        kept = f"\nThe machine's memory keeps {memory_size(host)} of blocks." if host else ""
        return f"On one device of {memory} all stages fit in {total}: {ways}.{kept}"
    fitting = [f"{stage} {need.name}" for stage, need in plan.apart.items() if need is not None]
    lacking = [stage for stage, need in plan.apart.items() if need is None]
    if lacking:
        alone = f"; alone fit {', '.join(fitting)}" if fitting else ""
        return f"{' and '.join(lacking)} fit no device of {memory} in any way{alone}."
    return f"Not all stages fit one device of {memory}. Each on a device of its own: {', '.join(fitting)}."
