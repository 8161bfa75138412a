"""One denoising step, one prompt's encoding and one image's decoding against diffusers, alternating in one run.

Both sides get the same random weights, and their results are compared before anything is timed. On a CPU the shape is
a quarter-size klein; `--device cuda --variant klein-4b` takes the real one.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict

import torch
from diffusers import AutoencoderKLFlux2, Flux2Transformer2DModel
from torch import Tensor, nn
from transformers import Qwen3Config, Qwen3ForCausalLM

from benchmarks.measure import Bar, alternate, command, describe_machine, finish, paired_ratio
from benchmarks.shapes import SHAPES, Shape
from klein_core.denoiser.checkpoint import checkpoint_names
from klein_core.denoiser.span import Span
from klein_core.denoiser.transformer import FlowTransformer
from klein_core.text_encoder.encoder import build_cut_qwen3, tapped_embedding
from klein_core.vae_decoder.autoencoder import Autoencoder

Candidates = dict[str, Callable[[], Tensor]]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SIGMA = 0.9


def main() -> int:
    """Runs what the command line asks for."""
    options = _options()
    torch.manual_seed(0)
    if options.only_peak:
        _report_peak(options)
        return 0
    print(f"{command()}\n{describe_machine('torch', 'diffusers', 'transformers')}")
    if options.device != "cpu":
        print(torch.cuda.get_device_name())
    bars = [bar for dtype in options.dtypes for bar in _measure(options, dtype)]
    if options.device == "cpu" and not options.no_memory:
        bars += [_memory_bar(options, part) for part in ("step", "encode")]
    return finish(bars, options.check)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--variant", choices=sorted(SHAPES), default="quarter")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtypes", nargs="+", choices=sorted(DTYPES), default=["fp32", "bf16"])
    parser.add_argument("--size", type=int, default=512, help="width and height of the image in pixels")
    parser.add_argument("--references", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--parts", nargs="+", default=["step", "encode", "decode"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--compile", action="store_true", help="compile our two block functions as well")
    parser.add_argument("--no-memory", action="store_true", help="leave out the peak memory of fresh processes")
    parser.add_argument("--check", action="store_true", help="exit 1 when a bar is missed")
    parser.add_argument("--only-peak", choices=["ours", "diffusers"], help=argparse.SUPPRESS)
    return parser.parse_args()


def _measure(options: argparse.Namespace, dtype: str) -> list[Bar]:
    shape, bars = SHAPES[options.variant], []
    if "step" in options.parts:
        ours, oracle = transformers(shape, options.device, DTYPES[dtype])
        for count in options.references:
            name = f"step {dtype} {options.size}² {count} references"
            candidates = step_candidates(ours, oracle, shape, options.size, count)
            bars.append(Bar(f"{name}, speed-up", _speed_up(name, candidates, options), 1.1, at_most=False))
        if options.compile:
            ours.compile_blocks()
            for count in options.references:
                name = f"compiled step {dtype} {options.size}² {count} references"
                candidates = step_candidates(ours, oracle, shape, options.size, count)
                bars.append(Bar(f"{name}, speed-up", _speed_up(name, candidates, options), 1.25, at_most=False))
        del ours, oracle
    if "encode" in options.parts:
        speed_up = _speed_up(f"encode {dtype}", encode_candidates(shape, options.device, DTYPES[dtype]), options)
        bars.append(Bar(f"encode {dtype}, speed-up", speed_up, 1.3, at_most=False))
    if "decode" in options.parts:
        candidates = decode_candidates(shape, options.device, DTYPES[dtype], options.size)
        bars.append(Bar(f"decode {dtype} {options.size}², speed-up", _speed_up("decode", candidates, options), 0.95, False))
    return bars


def _speed_up(name: str, candidates: Candidates, options: argparse.Namespace) -> float:
    with torch.no_grad():
        _require_equal(name, candidates)
        seconds = alternate({key: _synchronised(run, options.device) for key, run in candidates.items()}, options.repeats)
    ratio = paired_ratio(seconds["diffusers"], seconds["ours"])
    best = {key: min(values) for key, values in seconds.items()}
    print(f"{name}: ours {best['ours']:.4f} s, diffusers {best['diffusers']:.4f} s, {ratio:.2f}× as fast", flush=True)
    return ratio


def _require_equal(name: str, candidates: Candidates) -> None:
    """Refuses to time two sides that compute different things."""
    ours, oracle = candidates["ours"]().float(), candidates["diffusers"]().float()
    error = float((ours - oracle).norm() / oracle.norm())
    if not error < 0.05:
        raise SystemExit(f"{name}: results differ by {error:.2g} of their norm; nothing was timed")


def _synchronised(run: Callable[[], Tensor], device: str) -> Callable[[], Tensor]:
    if device == "cpu":
        return run

    def synchronised() -> Tensor:
        result = run()
        torch.cuda.synchronize()
        return result

    return synchronised


def transformers(shape: Shape, device: str, dtype: torch.dtype) -> tuple[FlowTransformer, nn.Module]:
    """Builds both transformers; unfused weights are shared."""
    oracle = _random(lambda: Flux2Transformer2DModel(**asdict(shape.transformer), guidance_embeds=False), device, dtype)
    with torch.device("meta"):
        ours = FlowTransformer(shape.transformer)
    weights, fused = oracle.state_dict(), checkpoint_names(shape.transformer)
    state = {
        name: torch.cat([weights[part] for part in fused[name]]) if name in fused else weights[name]
        for name in ours.state_dict()
    }
    ours.load_state_dict(state, assign=True)
    return ours.requires_grad_(False), oracle


def step_candidates(
    ours: FlowTransformer, oracle: nn.Module, shape: Shape, size: int, reference_count: int
) -> Candidates:
    """One step of one image with references of its own size."""
    side, config = size // 16, shape.transformer
    draw = {"device": ours.device, "dtype": ours.dtype}
    prompt = torch.randn(512, config.joint_attention_dim, **draw)
    images = [torch.randn(side, side, config.in_channels, **draw) for _ in range(1 + reference_count)]
    span = Span(prompt, images[0], tuple(images[1:]), SIGMA)
    tokens = torch.cat([image.flatten(0, 1) for image in images])[None]
    image_ids = torch.cat([_grid_ids(side, 10 * index) for index in range(1 + reference_count)]).to(ours.device)
    text_ids = torch.zeros(512, 4, device=ours.device)
    text_ids[:, 3] = torch.arange(512)
    timestep = torch.tensor([SIGMA], **draw)

    def reference() -> Tensor:
        output = oracle(
            hidden_states=tokens,
            encoder_hidden_states=prompt[None],
            timestep=timestep,
            txt_ids=text_ids,
            img_ids=image_ids,
            return_dict=False,
        )[0]
        return output[0, : side * side]

    return {"ours": lambda: ours([span])[0].flatten(0, 1), "diffusers": reference}


def encode_candidates(shape: Shape, device: str, dtype: torch.dtype) -> Candidates:
    """One prompt of 512 tokens, 40 of them real."""
    config = shape.text_encoder
    oracle = _random(lambda: Qwen3ForCausalLM(Qwen3Config(**config.qwen3)), device, dtype)
    ours = build_cut_qwen3(config, device)
    weights = oracle.state_dict()
    ours.load_state_dict({name: weights[f"model.{name}"] for name in ours.state_dict()}, assign=True)
    ours.requires_grad_(False)
    token_ids = torch.randint(0, config.qwen3["vocab_size"], (1, config.sequence_length), device=device)
    mask = (torch.arange(config.sequence_length, device=device) < 40).long()[None]

    def reference() -> Tensor:
        states = oracle(input_ids=token_ids, attention_mask=mask, output_hidden_states=True, use_cache=False).hidden_states
        return torch.cat([states[tap] for tap in config.tapped_layers], dim=-1)

    return {"ours": lambda: tapped_embedding(ours, token_ids, mask, config.tapped_layers), "diffusers": reference}


def decode_candidates(shape: Shape, device: str, dtype: torch.dtype, size: int) -> Candidates:
    """One image from its packed, normalised latents."""
    oracle = _random(lambda: AutoencoderKLFlux2(**asdict(shape.vae)), device, dtype)
    with torch.device("meta"):
        ours = Autoencoder(shape.vae)
    ours.load_state_dict(oracle.state_dict(), assign=True)
    ours.requires_grad_(False).eval()
    latents = torch.randn(1, shape.vae.packed_channels, size // 16, size // 16, device=device, dtype=dtype)

    def reference() -> Tensor:
        statistics = oracle.bn
        mean, variance = statistics.running_mean.view(1, -1, 1, 1), statistics.running_var.view(1, -1, 1, 1)
        packed = latents * torch.sqrt(variance + shape.vae.batch_norm_eps).to(dtype) + mean.to(dtype)
        batch, channels, rows, columns = packed.shape
        patches = packed.reshape(batch, channels // 4, 2, 2, rows, columns).permute(0, 1, 4, 2, 5, 3)
        return oracle.decode(patches.reshape(batch, channels // 4, 2 * rows, 2 * columns), return_dict=False)[0]

    return {"ours": lambda: ours.decode(latents), "diffusers": reference}


def _grid_ids(side: int, time: int) -> Tensor:
    axes = (torch.tensor([time]), torch.arange(side), torch.arange(side), torch.arange(1))
    return torch.cartesian_prod(*axes)


def _random(build: Callable[[], nn.Module], device: str, dtype: torch.dtype) -> nn.Module:
    """Builds a module with weights that keep activations near unit variance, directly on the device."""
    with torch.device("meta"):
        module = build()
    module = module.to(dtype).to_empty(device=device).eval().requires_grad_(False)
    for name, value in module.state_dict().items():
        if value.ndim >= 2:
            value.normal_(std=(value[0].numel()) ** -0.5)
        else:
            value.fill_(1 if name.endswith(("weight", "running_var")) else 0)
    _restore_rotary(module, device)
    return module


def _restore_rotary(module: nn.Module, device: str) -> None:
    """Recomputes Qwen3's rotary frequencies, which are not part of its state."""
    if isinstance(module, Qwen3ForCausalLM):
        module.model.rotary_emb = type(module.model.rotary_emb)(module.config).to(device)


def _memory_bar(options: argparse.Namespace, part: str) -> Bar:
    """Compares the peak resident memory of fresh processes that do one part once."""
    peaks = {side: _peak_of_fresh_process(options, part, side) for side in ("ours", "diffusers")}
    print(f"{part} peak memory: ours {peaks['ours']:.0f} MB, diffusers {peaks['diffusers']:.0f} MB")
    return Bar(f"{part} peak memory against diffusers", peaks["ours"] / peaks["diffusers"], 1.0)


def _peak_of_fresh_process(options: argparse.Namespace, part: str, side: str) -> float:
    arguments = ["--variant", options.variant, "--parts", part, "--only-peak", side, "--size", str(options.size)]
    output = subprocess.run(
        [sys.executable, "-m", "benchmarks.core", *arguments], check=True, capture_output=True, text=True
    )
    return float(output.stdout)


def _report_peak(options: argparse.Namespace) -> None:
    shape = SHAPES[options.variant]
    with torch.no_grad():
        if options.parts == ["step"]:
            ours, oracle = transformers(shape, "cpu", torch.float32)
            candidates = step_candidates(ours, oracle, shape, options.size, 0)
        else:
            candidates = encode_candidates(shape, "cpu", torch.float32)
        candidates[options.only_peak]()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


if __name__ == "__main__":
    sys.exit(main())
