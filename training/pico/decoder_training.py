"""Training of the decoder alone: the encoder, and so the meaning of every latent, stays fixed."""

from __future__ import annotations

import math
import random
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from klein_core.vae_decoder.autoencoder import Autoencoder
from training.pico.checkpoints import load_state, report, save_state
from training.pico.muon import Muon
from training.pico.vae_training import CONFIG, detail_batch, picture_batch

_LEARNING_RATE = 2.5e-3
_MOST_NOISE = 0.3
_KEPT_BATCHES = 240
_REPORT_EVERY = 50


def refine_decoder(source: Path, state: Path, seconds: float) -> Autoencoder:
    """Trains only the decoder, on pictures that are encoded once.

    Args:
        source: the state of a finished autoencoder.
        state: where this stage's state is kept; it holds the whole autoencoder.
        seconds: how long to train in all.
    """
    torch.manual_seed(6)
    saved = load_state(state)
    autoencoder = Autoencoder(CONFIG)
    first = saved or load_state(source)
    if first is None:
        raise FileNotFoundError(f"{source} is missing: the autoencoder was not trained yet")
    autoencoder.load_state_dict(first["autoencoder"])
    autoencoder.eval().requires_grad_(False)
    both = _optimizers(autoencoder)
    step, elapsed = 0, 0.0
    if saved:
        for optimizer, old in zip(both, saved["optimizers"], strict=True):
            optimizer.load_state_dict(old)
        step, elapsed = int(saved["step"]), float(saved["elapsed"])
    rng = random.Random(6 + step)
    kept: list[tuple[Tensor, Tensor]] = []
    started, error_sum = time.monotonic() - elapsed, 0.0
    while elapsed < seconds:
        rate = (
            _LEARNING_RATE * min(1, (step + 1) / 30) * (0.5 + 0.5 * math.cos(math.pi * elapsed / seconds))
            + 1e-5
        )
        for optimizer in both:
            optimizer.zero_grad()
            for group in optimizer.param_groups:
                group["lr"] = rate
        loss, error = _loss(autoencoder, *_pictures(autoencoder, kept, rng))
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(autoencoder.decoder.parameters(), 1.0)
        for optimizer in both:
            optimizer.step()
        step, elapsed, error_sum = step + 1, time.monotonic() - started, error_sum + error
        if step % _REPORT_EVERY == 0:
            mean = error_sum / _REPORT_EVERY
            report(f"decoder step {step}  {elapsed:.0f}/{seconds:.0f} s  error {mean:.4f}")
            error_sum = 0.0
            _save(state, autoencoder, both, step, elapsed)
    _save(state, autoencoder, both, step, elapsed)
    return autoencoder


def _optimizers(autoencoder: Autoencoder) -> list[torch.optim.Optimizer]:
    trained = {
        name: parameter
        for name, parameter in autoencoder.named_parameters()
        if name.startswith(("decoder.", "post_quant_conv."))
    }
    for parameter in trained.values():
        parameter.requires_grad_()
    hidden = {n for n, p in trained.items() if p.ndim >= 2 and "conv_out" not in n}
    adam = torch.optim.AdamW(
        [p for n, p in trained.items() if n not in hidden],
        lr=_LEARNING_RATE,
        betas=(0.9, 0.95),
        weight_decay=0.0,
    )
    return [Muon([trained[n] for n in sorted(hidden)], _LEARNING_RATE, momentum=0.9), adam]


def _pictures(
    autoencoder: Autoencoder, kept: list[tuple[Tensor, Tensor]], rng: random.Random
) -> tuple[Tensor, Tensor]:
    """Returns images and their latents; encodes new ones until enough are kept, then one batch in eight."""
    if len(kept) >= _KEPT_BATCHES and rng.random() > 0.125:
        return rng.choice(kept)
    draw = rng.random()
    if draw < 0.04:
        images = picture_batch(rng, 1, 256, 256)
    elif draw < 0.16:
        images = picture_batch(rng, 3, *rng.choice([(128, 128), (128, 128), (192, 128), (96, 160)]))
    else:
        images = detail_batch(rng, 10)
    pair = images, autoencoder.encode(images)
    if len(kept) >= _KEPT_BATCHES:
        kept.pop(rng.randrange(len(kept)))
    kept.append(pair)
    return pair


def _loss(autoencoder: Autoencoder, images: Tensor, latents: Tensor) -> tuple[Tensor, float]:
    noise = _MOST_NOISE * torch.rand(len(images), 1, 1, 1) * (torch.rand(len(images), 1, 1, 1) < 0.7)
    error = autoencoder.decode(latents + noise * torch.randn_like(latents)) - images
    edges = error.diff(dim=2).abs().mean((1, 2, 3)) + error.diff(dim=3).abs().mean((1, 2, 3))
    pointwise = (error.abs() + error.square()).mean((1, 2, 3)) + 0.5 * edges
    return (pointwise / (1 + 4 * noise.flatten())).mean(), float(error.detach().abs().mean())


def _save(
    path: Path, autoencoder: Autoencoder, both: list[torch.optim.Optimizer], step: int, elapsed: float
) -> None:
    save_state(
        path,
        {
            "autoencoder": autoencoder.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in both],
            "step": step,
            "elapsed": elapsed,
        },
    )
