"""Training of pico's autoencoder on images of the world.

Latents are normalized in the loop and disturbed with noise before decoding: the decoder learns to forgive
the flow transformer's errors, and the code is spread over all channels.
"""

from __future__ import annotations

import math
import random
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from klein_core.vae_decoder.autoencoder import Autoencoder
from klein_core.variants import VaeConfig
from training.pico import scenes
from training.pico.checkpoints import load_state, report, save_state
from training.pico.muon import Muon
from training.pico.world import center_px, render

CONFIG = VaeConfig(
    block_out_channels=(8, 16, 32, 48),
    decoder_block_out_channels=(12, 24, 32, 48),
    layers_per_block=1,
    latent_channels=32,
    norm_num_groups=1,
    sample_size=256,
)
_LEARNING_RATE = 4e-3
_MOST_NOISE = 0.45
_STATISTICS_PICTURES = 1600
_NEUTRAL_LOG_VARIANCE = -12.0


@dataclass(frozen=True)
class VaeTrainingConfig:
    """Training time, and the path of the state."""

    state: Path
    seconds: float
    report_every: int = 50


def pixels(pictures: list[np.ndarray[tuple[int, ...], np.dtype[np.uint8]]]) -> Tensor:
    """Stacks RGB pictures (H, W, 3) of one size into (B, 3, H, W) in -1…1."""
    batch = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)
    return (batch.float() / 127.5 - 1).contiguous()


def picture_batch(rng: random.Random, count: int, width_px: int, height_px: int) -> Tensor:
    """Renders random scenes to (count, 3, height, width) in -1…1."""
    return pixels([render(scenes.any_scene(rng), width_px, height_px) for _ in range(count)])


def detail_batch(rng: random.Random, count: int) -> Tensor:
    """Cuts 64-pixel windows, whole tokens, out of scenes of every object size: (count, 3, 64, 64)."""
    windows = []
    for _ in range(count):
        side = rng.choice((64, 64, 128, 128, 192))
        scene = scenes.any_scene(rng)
        picture = render(scene, side, side)
        x, y = center_px(rng.choice(scene.items).place, side, side) if scene.items else (32, 32)
        left, top = (min(max(at - 32 + 16 * rng.randint(-1, 1), 0), side - 64) for at in (x, y))
        windows.append(picture[top : top + 64, left : left + 64])
    return pixels(windows)


@torch.no_grad()
def initialize(autoencoder: Autoencoder, rng: random.Random) -> None:
    """Starts residual branches at zero and the latents at unit variance; the default start learns nothing."""
    for name, parameter in autoencoder.named_parameters():
        if parameter.ndim == 4:
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
        if ("resnets" in name and "conv2.weight" in name) or "to_out.0.weight" in name:
            parameter.zero_()
    if autoencoder.quant_conv is None:
        raise TypeError("pico's autoencoder needs its quantisation convolution")
    mean, _ = autoencoder.posterior(picture_batch(rng, 16, 64, 64))
    channels = mean.shape[1]
    deviation, center = mean.std((0, 2, 3)), mean.mean((0, 2, 3))
    convolution = autoencoder.quant_conv
    convolution.weight[:channels] /= deviation.view(-1, 1, 1, 1)
    if convolution.bias is not None:
        convolution.bias[:channels] = (convolution.bias[:channels] - center) / deviation


def reconstruction_loss(autoencoder: Autoencoder, image: Tensor, most_noise: float) -> tuple[Tensor, Tensor]:
    """Encodes, disturbs, decodes.

    Returns:
        The loss to descend, and the mean absolute error in the scale -1…1.
    """
    mean, _ = autoencoder.posterior(image)
    packed = autoencoder.pack(mean)
    normalized = autoencoder.bn.train()(packed)
    center = packed.detach().mean((0, 2, 3), keepdim=True)
    deviation = (packed.detach().var((0, 2, 3), keepdim=True, unbiased=False) + autoencoder.bn.eps).sqrt()
    count = image.shape[0]
    noise = most_noise * torch.rand(count, 1, 1, 1) * (torch.rand(count, 1, 1, 1) < 0.85)
    disturbed = (normalized + noise * torch.randn_like(normalized)) * deviation + center
    error = autoencoder.decode_unpacked(autoencoder.unpack(disturbed)) - image
    weight = 1 / (1 + 4 * noise)
    edges = error.diff(dim=2).abs().mean((1, 2, 3)) + error.diff(dim=3).abs().mean((1, 2, 3))
    pointwise = (error.abs() + error.square()).mean((1, 2, 3)) + 0.5 * edges
    loss = (pointwise * weight.flatten()).mean() + 1e-4 * mean.square().mean()
    return loss, error.detach().abs().mean()


def optimizers(autoencoder: Autoencoder) -> list[torch.optim.Optimizer]:
    """Muon for hidden kernels and matrices, AdamW for the rest."""
    named = dict(autoencoder.named_parameters())
    hidden = {
        n
        for n, p in named.items()
        if p.ndim >= 2 and "encoder.conv_in" not in n and "decoder.conv_out" not in n
    }
    rest = [p for n, p in named.items() if n not in hidden]
    adam = torch.optim.AdamW(rest, lr=_LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0)
    return [Muon([named[n] for n in sorted(hidden)], _LEARNING_RATE, momentum=0.9), adam]


def _batch_for(step: int, rng: random.Random) -> Tensor:
    if step % 40 == 39:
        return picture_batch(rng, 2, 256, 256)
    if step % 8 == 7:
        return picture_batch(rng, 4, *rng.choice([(128, 128), (128, 128), (192, 128), (96, 160)]))
    return detail_batch(rng, 12)


def train(config: VaeTrainingConfig) -> Autoencoder:
    """Trains for the configured time, resuming from the saved state; returns the finished autoencoder."""
    rng = random.Random(1)
    torch.manual_seed(1)
    autoencoder = Autoencoder(CONFIG)
    initialize(autoencoder, rng)
    both = optimizers(autoencoder)
    step, elapsed, is_finished = _resume(config.state, autoencoder, both)
    if is_finished:
        return autoencoder.eval()
    if step:
        # A run that was stopped goes on with scenes of its own, not with those of its first steps again.
        rng = random.Random(1 + step)
    started = time.monotonic() - elapsed
    while elapsed < config.seconds:
        share = elapsed / config.seconds
        _set_learning_rate(
            both, _LEARNING_RATE * min(1, (step + 1) / 50) * (0.5 + 0.5 * math.cos(math.pi * share))
        )
        loss, error = reconstruction_loss(autoencoder, _batch_for(step, rng), _MOST_NOISE * min(1, 3 * share))
        autoencoder.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(autoencoder.parameters(), 1.0)
        for optimizer in both:
            optimizer.step()
        step, elapsed = step + 1, time.monotonic() - started
        if step % config.report_every == 0:
            report(
                f"vae step {step}  {elapsed:.0f}/{config.seconds:.0f} s  loss {loss:.4f}  error {error:.4f}",
            )
            _save(config.state, autoencoder, both, step, elapsed)
    finish(autoencoder, rng)
    _save(config.state, autoencoder, both, step, elapsed, is_finished=True)
    return autoencoder


def _set_learning_rate(both: list[torch.optim.Optimizer], rate: float) -> None:
    for optimizer in both:
        for group in optimizer.param_groups:
            group["lr"] = rate + 2e-5


def _resume(
    path: Path, autoencoder: Autoencoder, both: list[torch.optim.Optimizer]
) -> tuple[int, float, bool]:
    state = load_state(path)
    if state is None:
        return 0, 0.0, False
    autoencoder.load_state_dict(state["autoencoder"])
    for optimizer, saved in zip(both, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    return int(state["step"]), float(state["elapsed"]), bool(state.get("is_finished"))


def _save(
    path: Path,
    autoencoder: Autoencoder,
    both: list[torch.optim.Optimizer],
    step: int,
    elapsed: float,
    *,
    is_finished: bool = False,
) -> None:
    save_state(
        path,
        {
            "autoencoder": autoencoder.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in both],
            "step": step,
            "elapsed": elapsed,
            "is_finished": is_finished,
        },
    )


@torch.no_grad()
def finish(autoencoder: Autoencoder, rng: random.Random) -> None:
    """Measures the latents' statistics anew over many pictures and makes the posterior narrow."""
    statistics = autoencoder.bn
    if autoencoder.quant_conv is None or statistics.running_mean is None or statistics.running_var is None:
        raise TypeError("pico's autoencoder needs its quantisation convolution and statistics")
    autoencoder.eval()
    sides = [(64, 64), (128, 128), (128, 128), (192, 128)]
    tokens = []
    for index in range(_STATISTICS_PICTURES // 16):
        packed = autoencoder.pack(autoencoder.posterior(picture_batch(rng, 16, *sides[index % 4]))[0])
        tokens.append(packed.permute(0, 2, 3, 1).flatten(0, 2))
    gathered = torch.cat(tokens)
    statistics.running_mean.copy_(gathered.mean(0))
    statistics.running_var.copy_(gathered.var(0, unbiased=False))
    channels = CONFIG.latent_channels
    autoencoder.quant_conv.weight[channels:] = 0
    if autoencoder.quant_conv.bias is not None:
        autoencoder.quant_conv.bias[channels:] = _NEUTRAL_LOG_VARIANCE
