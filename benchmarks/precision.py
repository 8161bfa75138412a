"""Precisions of the weights compared with bfloat16 in one run: bytes, images and the time of a step.

Bytes and times are of a klein with random weights, quantized here as the published files are; `--device cuda
--variant klein-4b` selects the real shape. Images are those of the embedded model, which is small but trained.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from benchmarks.measure import Bar, alternate, command, describe_machine, finish, paired_ratio
from benchmarks.random_modules import Place, Run, StepInputs, flow_transformer, step_run
from benchmarks.shapes import SHAPES
from klein_core.denoiser.transformer import FlowTransformer, is_block_linear
from klein_core.pico import WEIGHTS
from klein_core.pipeline import Pipeline
from klein_core.quantization import fp8, nvfp4
from klein_core.quantization.fp8 import Float8Weight, Int8Weight
from klein_core.quantization.nvfp4 import Float4Weight, quantized_inputs, swizzled
from klein_core.quantization.quantized_weight import (
    QuantizedWeight,
    capability_of,
    multiplies_float4,
    multiplies_float8,
    set_weight,
    share_buffer,
)

DTYPE = torch.bfloat16
BYTES_BARS = {"fp8": 0.62, "fp8 at load": 0.62, "int8 at load": 0.62, "nvfp4": 0.45}
PSNR_BARS_DB = {"fp8": 40.0, "fp8 at load": 40.0, "int8 at load": 45.0, "nvfp4": 36.0}
PICTURE_SIDE_PX = 128
PROMPTS = (
    "a large red heart on a yellow background",
    "a blue star",
    "a green circle above an orange square on a black background",
)
"""Of pico's own world: where it was trained a picture is sharp, and a difference means something."""


def main() -> int:
    """Runs the selected measurements; returns the exit code."""
    options = _options()
    torch.manual_seed(0)
    print(f"{command()}\n{describe_machine('torch')}")
    capability = capability_of(torch.device(options.device))
    for bits, has in ((8, multiplies_float8(capability)), (4, multiplies_float4(capability))):
        print(f"products of {bits}-bit floats: {'by the device' if has else 'none, weights are unfolded'}")
    with torch.inference_mode():
        bars = _bytes_and_times(options) + ([] if options.no_pictures else _pictures(options.device))
    return finish(bars, options.check)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--variant", choices=sorted(SHAPES), default="quarter")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--size", type=int, default=512, help="width and height of the image in pixels")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--no-pictures", action="store_true", help="leave out the embedded model's images")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a limit is missed")
    return parser.parse_args()


def one_scale_float8(weight: Tensor) -> QuantizedWeight:
    """Quantizes like the authors' fp8 files, without a static input scale."""
    scale = weight.float().abs().amax().view(1) / fp8.LARGEST
    return Float8Weight(fp8.float8(weight.float(), scale), scale, dtype=weight.dtype)


def two_scale_nvfp4(weight: Tensor) -> QuantizedWeight:
    """Quantizes like the authors' NVFP4 files, without a static input scale."""
    exact = weight.float()
    scale = exact.abs().amax().view(1, 1) / (fp8.LARGEST * nvfp4.LARGEST)
    packed, block_scales = quantized_inputs(exact, scale)
    return Float4Weight(packed, swizzled(block_scales), scale, dtype=weight.dtype)


QUANTIZERS: Mapping[str, Callable[[Tensor], QuantizedWeight]] = {
    "fp8": one_scale_float8,
    "fp8 at load": Float8Weight.of,
    "int8 at load": Int8Weight.of,
    "nvfp4": two_scale_nvfp4,
}


def quantized(plain: FlowTransformer, quantize: Callable[[Tensor], QuantizedWeight]) -> FlowTransformer:
    """Returns a network with quantized block matrices; it shares all other tensors."""
    with torch.device("meta"):
        made = FlowTransformer(plain.config)
    weights = plain.state_dict()
    for name in [name for name in weights if is_block_linear(name)]:
        set_weight(made, name, quantize(weights.pop(name)))
    made.load_state_dict(weights, strict=False, assign=True)
    share_buffer(made)
    return made.eval().requires_grad_(False)


def byte_count(module: nn.Module) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in module.state_dict().values())


def _bytes_and_times(options: argparse.Namespace) -> list[Bar]:
    shape, where = SHAPES[options.variant], Place(options.device, DTYPE)
    plain = flow_transformer(shape, where)
    networks = {"bf16": plain} | {name: quantized(plain, make) for name, make in QUANTIZERS.items()}
    inputs = StepInputs.draw(shape, where, options.size, 0)
    runs: dict[str, Run] = {name: step_run(network, inputs) for name, network in networks.items()}
    seconds = alternate(
        {name: _synchronized(run, options.device) for name, run in runs.items()}, options.repeats
    )
    bars, bf16_bytes = [], byte_count(plain)
    print(f"\n{options.variant} on {options.device}, one step of one {options.size}² image\n")
    print("| weights | GiB | of bf16's bytes | of bf16's time |\n|---|---|---|---|")
    for name, network in networks.items():
        share = byte_count(network) / bf16_bytes
        time = 1 / paired_ratio(seconds["bf16"], seconds[name])
        print(f"| {name} | {byte_count(network) / 1024**3:.3f} | {share:.3f} | {time:.2f} |")
        if name in BYTES_BARS:
            bars.append(Bar(f"bytes of {name}", share, BYTES_BARS[name]))
    return bars


def _synchronized(run: Run, device: str) -> Run:
    def synchronized() -> Tensor:
        result = run()
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        return result

    return synchronized


def _pictures(device: str) -> list[Bar]:
    plain = Pipeline.from_folder(WEIGHTS, device=device, dtype=DTYPE)
    expected = _paint(plain)
    bars = []
    print(f"\npico, {len(PROMPTS)} pictures of {PICTURE_SIDE_PX}² against bf16's\n")
    print("| denoiser's weights | least PSNR, dB | mean PSNR, dB |\n|---|---|---|")
    for name, make in QUANTIZERS.items():
        network = quantized(plain.transformer, make)
        painted = _paint(Pipeline(plain.text_encoder, network, plain.vae_decoder, plain.is_distilled))
        values = [_psnr_db(one, other) for one, other in zip(painted, expected, strict=True)]
        print(f"| {name} | {min(values):.1f} | {sum(values) / len(values):.1f} |")
        bars.append(Bar(f"PSNR of {name}", min(values), PSNR_BARS_DB[name], at_most=False))
    return bars


def _paint(pipeline: Pipeline) -> list[Tensor]:
    size = {"width_px": PICTURE_SIDE_PX, "height_px": PICTURE_SIDE_PX}
    return [next(pipeline.generate(prompt, seeds=[i], **size)).cpu() for i, prompt in enumerate(PROMPTS)]


def _psnr_db(one: Tensor, other: Tensor) -> float:
    error = (one.float() - other.float()).square().mean()
    return float(10 * torch.log10(255**2 / error))


if __name__ == "__main__":
    raise SystemExit(main())
