"""The three networks with random weights: steps, prompts, decoding, a profile, and steps next to a busy thread."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu.record import Record, Target, timed
from benchmarks.precision import one_scale_float8, quantized
from benchmarks.random_modules import (
    Place,
    autoencoder,
    cut_text_encoder,
    flow_transformer,
    prompt_tokens,
)
from benchmarks.shapes import SHAPES
from klein_core.denoiser.blocks import BlockContext
from klein_core.denoiser.packing import Packing, Span
from klein_core.denoiser.transformer import FlowTransformer
from klein_core.denoiser.workspace import Workspace
from klein_core.quantization.quantized_weight import capability_of, multiplies_float8
from klein_core.text_encoder.encoder import tapped_embedding
from klein_core.vae_decoder.image_io import encode_image

_TEXT_TOKENS = 512
_KERNELS_SHOWN = 15


def networks(target: Target) -> dict[str, FlowTransformer]:
    """Returns the transformer plain, and with fp8 weights where the device multiplies them."""
    plain = flow_transformer(SHAPES[target.variant], Place(str(target.device), target.dtype))
    made = {"bf16" if target.on_gpu else "fp32": plain}
    if multiplies_float8(capability_of(target.device)):
        made["fp8"] = quantized(plain, one_scale_float8)
    return made


def span(target: Target, side_px: int, reference_count: int = 0) -> Span:
    """Returns a random image with references of its own size."""
    config, side = SHAPES[target.variant].transformer, side_px // 16
    text = _TEXT_TOKENS if target.on_gpu else 16
    where: dict[str, Any] = {"device": target.device, "dtype": target.dtype}
    images = [torch.randn(side, side, config.in_channels, **where) for _ in range(1 + reference_count)]
    return Span(torch.randn(text, config.joint_attention_dim, **where), images[0], tuple(images[1:]), 0.9)


def _loads(target: Target) -> Iterator[tuple[str, list[Span]]]:
    """Yields the steps to time, the most wanted first."""
    scale = target.scale
    main = scale.sides_px[min(1, len(scale.sides_px) - 1)]
    for side_px, count in sorted(
        itertools.product(scale.sides_px, scale.reference_counts), key=lambda each: (each[0] != main, each)
    ):
        yield f"{side_px}², {count} references", [span(target, side_px, count)]
    small, quarter = scale.sides_px[0], scale.sides_px[0] // 2
    for batch in scale.batches[1:]:
        yield f"{batch} of {small}²", [span(target, small) for _ in range(batch)]
        yield f"{batch} of {quarter}²", [span(target, quarter) for _ in range(batch)]
    yield f"mix of {small}², {quarter}², {main}²", [span(target, side) for side in (small, quarter, main)]
    mixed = [span(target, small), span(target, quarter, 1), span(target, small, 1), span(target, quarter)]
    yield "mix of 4 with references", mixed


def steps(record: Record, target: Target) -> None:
    """Records a denoising step of each kind: uncompiled, compiled, and replayed as a CUDA graph."""
    loads = dict(_loads(target))
    plain: dict[str, Tensor] = {}
    for name, network in networks(target).items():
        for mode in ("eager", "compiled"):
            if mode == "compiled":
                network.compile_blocks(backend="inductor" if target.on_gpu else "eager")
            for load, spans in loads.items():
                record.attempt(
                    f"{name} {mode} {load}",
                    lambda network=network, spans=spans, load=load: _step(
                        network, spans, target, plain, load
                    ),  # type: ignore[misc]
                )
        if target.on_gpu:
            for load, spans in itertools.islice(loads.items(), 4):
                record.attempt(
                    f"{name} graph {load}",
                    lambda network=network, spans=spans: timed(_captured(network, spans), target),  # type: ignore[misc]
                )


def _step(
    network: FlowTransformer, spans: Sequence[Span], target: Target, plain: dict[str, Tensor], load: str
) -> dict[str, Any]:
    """Times a step and compares its result with the first one of this load, which is uncompiled and unquantized."""
    if target.on_gpu:
        torch.cuda.reset_peak_memory_stats()
    facts: dict[str, Any] = timed(lambda: network(spans), target)
    result = torch.cat([each.flatten() for each in network(spans)]).float().cpu()
    if not bool(result.isfinite().all()):
        facts["error"] = "the result is not finite"
    wanted = plain.setdefault(load, result)
    facts["relative_difference"] = round(float((result - wanted).norm() / wanted.norm()), 6)
    if target.on_gpu:
        facts["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    return facts


def _captured(network: FlowTransformer, spans: Sequence[Span]) -> Callable[[], None]:
    """Captures the blocks of a step as a CUDA graph; what depends on the noise level is computed before."""
    packing = Packing.of(list(spans))
    modulation = network._step_modulation([(each.sigma, each.adapters) for each in spans], packing)
    context = BlockContext(packing, network._rope_table(list(spans), packing), Workspace())

    def run() -> Tensor:
        return network._packed_velocities(list(spans), modulation, context)

    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def prompts(record: Record, target: Target) -> None:
    """Records the text encoder for 1, 2 and 4 prompts, uncompiled and compiled."""
    shape, place = SHAPES[target.variant], Place(str(target.device), target.dtype)
    if not target.on_gpu:
        # The compiler traces each layer, which takes longer than all else of a rehearsal.
        shape = replace(shape, text_encoder=replace(shape.text_encoder, tapped_layers=(1, 2, 3)))
    encoder = cut_text_encoder(shape, place)
    token_ids, mask = prompt_tokens(shape, place)
    taps = shape.text_encoder.tapped_layers
    for mode in ("eager", "compiled"):
        if mode == "compiled":
            encoder.compile(dynamic=False, backend="inductor" if target.on_gpu else "eager")
        for batch in target.scale.batches[:3]:
            ids, masks = token_ids.repeat(batch, 1), mask.repeat(batch, 1)
            record.time(
                f"{mode} {batch} prompts",
                target,
                lambda ids=ids, masks=masks: tapped_embedding(encoder, ids, masks, taps),  # type: ignore[misc,arg-type]
            )


def images(record: Record, target: Target) -> None:
    """Records decoding and encoding by the autoencoder in three layouts, and image files of the result."""
    shape = SHAPES[target.variant]
    network = autoencoder(shape, Place(str(target.device), target.dtype))
    for mode in ("channels-first", "channels-last", "compiled"):
        if mode == "channels-last":
            network.to(memory_format=torch.channels_last)
        if mode == "compiled":
            network.to(memory_format=torch.contiguous_format)
            for part in (network.decoder, network.encoder):
                part.compile(dynamic=False, backend="inductor" if target.on_gpu else "eager")
        for side_px in target.scale.sides_px:
            _image_cases(record, target, network, mode, side_px)
    side_px = target.scale.sides_px[-2]
    # Smooth with noise on it: neither as small a file as a plain one nor as large as noise.
    smooth = torch.rand(3, 8, 8)[None] * 200
    pixels = nn.functional.interpolate(smooth, side_px, mode="bicubic")[0].permute(1, 2, 0)
    pixels = (pixels + torch.randn(side_px, side_px, 3) * 4).clamp(0, 255).to(torch.uint8)
    on_cpu = Target(torch.device("cpu"), target.variant, target.folder)
    for form in ("png", "jpeg", "webp", "raw"):
        record.time(f"{form} of {side_px}²", on_cpu, lambda form=form: encode_image(pixels, form))  # type: ignore[misc]


def _image_cases(record: Record, target: Target, network: Any, mode: str, side_px: int) -> None:
    where: dict[str, Any] = {"device": target.device, "dtype": target.dtype}
    side, channels = side_px // 16, SHAPES[target.variant].vae.packed_channels
    latents = torch.randn(1, channels, side, side, **where)
    pixels = 2 * torch.rand(1, 3, side_px, side_px, **where) - 1
    record.time(f"decode {mode} {side_px}²", target, lambda: network.decode(latents))
    record.time(f"encode {mode} {side_px}²", target, lambda: network.encode(pixels))


def profile(record: Record, target: Target) -> None:
    """Records the kernels of one step by time, and the share of it in which the device idles."""
    for name, network in networks(target).items():
        for mode in ("eager", "compiled"):
            if mode == "compiled":
                network.compile_blocks(backend="inductor" if target.on_gpu else "eager")
            spans = [span(target, target.scale.sides_px[1])]
            record.attempt(
                f"{name} {mode}",
                lambda network=network, spans=spans: _kernels(network, spans, target),  # type: ignore[misc]
            )


def _kernels(network: FlowTransformer, spans: Sequence[Span], target: Target) -> dict[str, Any]:
    activities = [torch.profiler.ProfilerActivity.CPU]
    if target.on_gpu:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    for _ in range(3):
        network(spans)
    wall = timed(lambda: network(spans), target)["ms"]
    with torch.profiler.profile(activities=activities) as taken:
        network(spans)
        if target.on_gpu:
            torch.cuda.synchronize()
    attribute = "self_device_time_total" if target.on_gpu else "self_cpu_time_total"
    rows = [(getattr(row, attribute) / 1e3, row.key, row.count) for row in taken.key_averages()]
    rows.sort(reverse=True)
    busy = sum(row[0] for row in rows)
    shown = [[round(ms, 3), key[:80], count] for ms, key, count in rows[:_KERNELS_SHOWN]]
    return {"wall_ms": wall, "kernels_ms": round(busy, 3), "kernels": shown}


def interference(record: Record, target: Target) -> None:
    """Records a step while another thread runs Python for a share of the time, as the server's event loop does."""
    plain: Mapping[str, FlowTransformer] = networks(target)
    name, network = next(iter(plain.items()))
    spans = [span(target, target.scale.sides_px[0])]
    runs: dict[str, Callable[[], object]] = {"eager": lambda: network(spans)}
    for mode in ("eager", "compiled", "graph"):
        if mode == "compiled":
            network.compile_blocks(backend="inductor" if target.on_gpu else "eager")
        if mode == "graph":
            if not target.on_gpu:
                continue
            record.attempt(
                "capture", lambda: runs.update(graph=_captured(network, spans)) or {"captured": True}
            )
        run = runs.get(mode, runs["eager"]) if mode != "graph" else runs.get("graph")
        for share in target.scale.busy_shares:
            if run is not None:
                with _busy_thread(share):
                    record.time(f"{name} {mode}, a thread busy for {share:.0%}", target, run)


class _busy_thread:
    """Runs Python on another thread for a share of each millisecond, inside a `with` block."""

    def __init__(self, share: float) -> None:
        self._share = share
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> None:
        if self._share:
            self._thread.start()

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        if self._share:
            self._thread.join()

    def _run(self) -> None:
        period = 1e-3
        while not self._stop.is_set():
            end = time.perf_counter() + period * self._share
            while time.perf_counter() < end:
                pass
            time.sleep(period * (1 - self._share))
