"""Accuracy of `klein plan`: estimated against measured memory, each case in its own process.

    python -m benchmarks.plan_accuracy [--check] [--variant klein-4b --device cuda]
    python -m benchmarks.plan_accuracy --calibrate [--emulate]

Memory does not depend on how busy the machine is, so this can run at any time. On a CPU the shape is a quarter-size
klein, and the C library is configured to return freed blocks, because what it keeps for reuse is not the model's need.
`--calibrate` measures two small shapes of different proportions and prints the rows of
`klein_core.memory.activation_bytes.COEFFICIENTS` that fit them best.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import nn

import klein_core.linear
from benchmarks.measure import Bar, command, describe_machine, finish
from benchmarks.peak_memory import Peak, measured_peak
from benchmarks.random_modules import Place, cut_text_encoder, encode_run, flow_transformer, random_module
from benchmarks.shapes import SHAPES, Shape, qwen3
from klein_core.denoiser.packing import Span
from klein_core.linear import Linear, needs_fp32_fallback
from klein_core.memory.activation_bytes import (
    Activations,
    StepShape,
    prompt_activations,
    step_activations,
    tile_size_px,
    vae_activations,
)
from klein_core.memory.precision import PRECISIONS
from klein_core.memory.weight_bytes import text_encoder_bytes, transformer_bytes, vae_bytes
from klein_core.quantization.fp8 import Float8Weight
from klein_core.quantization.quantized_weight import set_weight, share_buffer
from klein_core.vae_decoder.autoencoder import Autoencoder
from klein_core.variants import TextEncoderConfig, TransformerConfig, VaeConfig

Run = Callable[[int, int], object]
BAR = 0.1
TINY_SIDE = 64


@dataclass(frozen=True)
class Case:
    """One stage at one size."""

    stage: str
    """text-encoder, denoiser, decode or encode."""
    precision: str
    width: int = 512
    height: int = 512
    references: int = 0
    """Number of references, each of the image's own size."""
    spans: int = 1
    tiled: bool = False

    def __str__(self) -> str:
        extras = [f"{self.references} references"] * bool(self.references)
        extras += [f"{self.spans} spans"] * (self.spans > 1) + ["tiled"] * self.tiled
        size = "" if self.stage == "text-encoder" else f" {self.width}×{self.height}"
        return f"{self.stage} {self.precision}{size}" + "".join(f", {extra}" for extra in extras)


@dataclass(frozen=True)
class Numbers:
    """Bytes of a case."""

    estimated_weights: int
    estimated_activations: int
    peak: int
    """Peak of the process, without what it held before."""
    activations: int
    """Peak of tensors, without the weights."""

    @property
    def ratio(self) -> float:
        return (self.estimated_weights + self.estimated_activations) / self.peak

    @property
    def activation_ratio(self) -> float:
        """Estimated over measured, without the weights, which are known exactly."""
        return self.estimated_activations / self.activations


CASES = (
    Case("denoiser", "fp32", 384, 384),
    Case("denoiser", "fp32", 256, 384, references=2),
    Case("denoiser", "fp32", 256, 256, spans=4),
    Case("denoiser", "bf16", 384, 384),
    Case("denoiser", "bf16", 256, 256, references=1, spans=2),
    Case("denoiser", "fp8", 256, 256),
    Case("decode", "fp32"),
    Case("decode", "fp32", 768, 320),
    Case("decode", "fp32", 768, 768, tiled=True),
    Case("decode", "bf16", 256, 256),
    Case("encode", "fp32"),
    Case("encode", "fp32", 768, 768, tiled=True),
    Case("encode", "bf16", 256, 256),
    Case("text-encoder", "fp32"),
    Case("text-encoder", "bf16"),
)
CALIBRATION_SHAPES = (
    # Small, and of different proportions, so that the coefficients of two widths are independent.
    Shape(
        TransformerConfig(num_layers=2, num_single_layers=4, num_attention_heads=6, joint_attention_dim=960),
        TextEncoderConfig(qwen3(320, 1216, 4, 1, 64)),
        VaeConfig(block_out_channels=(32, 64, 128, 128)),
    ),
    Shape(
        TransformerConfig(num_layers=2, num_single_layers=3, num_attention_heads=4, joint_attention_dim=960),
        TextEncoderConfig(qwen3(320, 640, 4, 1, 64)),
        VaeConfig(block_out_channels=(64, 64, 64, 64)),
    ),
)
GIVES_BLOCKS_BACK = {"MALLOC_MMAP_THRESHOLD_": str(1 << 18), "MALLOC_TRIM_THRESHOLD_": "0"}
"""Settings of glibc, which otherwise keeps freed blocks: in bf16 a tenth of the peak."""
TILE_PX = 384
"""Tile of the tiled cases: small, so that a CPU makes several tiles in seconds."""


def main() -> int:
    """Runs what the command line asks for."""
    options = _options()
    if options.emulate:
        klein_core.linear.HAS_BFLOAT16_PRODUCTS = False
    if options.only is not None:
        print(json.dumps(asdict(measured(CASES[options.only], SHAPES[options.variant], options.device))))
        return 0
    print(f"{command()}\n{describe_machine('torch', 'transformers')}")
    if options.calibrate:
        calibrate(options)
        return 0
    heads = ("estimate", "measured", "ratio", "activations", "measured", "ratio")
    print(f"{'MiB':<40}" + "".join(f"{head:>12}" for head in heads))
    whole: dict[str, float] = {}
    tensors: dict[str, float] = {}
    for index, case in enumerate(CASES):
        numbers = _in_own_process(index, options)
        print(_row(case, numbers), flush=True)
        whole[case.stage] = max(whole.get(case.stage, 0), abs(numbers.ratio - 1))
        tensors[case.stage] = max(tensors.get(case.stage, 0), abs(numbers.activation_ratio - 1))
    bars = [Bar(f"{stage}: memory off by", share, BAR) for stage, share in whole.items()]
    bars += [Bar(f"{stage}: activations off by", share, BAR) for stage, share in tensors.items()]
    return finish(bars, options.check)


def calibrate(options: argparse.Namespace) -> None:
    """Prints the coefficients with the smallest relative errors over the cases of all calibration shapes."""
    points: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for shape, case in itertools.product(CALIBRATION_SHAPES, CASES):
        precision = PRECISIONS[case.precision]
        # Quantized products are estimated as a GPU makes them, so a CPU's peak would distort the fit.
        if case.tiled or precision.is_quantized or (options.emulate and precision.value_bytes != 2):
            continue
        _, activations = estimate(case, shape, options.device)
        peak = _peak(case, shape, options.device, case.width, case.height)
        # What is exact is subtracted: the coefficients explain the rest.
        rest = (peak.tensor_bytes - activations.exact_bytes) / activations.value_bytes
        row = (activations.features[0] / rest, activations.features[1] / rest)
        points.setdefault((activations.stage, activations.arithmetic), []).append(row)
    for key, rows in points.items():
        first, second = np.linalg.lstsq(np.array(rows), np.ones(len(rows)), rcond=None)[0]
        errors = [first * row[0] + second * row[1] - 1 for row in rows]
        print(f"{key}: ({first:.1f}, {second:.1f}),  # {min(errors):+.1%} to {max(errors):+.1%}")


def _row(case: Case, numbers: Numbers) -> str:
    estimate = numbers.estimated_weights + numbers.estimated_activations
    parts = (
        (estimate, numbers.peak, numbers.ratio),
        (numbers.estimated_activations, numbers.activations, numbers.activation_ratio),
    )
    return f"{case!s:<40}" + "".join(
        f"{told / 2**20:>12.0f}{found / 2**20:>12.0f}{ratio:>12.2f}" for told, found, ratio in parts
    )


def measured(case: Case, shape: Shape, device: str) -> Numbers:
    """Measures a case in this process, after a tiny one that loads code and starts threads."""
    _peak(case, _tiny(case, shape), device, TINY_SIDE, TINY_SIDE)
    peak = _peak(case, shape, device, case.width, case.height)
    weights, activations = estimate(case, shape, device)
    return Numbers(weights, activations.byte_count, peak.peak_bytes, peak.tensor_bytes)


def estimate(case: Case, shape: Shape, device: str) -> tuple[int, Activations]:
    """Returns bytes of weights, and the activations, as `klein plan` estimates them."""
    precision = PRECISIONS[case.precision]
    emulated = needs_fp32_fallback(torch.device(device), torch.bfloat16)
    if case.stage == "text-encoder":
        config = shape.text_encoder
        return text_encoder_bytes(config, precision), prompt_activations(config, precision, emulated=emulated)
    if case.stage == "denoiser":
        tokens = case.width * case.height // 256
        step = StepShape(spans=case.spans, text=512, target=tokens, references=case.references * tokens)
        network = shape.transformer
        return (
            transformer_bytes(network, precision),
            step_activations(network, precision, step, emulated=emulated),
        )
    vae, value_bytes = _vae(case, shape), precision.value_bytes
    width, height = tile_size_px(vae, case.width, case.height) if case.tiled else (case.width, case.height)
    return (
        vae_bytes(vae, value_bytes),
        vae_activations(vae, case.stage, width, height, value_bytes, emulated=emulated),
    )


def _peak(case: Case, shape: Shape, device: str, width: int, height: int) -> Peak[Run]:
    place = Place(device, torch.float32 if case.precision == "fp32" else torch.bfloat16)
    with torch.no_grad():
        return measured_peak(device, lambda: _build(case, shape, place), lambda run: run(width, height))


def _build(case: Case, shape: Shape, place: Place) -> Run:
    if case.stage == "text-encoder":
        encode = encode_run(cut_text_encoder(shape, place), shape, place)
        return lambda width, height: encode()
    if case.stage == "denoiser":
        network = flow_transformer(shape, place)
        if case.precision == "fp8":
            _quantize(network)
        return lambda width, height: network(_spans(case, shape, place, width, height))
    vae = _vae(case, shape)
    module = random_module(lambda: Autoencoder(vae), place)
    for parameter in module.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    return lambda width, height: _through(module, case, vae, place, width, height)


def _through(
    module: nn.Module, case: Case, vae: VaeConfig, place: Place, width: int, height: int
) -> torch.Tensor:
    draw = {"device": place.device, "dtype": place.dtype}
    if case.stage == "decode":
        latents = torch.randn(1, vae.packed_channels, height // 16, width // 16, **draw)
        return module.decode(latents, tiled=case.tiled)  # type: ignore[operator,no-any-return]
    return module.encode(torch.randn(1, 3, height, width, **draw), tiled=case.tiled)  # type: ignore[operator,no-any-return]


def _quantize(network: nn.Module) -> None:
    for name, layer in list(network.named_modules()):
        if isinstance(layer, Linear) and "transformer_blocks" in name:
            set_weight(network, f"{name}.weight", Float8Weight.of(layer.weight.detach()))
    share_buffer(network)


def _spans(case: Case, shape: Shape, place: Place, width: int, height: int) -> list[Span]:
    draw = {"device": place.device, "dtype": place.dtype}

    def image() -> torch.Tensor:
        return torch.randn(height // 16, width // 16, shape.transformer.in_channels, **draw)

    def prompt() -> torch.Tensor:
        return torch.randn(512, shape.transformer.joint_attention_dim, **draw)

    return [
        Span(prompt(), image(), tuple(image() for _ in range(case.references)), 0.9)
        for _ in range(case.spans)
    ]


def _vae(case: Case, shape: Shape) -> VaeConfig:
    changed = asdict(shape.vae) | ({"sample_size": TILE_PX} if case.tiled else {})
    return VaeConfig(**changed)


def _tiny(case: Case, shape: Shape) -> Shape:
    """Returns a shape that runs the same code in a hundredth of the memory."""
    network = TransformerConfig(
        num_layers=1, num_single_layers=2, num_attention_heads=1, joint_attention_dim=64
    )
    qwen3 = shape.text_encoder.qwen3 | {
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": 64,
    }
    encoder = type(shape.text_encoder)(qwen3)
    return Shape(network, encoder, VaeConfig(block_out_channels=(32, 32, 32, 32)))


def _in_own_process(index: int, options: argparse.Namespace) -> Numbers:
    arguments = ["--only", str(index), "--variant", options.variant, "--device", options.device]
    arguments += ["--emulate"] * options.emulate
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.plan_accuracy", *arguments],
        stdout=subprocess.PIPE,
        env=os.environ | GIVES_BLOCKS_BACK,
        text=True,
        check=True,
    )
    return Numbers(**json.loads(done.stdout.splitlines()[-1]))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--variant", choices=SHAPES, default="quarter")
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--check", action="store_true", help="fail when an estimate is off by more than a tenth"
    )
    parser.add_argument("--calibrate", action="store_true", help="print fitted coefficients")
    parser.add_argument(
        "--emulate", action="store_true", help="compute bfloat16 as a processor without its products does"
    )
    parser.add_argument("--only", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
