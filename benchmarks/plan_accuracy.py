"""What `klein plan` says a stage takes, beside what it takes: each case in a process of its own.

Memory does not depend on how busy the machine is, so this can run at any time. On a CPU the shape is a
quarter-size klein, and the C library is told to give freed blocks back, as what it keeps for later is no need of the
model's; `--device cuda --variant klein-4b` takes the real one.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import nn

from benchmarks.contenders import Place, cut_text_encoder, encode_run, flow_transformer, random_module
from benchmarks.measure import Bar, command, describe_machine, finish
from benchmarks.peak_memory import Peak, measured_peak
from benchmarks.shapes import SHAPES, Shape
from klein_core.denoiser.packing import Span
from klein_core.linear import Linear, needs_fp32_fallback
from klein_core.memory import autoencoder, text_encoder, transformer
from klein_core.memory.precision import PRECISIONS
from klein_core.quantization.fp8 import Float8Weight
from klein_core.quantization.quantized_weight import set_weight, share_buffer
from klein_core.vae_decoder.autoencoder import Autoencoder
from klein_core.variants import TransformerConfig, VaeConfig

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
    """Of the image's own size."""
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
    """Of the process, beside what it took before."""
    activations: int
    """Of tensors at once, the weights not included."""

    @property
    def ratio(self) -> float:
        return (self.estimated_weights + self.estimated_activations) / self.peak

    @property
    def activation_ratio(self) -> float:
        """Without the weights, which are known exactly."""
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
    Case("text-encoder", "fp32"),
    Case("text-encoder", "bf16"),
)
GIVES_BLOCKS_BACK = {"MALLOC_MMAP_THRESHOLD_": str(1 << 18), "MALLOC_TRIM_THRESHOLD_": "0"}
"""For glibc, which otherwise keeps ever larger blocks for later: in bf16 a tenth of the whole."""
TILE_PX = 384
"""Of the tiled cases, so that a processor has more than one tile to make in seconds."""


def main() -> int:
    """Runs what the command line asks for."""
    options = _options()
    if options.only is not None:
        print(json.dumps(asdict(measured(CASES[options.only], SHAPES[options.variant], options.device))))
        return 0
    print(f"{command()}\n{describe_machine('torch', 'transformers')}")
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
    """Builds and runs a case here, after a small one that loads code and starts threads."""
    _peak(case, _tiny(case, shape), device, TINY_SIDE, TINY_SIDE)
    peak = _peak(case, shape, device, case.width, case.height)
    return Numbers(*estimate(case, shape, device), peak.peak_bytes, peak.tensor_bytes)


def estimate(case: Case, shape: Shape, device: str) -> tuple[int, int]:
    """Returns bytes of weights and of activations as `klein plan` counts them."""
    precision = PRECISIONS[case.precision]
    emulated = needs_fp32_fallback(torch.device(device), torch.bfloat16)
    if case.stage == "text-encoder":
        words = shape.text_encoder
        return (
            text_encoder.weight_bytes(words, precision),
            text_encoder.encode_bytes(words, precision, emulated=emulated),
        )
    if case.stage == "denoiser":
        tokens = case.width * case.height // 256
        step = transformer.StepShape(
            spans=case.spans, text=512, target=tokens, references=case.references * tokens
        )
        config = shape.transformer
        return (
            transformer.weight_bytes(config, precision),
            transformer.step_bytes(config, precision, step, emulated=emulated),
        )
    vae = _vae(case, shape)
    size = (
        autoencoder.tiled_size_px(vae, case.width, case.height) if case.tiled else (case.width, case.height)
    )
    count = autoencoder.decode_bytes if case.stage == "decode" else autoencoder.encode_bytes
    value_bytes = precision.value_bytes
    return autoencoder.weight_bytes(vae, value_bytes), count(vae, *size, value_bytes, emulated=emulated)


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
    """Returns a shape of the same code in a hundredth of the memory."""
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
    told = ["--only", str(index), "--variant", options.variant, "--device", options.device]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.plan_accuracy", *told],
        stdout=subprocess.PIPE,
        env=os.environ | GIVES_BLOCKS_BACK,
        text=True,
        check=True,
    )
    return Numbers(**json.loads(done.stdout.splitlines()[-1]))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--variant", choices=SHAPES, default="quarter")
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--check", action="store_true", help="fail when an estimate is off by more than a tenth"
    )
    parser.add_argument("--only", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
